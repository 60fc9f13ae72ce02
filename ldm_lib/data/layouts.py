"""Find the files of each case in a folder by their exact names, in the training layout or the challenge layout.

Training layout: `<ID>/<ID>-t1n.nii.gz`, `<ID>-t1n-voided-000k.nii.gz`, `<ID>-mask-000k.nii.gz` and so on, several masks
of one scan. Challenge layout: `BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n-voided.nii.gz` and so on, one mask; the last
three digits are a time point. A whole head has its `<ID>-brain-mask.nii.gz` in both. Maps: `growth_model/<ID>.nii.gz`,
`tissue_segmentation/<ID>.nii.gz` of the folder `conditioning_data`. Scans that are no cases yet: the files of a folder,
or a BIDS data set.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm_lib.data.case import Case
from ldm_lib.data.patients import patient_of, read_patients
from ldm_lib.errors import InputError, printable
from ldm_lib.files import expand_path
from ldm_lib.images.image_files import SUFFIXES, stem
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.options import safe_name

MASK_ROLES = ("t1n-voided", "mask", "mask-healthy", "mask-unhealthy")
OF_SCAN = ("t1n", "brain-mask")  # of all its masks
CONDITIONING_FOLDERS = {"growth": "growth_model", "tissue": "tissue_segmentation"}
DEFAULT_CONDITIONING = "conditioning_data"
_SCAN_OF = re.compile(r"(?P<id>sub-[A-Za-z0-9]+(_ses-[A-Za-z0-9]+)?)(_.*)?|(?P<other>.*?)([-_](t1n?|T1w))?")
_BIDS = ("sub-*/anat/*T1w.*", "sub-*/ses-*/anat/*T1w.*")
_ENDING = r"\.(nii(\.gz)?|mg[hz])"
_IMAGE = re.compile(_ENDING, re.IGNORECASE)
_ROLES = "|".join((*MASK_ROLES, *OF_SCAN, "seg"))
_ROLE = re.compile(rf"-(?P<role>{_ROLES})(?P<index>-\d{{4}})?({_ENDING}|\.hdr)", re.IGNORECASE)
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # folders
_NEARLY = re.compile(r"t1n|mask|void|healthy", re.IGNORECASE)
_LEFTOVER = re.compile(r".*(\.(part|partial|tmp|crdownload|download)| \(\d+\)(\.nii)?(\.gz|\.mg[hz])?)", re.IGNORECASE)


@dataclass(frozen=True)
class Exclusion:
    """Hold the name of a case that is not used, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """Name one scan that is no case yet."""

    id: str
    path: Path


def list_scans(folder: str | Path) -> list[Scan]:
    """List the scans of a folder, in order of id: its NIfTI files, and the T1w of a BIDS data set.

    The id of `sub-01_ses-02_T1w.nii.gz` is sub-01_ses-02; that of another name is the name, without `-t1n` or `_T1w`.

    Raises:
        InputError: the folder does not exist or holds no scan, a name is no id, or two files have one id.
    """
    root, fix = expand_path(folder), "give a folder of skull-stripped T1w, or a BIDS data set"
    if not str(folder) or not root.is_dir():
        raise InputError("no such folder", where=root if str(folder) else "scans", fix=fix)
    files = [*root.iterdir(), *(path for pattern in _BIDS for path in root.glob(pattern))]
    files = [path for path in sorted(files) if stem(path) != path.name and not path.is_dir()]
    scans: dict[str, Scan] = {}
    for path in (path for path in files if not path.name.startswith(".") and not _LEFTOVER.fullmatch(path.name)):
        match = _SCAN_OF.fullmatch(stem(path))
        identity = match["id"] or match["other"]
        try:
            safe_name(identity)
        except ValueError as error:
            raise InputError(f"its name is no id: {error}", where=path, fix="rename it") from error
        if identity in scans:
            names = f"{scans[identity].path.relative_to(root)} and {path.relative_to(root)}"
            raise InputError(f"two files of one id, {identity}: {names}", where=root, fix="keep one of each")
        scans[identity] = Scan(identity, path)
    if not scans:
        looked = ", ".join((*(f"*{suffix}" for suffix in SUFFIXES), *_BIDS))
        raise InputError(f"0 scans found ({looked}); present: {listing(root)}", where=root, fix=fix)
    return [scans[identity] for identity in sorted(scans)]


