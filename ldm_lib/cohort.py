"""Find, check, load and split the cases of a folder, in the seed layout or the challenge's.

Seed layout: `<ID>/<ID>-t1n.nii.gz`, `<ID>-t1n-voided-000k.nii.gz`, `<ID>-mask-000k.nii.gz`, and so on: one patient, up
to three holes. Challenge layout (BraTS Local Synthesis): `BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n-voided.nii.gz`,
and so on: one hole, the last three digits are a time point of the same patient. Growth and tissue maps lie in
`growth_model/<ID>.nii.gz` and `tissue_segmentation/<ID>.nii.gz` of the conditioning folder, for both layouts.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ldm_lib.config import safe_name
from ldm_lib.errors import InputError
from ldm_lib.geometry import Frame
from ldm_lib.volumes import (
    Volume,
    intensity_scale,
    read_image,
    read_labels,
    read_mask,
    read_unit_map,
    require_same_grid,
)

IMAGE_ROLES = ("t1n", "t1n-voided", "mask", "mask-healthy", "mask-unhealthy")
CONDITIONING_FOLDERS = {"growth": "growth_model", "tissue": "tissue_segmentation"}
TISSUE_LABELS = (0, 1, 2, 3)
_TIME_POINT = re.compile(r"(BraTS-[A-Z]+-\d+)-\d{3}")
_MASK_INDEX = re.compile(r"-(\d{4})\.nii\.gz")


@dataclass(frozen=True)
class Case:
    """One hole of one patient, and where its files are (None: there is no such file)."""

    id: str
    patient: str
    index: str  # "0000".."0002" in the seed layout, "" in the challenge's
    t1n: Path | None
    t1n_voided: Path | None
    mask: Path
    mask_healthy: Path | None
    mask_unhealthy: Path | None
    growth: Path | None
    tissue: Path | None

    @property
    def key(self) -> str:
        """Names the case in tables, caches and random seeds."""
        return f"{self.id}-{self.index}" if self.index else self.id

    @property
    def result_name(self) -> str:
        """The challenge's file name, with the hole's number where a patient has several."""
        return f"{self.id}-t1n-inference{'-' + self.index if self.index else ''}.nii.gz"

    def files(self) -> dict[str, Path]:
        """Role -> path of every file there is."""
        return {f.name: path for f in fields(self) if isinstance(path := getattr(self, f.name), Path)}


@dataclass(frozen=True)
class Exclusion:
    """A case that is not used, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class CaseData:
    """A case read through the gate. Arrays are (x, y, z) in the file's voxel order, images in source units.

    Attributes:
        source: the voided file (or the full image, when there is no voided one).
        voided: float32, 0 under the mask.
        mask: bool, True = fill this.
        scale: intensity divisor of this case.
        target: the full image, or None.
        healthy, unhealthy: bool parts of the mask, or None.
        growth: tumour-cell concentration in [0, 1], or None.
        tissue: labels 0 none, 1 CSF, 2 GM, 3 WM, or None.
        warnings: what is odd but usable.
    """

    case: Case
    source: Volume
    voided: np.ndarray
    mask: np.ndarray
    scale: float
    target: np.ndarray | None
    healthy: np.ndarray | None
    unhealthy: np.ndarray | None
    growth: np.ndarray | None
    tissue: np.ndarray | None
    warnings: tuple[str, ...]

    def frame(self, multiple: int) -> Frame:
        """The way from this file's voxel order to the model's grid and back."""
        return Frame.of(self.source.affine, self.source.shape, multiple)


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
        found, refused = _cases_of(folder, conditioning)
        cases += found
        exclusions += refused
    if not cases:
        present = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        raise InputError(f"looked for */<ID>-mask*.nii.gz, found 0 cases; present: {present}", where=root,
                         fix="see the README's table of layouts")  # fmt: skip
    return cases, exclusions


def load_case(case: Case) -> CaseData:
    """Read and check all files of a case.

    Raises:
        InputError: a file is refused, or the files contradict each other.
    """
    source = read_image(case.t1n_voided or case.t1n)
    mask = read_mask(case.mask, source)
    warnings = list(source.warnings)
    voided, under = source.voxels.copy(), int(np.count_nonzero(source.voxels[mask]))
    voided[mask] = 0
    if case.t1n_voided and under:
        warnings.append(f"{under} of {int(mask.sum())} voxels under the mask were not void; voided here")
    if not np.any(voided):
        raise InputError("no image is left outside the mask", where=case.mask, fix="check the mask")
    target = _read_target(case, source, mask, warnings)
    parts = {role: _optional_mask(path, source) for role, path in
             (("healthy", case.mask_healthy), ("unhealthy", case.mask_unhealthy))}  # fmt: skip
    _check_parts(case, mask, parts, warnings)
    growth = read_unit_map(case.growth, source) if case.growth else None
    tissue = read_labels(case.tissue, source, TISSUE_LABELS) if case.tissue else None
    warnings += [f"no {kind} map" for kind, found in (("growth", growth), ("tissue", tissue)) if found is None]
    if (lowest := float(voided.min())) < 0:
        warnings.append(f"{int((voided < 0).sum())} negative voxels, down to {lowest:g}; read as 0")
    return CaseData(case, source, voided, mask, intensity_scale(voided, mask), target, parts["healthy"],
                    parts["unhealthy"], growth, tissue, tuple(warnings))  # fmt: skip


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

    def told(value: object) -> object:
        if not isinstance(value, Path):
            return value
        absolute = value.resolve()
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)

    rows = [{k: told(v) for k, v in asdict(case).items()} for case in cases]
    path.write_text(json.dumps({"split": split, "cases": rows}, indent=1) + "\n")


