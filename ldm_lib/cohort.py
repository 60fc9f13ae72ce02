"""Find, check and split the cases of a folder, in the seed layout or the challenge's.

Seed layout: `<ID>/<ID>-t1n.nii.gz`, `<ID>-t1n-voided-000k.nii.gz`, `<ID>-mask-000k.nii.gz`, and so on: one patient, up
to three holes. Challenge layout (BraTS Local Synthesis): `BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n-voided.nii.gz`,
and so on: one hole, the last three digits are a time point of the same patient. Growth and tissue maps lie in
`growth_model/<ID>.nii.gz` and `tissue_segmentation/<ID>.nii.gz` of the conditioning folder, for both layouts.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.cases import Case, CaseData, load_case
from ldm_lib.errors import InputError
from ldm_lib.files import fingerprint, sha256, write_json
from ldm_lib.values import safe_name

HOLE_ROLES = ("t1n-voided", "mask", "mask-healthy", "mask-unhealthy")
CONDITIONING_FOLDERS = {"growth": "growth_model", "tissue": "tissue_segmentation"}
DEFAULT_CONDITIONING = "conditioning_data"
_TIME_POINT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}")
_HOLE = re.compile(r"-(?:mask|t1n-voided)(-\d{4})?\.nii\.gz")


@dataclass(frozen=True)
class Exclusion:
    """A case that is not used, and why."""

    case: str
    reason: str


def find_cases(data_dir: str | Path, conditioning_dir: str | Path = "") -> tuple[list[Case], list[Exclusion]]:
    """Every hole of every patient folder, in order of id, and what cannot be a case.

    Args:
        conditioning_dir: empty looks for `conditioning_data` inside and beside `data_dir`.

    Raises:
        InputError: the folder does not exist or holds no case at all.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError("no such folder", where=root, fix="give the folder that holds one folder per patient")
    conditioning = _conditioning_folder(root, conditioning_dir)
    cases, exclusions = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name == DEFAULT_CONDITIONING or (conditioning and folder.samefile(conditioning)):
            continue
        found, refused = _cases_of(folder, conditioning)
        cases += found
        exclusions += refused
    if not cases:
        refusals = "".join(f"; {e.case}: {e.reason}" for e in exclusions[:3])
        raise InputError(f"looked for */<ID>-mask*.nii.gz, found 0 cases; present: {_listing(root)}{refusals}",
                         where=root, fix="see the README's table of layouts")  # fmt: skip
    return cases, exclusions


def split_patients(patients: Iterable[str], *, seed: int, validation_fraction: float) -> dict[str, list[str]]:
    """Patients -> {"train": [...], "validation": [...]}, by id and seed alone, at least one on each side.

    Raises:
        InputError: fewer than two patients.
    """
    unique = sorted(set(patients))
    if len(unique) < 2:
        raise InputError(f"{len(unique)} patient, need at least 2 to train on one and validate on another",
                         fix="add patients, or use `inpaint` with trained weights")  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(unique))
    count = min(max(1, round(validation_fraction * len(unique))), len(unique) - 1)
    chosen = {unique[i] for i in order[:count]}
    return {"train": [p for p in unique if p not in chosen], "validation": [p for p in unique if p in chosen]}


def write_cohort(path: Path, cases: Sequence[Case], split: dict[str, list[str]], root: Path) -> None:
    """Cases and split as JSON; files that lie under `root` are written relative to it."""
    root = root.absolute()

    def told(value: object) -> object:
        if not isinstance(value, Path):
            return value
        absolute = value.absolute()  # links stay links: what they point to may be renamed
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)

    rows = [{k: told(v) for k, v in asdict(case).items()} for case in cases]
    write_json(path, {"split": split, "cases": rows})


def read_cohort(path: Path, root: Path) -> tuple[list[Case], list[Case]]:
    """Training cases and validation cases of a run; of the latter the first hole of every patient comes first."""
    content, plain = json.loads(path.read_text()), {"id", "patient", "index"}
    cases = [
        Case(**{k: v if k in plain or v is None else root / v for k, v in row.items()}) for row in content["cases"]
    ]
    train, validation = (set(content["split"][side]) for side in ("train", "validation"))
    holes_in_turn = sorted((c for c in cases if c.patient in validation), key=lambda c: (c.index, c.id))
    return [c for c in cases if c.patient in train], holes_in_turn


def with_target(cases: Sequence[Case]) -> list[Case]:
    """The cases whose full image is there, which training and its validation need; at least one."""
    found = [case for case in cases if case.t1n]
    if not found:
        raise InputError(f"none of {len(cases)} cases has a t1n beside its t1n-voided", where="training",
                         fix="give cases with their full image; `inpaint` needs none")  # fmt: skip
    return found


