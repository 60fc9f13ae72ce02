"""Find T1-weighted scans and their lesion masks in a BIDS data set, and name the derivatives that are made of them.

A scan is `sub-01/[ses-02/]anat/<entities>_T1w.nii.gz`. Its lesion mask has the same entities, a label or description
that names a lesion, and the suffix mask or roi: `<entities>_label-lesion_mask.nii.gz`, and also the older
`<entities>_T1w_label-lesion_roi.nii.gz`. It lies next to the scan or in the same folder of a data set under
`derivatives`. A whole head has a brain mask in the same places: `<entities>_desc-brain_mask.nii.gz`.
"""

import logging
import re
from collections import defaultdict
from pathlib import Path

from ldm_lib.data.case import Case
from ldm_lib.data.layouts import CONDITIONING_FOLDERS, Exclusion, conditioning_maps
from ldm_lib.errors import InputError
from ldm_lib.files import expand_path
from ldm_lib.images.options import READ_STRICTLY, ReadOptions

log = logging.getLogger("ldm_lib")

RESULT = "desc-inpainted_T1w.nii.gz"
_FOLDERS = ("sub-*/anat", "sub-*/ses-*/anat")
_SCAN = re.compile(r"(?P<entities>(?P<subject>sub-[A-Za-z0-9]+)(_[a-z]+-[A-Za-z0-9]+)*)_T1w\.nii(\.gz)?")
_ADDED = r"(?P<added>(_(space|res|label|desc)-[A-Za-z0-9]+)+)"
_MASK = re.compile(rf"(?P<entities>sub-.+?)(_T1w)?{_ADDED}_(mask|roi)\.nii(\.gz)?")
_LESION = re.compile(r"_(label|desc)-[A-Za-z0-9]*(lesion|tumou?r)", re.IGNORECASE)
_BRAIN = re.compile(r"_(label|desc)-brain(_|$)", re.IGNORECASE)
_OTHER_SPACE = re.compile(r"_space-(?!(orig|T1w|individual|native)(_|$))")


def list_cases(
    data_dir: str | Path, conditioning_dir: str | Path = "", read_options: ReadOptions = READ_STRICTLY
) -> tuple[list[Case], list[Exclusion]]:
    """List the scans that have one lesion mask, in order of name, and those with several, which are not used.

    Scans without a lesion mask are counted in one warning. Both lists are empty for a folder that is no BIDS data set.

    Raises:
        InputError: there are scans, and none has a lesion mask.
    """
    root = expand_path(data_dir).resolve()
    if not (scans := _scans(root)):
        return [], []
    _, maps = conditioning_maps(root, conditioning_dir)
    lesions, brains = _masks(root, _LESION, _BRAIN)
    cases, exclusions, without = [], [], []
    for scan, entities, subject in scans:
        found, brain = (masks_of[scan.parent.relative_to(root), entities] for masks_of in (lesions, brains))
        if not found:
            without.append(scan.name)
        elif len(found) > 1:
            names = " and ".join(path.relative_to(root).as_posix() for path in found)
            exclusions.append(Exclusion(entities, f"{entities}: ambiguous: {names}. Fix: keep one lesion mask."))
        else:
            given = {role: next(iter(maps.get(role, {}).get(entities, [])), None) for role in CONDITIONING_FOLDERS}
            derivative = (scan.parent.relative_to(root) / f"{_without_description(entities)}_{RESULT}").as_posix()
            names = " and ".join(path.relative_to(root).as_posix() for path in brain)
            notes = (f"several brain masks, the first is used: {names}",) if len(brain) > 1 else ()
            cases.append(Case(id=entities, patient=subject, index="", t1n=None, t1n_voided=scan, mask=found[0],
                              mask_healthy=None, mask_unhealthy=None, **given, derivative=derivative, notes=notes,
                              read_options=read_options, brain_mask=brain[0] if brain else None))  # fmt: skip
    if not cases:
        reasons = "".join(f"; {exclusion.reason}" for exclusion in exclusions[:3])
        wanted = scans[0][1]
        raise InputError(f"{len(scans)} T1w of a BIDS data set, {len(without)} of them without a lesion mask{reasons}",
                         where=data_dir, fix=f"put {wanted}_label-lesion_mask.nii.gz next to the T1w, or in the same "
                         "folder of derivatives/<name>")  # fmt: skip
    if without:
        more = ", ..." if len(without) > 3 else ""
        log.warning("%d of %d T1w have no lesion mask and are left out: %s", len(without), len(scans),
                    ", ".join(without[:3]) + more)  # fmt: skip
    return cases, exclusions


def data_set_of(case: Case) -> Path:
    """Return the folder of the BIDS data set that a case was found in."""
    return (case.t1n_voided or case.mask).parents[case.derivative.count("/")]


def uri(path: Path, root: Path) -> str:
    """Return the BIDS URI of a file of the data set that derivatives call raw."""
    return f"bids:raw:{path.relative_to(root).as_posix()}"


def _scans(root: Path) -> list[tuple[Path, str, str]]:
    """List the scans with their entities, such as sub-01_ses-02_run-1, and subjects."""
    folders = [folder for pattern in _FOLDERS for folder in root.glob(pattern) if folder.is_dir()]
    files = sorted((path for folder in folders for path in folder.iterdir()), key=lambda path: path.name)
    found = [(path, match) for path in files if (match := _SCAN.fullmatch(path.name))]
    return [(path, match["entities"], match["subject"]) for path, match in found]


def _masks(root: Path, *kinds: re.Pattern[str]) -> list[dict[tuple[Path, str], list[Path]]]:
    """Return for each kind (folder of the scan, its entities) -> its masks, those of other spaces left out."""
    masks: list[dict[tuple[Path, str], list[Path]]] = [defaultdict(list) for _ in kinds]
    for base in (root, *sorted(path for path in root.glob("derivatives/*") if path.is_dir())):
        for folder in (folder for pattern in _FOLDERS for folder in base.glob(pattern)):
            for path in sorted(folder.iterdir()):
                match = _MASK.fullmatch(path.name)
                if match is None or _OTHER_SPACE.search(match["added"]):
                    continue
                for kind, found in zip(kinds, masks, strict=True):
                    if kind.search(match["added"]):
                        found[folder.relative_to(base), match["entities"]].append(path)
    return masks


def _without_description(entities: str) -> str:
    """Return entities without `desc-`, whose place the result's own description takes."""
    return re.sub(r"_desc-[A-Za-z0-9]+", "", entities)