@dataclass
class _Files:
    """Hold what one patient's folder contains: files by role and index, and warnings about those that are ignored."""

    found: dict[tuple[str, str], list[Path]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    @property
    def indices(self) -> list[str]:
        """List "-0000" and so on, "" in the challenge layout: of every mask, and every image without one."""
        return sorted({index for role, index in self.found if role in ("mask", "t1n-voided")})


def list_cases(
    data_dir: str | Path,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
) -> tuple[list[Case], list[Exclusion]]:
    """List the cases of a folder, in order of id, and what cannot be used as one; both may be empty.

    With `mask_labels` the segmentation of a case without mask is its mask. `patients_file` names the patients of cases
    whose names do not (`read_patients`).
    """
    root, fix = expand_path(data_dir), "give the folder that holds one folder per patient"
    if not str(data_dir):
        raise InputError("no folder of cases is given", fix=fix)
    if not root.is_dir():
        raise InputError("is a file" if root.is_file() else "no such folder", where=root, fix=fix)
    root = root.resolve()
    conditioning, maps = conditioning_maps(root, conditioning_dir)
    inside = tuple(os.path.realpath(folder) for folder in (root, conditioning) if folder)
    cases, exclusions = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", *_OF_SYSTEMS))):
        if folder.name == DEFAULT_CONDITIONING or (conditioning and folder.samefile(conditioning)):
            continue
        found, excluded = _cases_of(folder, maps, inside, labelled=bool(read_options.labels))
        cases += found
        exclusions += excluded
    loose = [path.name for path in root.iterdir() if _ROLE.search(path.name) and not path.is_dir()]
    if cases and loose:
        note = f"ignored, not in a folder of a case: {_first(loose)}"
        cases[0] = replace(cases[0], notes=(*cases[0].notes, note))
    given = read_patients(patients_file) if patients_file else {}
    cases = [replace(case, patient=given.get(case.id, case.patient), read_options=read_options) for case in cases]
    return cases, exclusions


def require_outside(output: Path, data_dir: str | Path) -> None:
    """Raise InputError if an output would be written into the folder of cases."""
    if output.resolve().is_relative_to(expand_path(data_dir).resolve()):
        raise InputError("lies inside the folder of cases", where=output, fix="name one outside it")


def listing(folder: str | Path) -> str:
    """Return the first few names in a folder."""
    return _first(p.name for p in expand_path(folder).iterdir()) or "nothing"


def _first(names: Iterable[str]) -> str:
    names = sorted(map(printable, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def conditioning_maps(root: Path, conditioning_dir: str | Path) -> tuple[Path | None, dict[str, dict[str, list[Path]]]]:
    """Return the folder of maps, if any, and kind -> id -> its maps."""
    folder = _conditioning_folder(root, conditioning_dir)
    return folder, {role: _maps_in(folder / name) for role, name in CONDITIONING_FOLDERS.items()} if folder else {}


def _conditioning_folder(root: Path, given: str | Path) -> Path | None:
    if given:
        if not (folder := expand_path(given)).is_dir():
            raise InputError("no such folder", where=folder, fix="leave CONDITIONING_DIR empty if there are no maps")
        return folder.resolve()
    return next((p for p in (root / DEFAULT_CONDITIONING, root.parent / DEFAULT_CONDITIONING) if p.is_dir()), None)


def _maps_in(folder: Path) -> dict[str, list[Path]]:
    """Return id -> its maps in a conditioning folder."""
    maps = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (name := stem(path)) != path.name and not _LEFTOVER.fullmatch(path.name):
            maps[name].append(path)
    return maps


def _cases_of(
    folder: Path, maps: dict[str, dict[str, list[Path]]], inside: tuple[str, ...], *, labelled: bool
) -> tuple[list[Case], list[Exclusion]]:
    try:
        identity, files = safe_name(folder.name), _files_in(folder)
    except ValueError as error:
        return [], [Exclusion(repr(folder.name), f"folder name is not a patient id: {error}. Fix: rename it.")]
    except OSError as error:
        reason = f"cannot be listed ({error.strerror}). Fix: check the rights of its folder."
        return [], [Exclusion(folder.name, reason)]
    if labelled and not files.indices and (segmentation := files.found.get(("seg", ""))):
        files.found["mask", ""] = segmentation
    if not files.indices:
        notes = "".join(f"; {note}" for note in files.notes)
        fix = f"Fix: {_without_mask(folder, files)}."
        return [], [Exclusion(identity, f"{identity}: no mask file; present: {listing(folder)}{notes}. {fix}")]
    patient, cases, exclusions = patient_of(identity), [], []
    for index in files.indices:
        chosen = {role: files.found.get((role, index), []) for role in MASK_ROLES}
        chosen |= {role: files.found.get((role, ""), []) for role in OF_SCAN}
        chosen |= {role: maps[role].get(identity, []) if maps else [] for role in CONDITIONING_FOLDERS}
        reason = ""
        if doubled := [paths for paths in chosen.values() if len(paths) > 1]:
            names = "; ".join(" and ".join(path.name for path in paths) for paths in doubled)
            reason = f"ambiguous: {names}. Fix: keep one of each."
        elif not chosen["mask"]:
            reason = f"no mask file next to its t1n-voided. Fix: put {identity}-mask{index}.nii.gz there."
        elif not (chosen["t1n"] or chosen["t1n-voided"]):
            reason = ("neither t1n nor t1n-voided next to its mask. "
                      f"Fix: put {identity}-t1n-voided{index}.nii.gz there.")  # fmt: skip
        if reason:
            exclusions.append(Exclusion(f"{identity}{index}", f"{identity}: {reason}"))
        else:
            single = {role.replace("-", "_"): paths[0] if paths else None for role, paths in chosen.items()}
            notes = (*files.notes, *_outside(single, inside))
            cases.append(Case(id=identity, patient=patient, index=index.removeprefix("-"), **single, notes=notes))
    return cases, exclusions


def _without_mask(folder: Path, files: _Files) -> str:
    """Return what to do about a folder without masks."""
    for pattern in ("*/*-t1n*", "*/*-mask*", "*/*/*-t1n*", "*/*/*-mask*"):
        if inner := next(folder.glob(pattern), None):
            cases = inner.parent.parent.relative_to(folder.parent)
            depth = ("one level", "two levels")[len(cases.parts) - 1]
            return f"give the folder {cases}, {depth} down: its folders are the cases"
    if ("seg", "") in files.found:
        return "name the labels of its segmentation to inpaint, such as --mask-labels 1,2,3, or put a mask there"
    return f"name it {folder.name}-mask.nii.gz, or {folder.name}-mask-0000.nii.gz and so on"


def _files_in(folder: Path) -> _Files:
    """Return the files of the patient whose id is the folder's name, and notes on files with similar names."""
    files, identity, unfinished, strange = _Files(), folder.name, [], []
    for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        if match := _ROLE.fullmatch(name.removeprefix(identity)) if name.startswith(identity) else None:
            files.found[match["role"].lower(), match["index"] or ""].append(folder / name)
        elif _LEFTOVER.fullmatch(name):
            unfinished.append(name)
        elif _IMAGE.search(name) and (_NEARLY if name.startswith(identity) else _ROLE).search(name):
            strange.append(name)
    for (role, index), paths in files.found.items():
        if (index and role in OF_SCAN) or (role in MASK_ROLES and index not in files.indices):
            strange += [path.name for path in paths]
    if unfinished:
        files.notes.append(f"ignored, unfinished or a second copy: {_first(unfinished)}")
    if strange:
        files.notes.append(f"ignored, their names are not of this case and its masks: {_first(strange)}")
    return files


def _outside(files: dict[str, Path | None], inside: tuple[str, ...]) -> list[str]:
    """Return a warning for each link that leads out of the given folders; such links are followed."""
    notes = []
    for role, path in files.items():
        target = path and os.path.realpath(path)
        if path and not any(os.path.commonpath([target, folder]) == folder for folder in inside):
            name = f"{CONDITIONING_FOLDERS[role]}/{path.name}" if role in CONDITIONING_FOLDERS else path.name
            notes.append(f"{name} is a link out of the data folder, to {os.path.relpath(target, inside[0])}")
    return notes