def _conditioning_folder(root: Path, given: str | Path) -> Path | None:
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InputError("no such folder", where=folder, fix="leave CONDITIONING_DIR empty if there are no maps")
        return folder
    return next((p for p in (root / DEFAULT_CONDITIONING, root.parent / DEFAULT_CONDITIONING) if p.is_dir()), None)


def _cases_of(folder: Path, conditioning: Path | None) -> tuple[list[Case], list[Exclusion]]:
    try:
        identity, names = safe_name(folder.name), [p.name for p in folder.iterdir()]
    except ValueError as error:
        return [], [Exclusion(repr(folder.name), f"folder name is not a patient id: {error}")]
    except OSError as error:
        return [], [Exclusion(folder.name, f"cannot be listed ({error.strerror})")]
    found = [_HOLE.fullmatch(name.removeprefix(identity)) for name in names if name.startswith(identity)]
    holes = sorted({match.group(1) or "" for match in found if match})
    if not holes:
        return [], [Exclusion(identity, f"no mask file; present: {_listing(folder)}")]
    cases, exclusions = [], []
    for hole in holes:
        case = _case(folder, identity, hole, conditioning)
        if case.mask is None:
            exclusions.append(Exclusion(case.key, "no mask file beside its t1n-voided"))
        elif case.t1n is None and case.t1n_voided is None:
            exclusions.append(Exclusion(case.key, "neither t1n nor t1n-voided beside its mask"))
        else:
            cases.append(case)
    return cases, exclusions


def _case(folder: Path, identity: str, hole: str, conditioning: Path | None) -> Case:
    """The files of one hole ("-0000", or "" in the challenge's layout); a missing one is None."""
    images = {role.replace("-", "_"): _existing(folder / f"{identity}-{role}{hole}.nii.gz") for role in HOLE_ROLES}
    maps = {
        role: _existing(conditioning / name / f"{identity}.nii.gz") if conditioning else None
        for role, name in CONDITIONING_FOLDERS.items()
    }
    time_point = _TIME_POINT.fullmatch(identity)
    return Case(
        id=identity,
        patient=time_point.group(1) if time_point else identity,
        index=hole.removeprefix("-"),
        t1n=_existing(folder / f"{identity}-t1n.nii.gz"),
        **images,
        **maps,
    )


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _existing(path: Path) -> Path | None:
    return path if path.exists() or path.is_symlink() else None


@dataclass(frozen=True)
class AuditRow:
    """What the gate said of one case: status "ok", "warning" or "refused", the reason, and facts of what was read."""

    key: str
    status: str
    reason: str
    case: Case | None
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """One line of a table."""
        return {"case": self.key, "status": self.status, **self.facts, "reason": self.reason}


def audit(data_dir: str | Path, conditioning_dir: str | Path = "") -> Iterator[AuditRow]:
    """Read every case of a folder through the gate, one row each; no refusal stops the pass."""
    cases, exclusions = find_cases(data_dir, conditioning_dir)
    for exclusion in exclusions:
        yield AuditRow(exclusion.case, "refused", exclusion.reason, None, {})
    for case in cases:
        try:
            data = load_case(case)
        except InputError as error:
            yield AuditRow(case.key, "refused", str(error), case, {})
        else:
            unseen = () if case.t1n else ("no t1n: can be filled, but neither trained on nor scored",)
            told = data.warnings + unseen
            status = "warning" if told else "ok"
            yield AuditRow(case.key, status, "; ".join(told), case, _facts(data))


def _facts(data: CaseData) -> dict[str, Any]:
    litre = float(np.prod(data.source.spacing_mm)) / 1000
    return {
        "patient": data.case.patient,
        "shape": "x".join(map(str, data.source.shape)),
        "spacing_mm": data.source.spacing_mm[0],
        "orientation": data.source.orientation,
        "dtype": str(data.source.raw.dtype),
        "scale": data.scale,
        "hole_ml": round(float(data.mask.sum()) * litre, 1),
        "healthy_ml": None if data.healthy is None else round(float(data.healthy.sum()) * litre, 1),
        "growth": data.growth is not None,
        "tissue": data.tissue is not None,
    }


def source_digests(data_dir: str | Path, conditioning_dir: str | Path = "") -> dict[str, str]:
    """ "data" -> digest over the bytes of every file of every case; empty for the synthetic cohort."""
    if not data_dir:
        return {}
    cases, _ = find_cases(data_dir, conditioning_dir)
    return {"data": fingerprint({c.key: {role: _digest(path) for role, path in c.files().items()} for c in cases})}


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:  # a broken link or a folder: the gate refuses it later, with its reason
        return f"unreadable: {error.strerror}"