def read_cohort(path: Path, root: Path) -> tuple[list[Case], list[Case]]:
    """Training cases and validation cases of a run, from what `write_cohort` wrote."""
    content = json.loads(path.read_text())
    plain = {"id", "patient", "index"}
    cases = [
        Case(**{k: v if k in plain or v is None else root / v for k, v in row.items()}) for row in content["cases"]
    ]
    chosen = content["split"]
    return tuple([c for c in cases if c.patient in set(chosen[side])] for side in ("train", "validation"))


def _conditioning_folder(root: Path, given: str | Path) -> Path | None:
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InputError("no such folder", where=folder, fix="leave CONDITIONING_DIR empty if there are no maps")
        return folder
    return next((p for p in (root / "conditioning_data", root.parent / "conditioning_data") if p.is_dir()), None)


def _cases_of(folder: Path, conditioning: Path | None) -> tuple[list[Case], list[Exclusion]]:
    try:
        identity = safe_name(folder.name)
    except ValueError as error:
        return [], [Exclusion(repr(folder.name), f"folder name is not a patient id: {error}")]
    names = {p.name for p in folder.iterdir()}
    indices = sorted(m.group(0) for n in names if n.startswith(f"{identity}-mask-0") and (m := _MASK_INDEX.search(n)))
    endings = indices or ([".nii.gz"] if f"{identity}-mask.nii.gz" in names else [])
    if not endings:
        return [], [] if folder.name == "conditioning_data" else [Exclusion(identity, "no mask file")]
    cases, exclusions = [], []
    for ending in endings:
        found = {role.replace("-", "_"): _existing(folder / f"{identity}-{role}{ending}") for role in IMAGE_ROLES[1:]}
        found["t1n"] = _existing(folder / f"{identity}-t1n.nii.gz")
        maps = {
            k: conditioning and _existing(conditioning / v / f"{identity}.nii.gz")
            for k, v in CONDITIONING_FOLDERS.items()
        }
        match = _TIME_POINT.fullmatch(identity)
        case = Case(
            id=identity,
            patient=match.group(1) if match else identity,
            index=ending[1:5] if indices else "",
            **found,
            **maps,
        )
        if case.t1n or case.t1n_voided:
            cases.append(case)
        else:
            exclusions.append(Exclusion(case.key, "neither t1n nor t1n-voided beside its mask"))
    return cases, exclusions


def _existing(path: Path) -> Path | None:
    return path if path.exists() or path.is_symlink() else None


def _optional_mask(path: Path | None, like: Volume) -> np.ndarray | None:
    return read_mask(path, like, allow_empty=True) if path else None


def _read_target(case: Case, source: Volume, mask: np.ndarray, warnings: list[str]) -> np.ndarray | None:
    if case.t1n is None:
        return None
    target = source if case.t1n_voided is None else read_image(case.t1n)
    require_same_grid(target, source)
    changed = int(np.count_nonzero((target.voxels != source.voxels) & ~mask))
    if changed:
        warnings.append(f"{changed} voxels outside the mask differ between t1n and t1n-voided")
    return target.voxels


def _check_parts(case: Case, mask: np.ndarray, parts: dict[str, np.ndarray | None], warnings: list[str]) -> None:
    healthy, unhealthy = parts["healthy"], parts["unhealthy"]
    if healthy is not None and (outside := int((healthy & ~mask).sum())):
        raise InputError(f"{outside} voxels of mask-healthy lie outside the mask", where=case.mask_healthy,
                         fix="make the masks of one case together")  # fmt: skip
    if healthy is None or unhealthy is None:
        return
    if both := int((healthy & unhealthy).sum()):
        raise InputError(f"{both} voxels are both healthy and unhealthy", where=case.mask_healthy,
                         fix="make the masks of one case together")  # fmt: skip
    if wrong := int((mask != (healthy | unhealthy)).sum()):
        warnings.append(f"mask differs from healthy + unhealthy in {wrong} voxels")
