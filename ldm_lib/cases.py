"""One case: where its files are, and everything read from them through the gate."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import Frame
from ldm_lib.nifti import stem
from ldm_lib.volumes import (
    Volume,
    intensity_scale,
    read_image,
    read_labels,
    read_mask,
    read_unit_map,
    require_same_grid,
)

TISSUE_LABELS = (0, 1, 2, 3)
LARGEST_BRAIN_L = 2.5  # with its CSF; real ones measured 1.2 and 1.6, heads with skull and neck have 4 and more


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

    def lps(self, array: np.ndarray) -> np.ndarray:
        """An array of this case as figures show it: (x, y, z) in LPS order."""
        return self.frame(1).to_lps(array)

    def paste(self, volume: np.ndarray, multiple: int) -> np.ndarray:
        """A normalised volume on the model's grid -> the voided image with its hole filled, source units, from 0 up."""
        voxels = np.maximum(self.frame(multiple).to_file(volume), 0) * self.scale
        return np.where(self.mask, voxels, self.voided).astype(np.float32)

    @property
    def scored(self) -> np.ndarray:
        """The voxels that are scored: mask-healthy, or the whole mask when there is none."""
        return self.mask if self.healthy is None else self.healthy

    @property
    def lateral_axis(self) -> int:
        """The file's axis that runs between left and right."""
        return next(axis for axis, code in enumerate(self.source.orientation) if code in "LR")

    @property
    def lps_spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the axes of `lps`."""
        return self.frame(1).turn_spacing(self.source.spacing_mm)


def case_of_files(
    t1n_voided: str | Path, mask: str | Path, *, growth: str | Path | None = None, tissue: str | Path | None = None
) -> Case:
    """A case made of named files, its id taken from the image's name as the layouts write it."""
    identity, _, index = stem(Path(t1n_voided)).partition("-t1n-voided")
    return Case(
        id=identity, patient=identity, index=index.lstrip("-"), t1n=None, t1n_voided=Path(t1n_voided), mask=Path(mask),
        mask_healthy=None, mask_unhealthy=None, growth=growth and Path(growth), tissue=tissue and Path(tissue),
    )  # fmt: skip


def load_case(case: Case) -> CaseData:
    """Read and check all files of a case.

    Raises:
        InputError: a file is refused, or the files contradict each other.
    """
    source = read_image(case.t1n_voided or case.t1n)
    warnings = list(source.warnings)
    mask = read_mask(case.mask, source, warnings=warnings)
    voided, under = source.voxels.copy(), int(np.count_nonzero(source.voxels[mask]))
    voided[mask] = 0
    if case.t1n_voided and under:
        warnings.append(f"{under} of {int(mask.sum())} voxels under the mask were not void; voided here")
    scale = intensity_scale(voided, mask, where=source.path)
    target = _read_target(case, source, mask, warnings)
    healthy, unhealthy = (
        read_mask(path, source, allow_empty=empty, warnings=warnings) if path else None
        for path, empty in ((case.mask_healthy, False), (case.mask_unhealthy, True))
    )
    _check_parts(case, mask, healthy, unhealthy, warnings)
    growth = read_unit_map(case.growth, source, warnings=warnings) if case.growth else None
    tissue = read_labels(case.tissue, source, TISSUE_LABELS, warnings=warnings) if case.tissue else None
    warnings += [f"no {kind} map" for kind, found in (("growth", growth), ("tissue", tissue)) if found is None]
    litres = float(np.count_nonzero(voided) * np.prod(source.spacing_mm)) / 1e6
    if litres > LARGEST_BRAIN_L:
        warnings.append(f"{litres:.1f} litres are not 0, more than a brain: not skull-stripped, out of training domain")
    if (lowest := float(voided.min())) < 0:
        warnings.append(f"{int((voided < 0).sum())} negative voxels, down to {lowest:g}; read as 0")
    return CaseData(
        case, source, voided, mask, scale, target, healthy, unhealthy, growth, tissue, tuple(warnings)
    )  # fmt: skip


def _read_target(case: Case, source: Volume, mask: np.ndarray, warnings: list[str]) -> np.ndarray | None:
    if case.t1n is None:
        return None
    if case.t1n_voided is None:
        return source.voxels
    target = read_image(case.t1n)
    require_same_grid(target, source)
    warnings += target.named_warnings
    changed = int(np.count_nonzero((target.voxels != source.voxels) & ~mask))
    if changed:
        warnings.append(f"{changed} voxels outside the mask differ between t1n and t1n-voided")
    return target.voxels


def _check_parts(
    case: Case, mask: np.ndarray, healthy: np.ndarray | None, unhealthy: np.ndarray | None, warnings: list[str]
) -> None:
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
