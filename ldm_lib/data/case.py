"""Describe one case: where its files are, and the checked content of these files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import EllipsisType

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.files import expand_path, sha256
from ldm_lib.geometry import Frame
from ldm_lib.images import masks
from ldm_lib.images.brain_masks import read_brain, require_stripped
from ldm_lib.images.grid import on_grid_of
from ldm_lib.images.image_files import require_file, stem
from ldm_lib.images.masked_scan import from_darkest, read_masked_scan, void_under
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.void import require_void_covered
from ldm_lib.images.volume import (
    SPIKE,
    Volume,
    image_warnings,
    intensity_scale,
    read_image,
    without_spikes,
)

TISSUE_LABELS = (0, 1, 2, 3)
GivenMap = np.ndarray | EllipsisType | None  # the ellipsis: not named


@dataclass(frozen=True)
class Case:
    """Name the files of one scan and one mask, before they are read; `load_case` reads them into a `CaseData`.

    A path is None where there is no such file. `digests` are role -> sha256 of files that must not change any more.
    """

    id: str
    patient: str
    index: str  # "0000", "0001", ... in the training layout, "" in the challenge layout
    t1n: Path | None
    t1n_voided: Path | None
    mask: Path
    mask_healthy: Path | None
    mask_unhealthy: Path | None
    growth: Path | None
    tissue: Path | None
    read_options: ReadOptions = READ_STRICTLY
    brain_mask: Path | None = None  # of a whole head
    notes: tuple[str, ...] = ()  # what is odd about the files' names and places
    digests: Mapping[str, str] = field(default_factory=dict, compare=False)
    dilate: int = 0  # voxels by which the mask grows when it is read
    derivative: str = ""  # path of the result in a BIDS derivative data set

    @property
    def key(self) -> str:
        """Unique name of the case in tables, file names and caches."""
        return f"{self.id}-{self.index}" if self.index else self.id

    @property
    def result_name(self) -> str:
        """The challenge's file name of a result, with the mask's number where there are several, or BIDS's."""
        return self.derivative or f"{self.id}-t1n-inference{'-' + self.index if self.index else ''}.nii.gz"

    def files(self) -> dict[str, Path]:
        """Return role -> path of every file that the case has."""
        return {f.name: path for f in fields(self) if isinstance(path := getattr(self, f.name), Path)}

    @property
    def folders(self) -> set[Path]:
        """The data folder and that of the maps, from which messages name files."""
        return {path.parent.parent for path in self.files().values()}

    def to_inpaint(self) -> "Case":
        """Return the case with the files that inpainting needs: without ground truth and parts of the mask."""
        return replace(self, t1n=None, mask_healthy=None, mask_unhealthy=None) if self.t1n_voided else self

    def with_digests(self) -> "Case":
        """Return the case with a digest of each file; `load_case` rejects a file that has changed since."""
        for path in self.files().values():
            require_file(path)
        digests = {role: self.digests.get(role) or sha256(path) for role, path in self.files().items()}
        return replace(self, digests=digests)

    def with_maps(self, **maps: Path | None) -> "Case":
        """Return the case with other files of conditioning maps, by kind; None removes one."""
        return replace(self, **maps, digests={role: d for role, d in self.digests.items() if role not in maps})

    def require_unchanged(self) -> None:
        """Raise InputError if a file differs from its digest."""
        for role, path in self.files().items():
            was = self.digests.get(role)
            if was and path.is_file() and (now := sha256(path)) != was:  # a missing file is rejected when it is read
                raise InputError(f"changed since it was checked (sha256 {was[:12]}, now {now[:12]})", where=path,
                                 fix="put it back, or run 01_data_audit again")  # fmt: skip


@dataclass(frozen=True)
class CaseData:
    """Hold the arrays of one scan and one mask in memory, read and checked by `load_case` from the files of a `Case`.

    Every array is (x, y, z) in the file's voxel order; images are in source units.

    Attributes:
        source: the voided file (or the full image, if there is no voided one), with all that is not brain.
        voided: float32, 0 under the mask and, with a brain mask, outside the brain.
        mask: bool, True = voxels to inpaint, all of them in the brain mask, if there is one.
        scale: intensity divisor of this case.
        brain: bool, of a whole head, given or made; None of a scan that is skull-stripped.
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
    brain: np.ndarray | None = None

    def __repr__(self) -> str:
        mask_ml = float(self.mask.sum() * np.prod(self.source.spacing_mm)) / 1000
        maps = (f"{kind} {'no' if getattr(self, kind) is None else 'yes'}" for kind in ("growth", "tissue"))
        return f"CaseData({self.key!r}, {self.source.grid}, mask {mask_ml:.1f} mL, {', '.join(maps)})"

    @property
    def key(self) -> str:
        """Unique name of the case, as of `Case`."""
        return self.case.key

    @property
    def id(self) -> str:
        """Name of the scan, as of `Case`."""
        return self.case.id

    @property
    def patient(self) -> str:
        """Name of the patient, as of `Case`."""
        return self.case.patient

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel indices to millimetres, RAS+ world."""
        return self.source.affine

    def with_maps(self, *, growth: GivenMap = ..., tissue: GivenMap = ...) -> "CaseData":
        """Return the case with other conditioning maps on its grid; a map that is not named stays.

        Args:
            growth, tissue: (x, y, z), values as of the attributes; None removes the map.

        Raises:
            InputError: a map of another shape, or with other values.
        """
        maps = {kind: given for kind, given in (("growth", growth), ("tissue", tissue)) if given is not ...}
        for kind, given in maps.items():
            if given is None:
                continue
            given = np.asarray(given)
            where = f"{kind} map of {self.case.key}"
            if given.shape != self.mask.shape:
                raise InputError(f"shape {given.shape}, but the case has {self.mask.shape}", where=where,
                                 fix="resample it to the case's grid")  # fmt: skip
            if kind == "growth":
                maps[kind] = masks.require_concentration(given, where).astype(np.float32)
            else:
                maps[kind] = masks.require_labels(given, TISSUE_LABELS, where).astype(np.uint8)
        return replace(self, **maps)

    @cached_property
    def mask_digest(self) -> str:
        """Return a digest of the mask in LPS order, which names the noise, whatever the file is called."""
        return hashlib.sha256(np.ascontiguousarray(self.lps(self.mask))).hexdigest()[:16]

    def frame(self, multiple: int) -> Frame:
        """Return the transform from this file's voxel order to the model's grid and back."""
        return Frame.of(self.source.affine, self.source.shape, multiple)

    def lps(self, array: np.ndarray) -> np.ndarray:
        """Reorder an array (x, y, z) of this case to LPS axes, as figures show it."""
        return self.frame(1).to_lps(array)

    def paste(self, volume: np.ndarray, multiple: int) -> np.ndarray:
        """Paste a normalised volume on the model's grid into the voided image: source units, from 0 up."""
        voxels = np.maximum(self.frame(multiple).to_file(volume), 0) * self.scale
        return np.where(self.mask, voxels, self.voided).astype(np.float32)

    @property
    def scored(self) -> np.ndarray:
        """Voxels that are scored: mask-healthy, or the whole mask if there is none."""
        return self.mask if self.healthy is None else self.healthy

    @property
    def lps_spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the axes of `lps`."""
        return self.frame(1).lps_spacing(self.source.spacing_mm)


def case_of_files(
    t1n_voided: str | Path,
    mask: str | Path,
    *,
    growth: str | Path | None = None,
    tissue: str | Path | None = None,
    brain_mask: str | Path | None = None,
    read_options: ReadOptions = READ_STRICTLY,
    dilate: int = 0,
) -> Case:
    """Make a case of single files; its id is taken from the image's name."""
    paths = (t1n_voided, mask, growth, tissue, brain_mask)
    t1n_voided, mask, growth, tissue, brain_mask = (path and expand_path(path) for path in paths)
    identity, _, index = stem(t1n_voided).partition("-t1n-voided")
    return Case(
        id=identity, patient=identity, index=index.lstrip("-"), t1n=None, t1n_voided=t1n_voided, mask=mask,
        mask_healthy=None, mask_unhealthy=None, growth=growth, tissue=tissue,
        brain_mask=brain_mask, read_options=read_options, dilate=dilate,
    )  # fmt: skip


def load_case(case: Case | CaseData) -> CaseData:
    """Read and check all files of a case; a case that is loaded is returned as it is.

    Raises:
        InputError: a file is rejected, or the files contradict each other.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.cohort import find_cases
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 1, spacing_mm=8, masks=1)
        ...     case = load_case(find_cases(f"{folder}/data")[0])
        >>> case.voided.shape, case.source.orientation, bool(case.voided[case.mask].any())
        ((30, 30, 20), 'LPS', False)
    """
    if isinstance(case, CaseData):
        return case
    if not isinstance(case, Case):
        given = f"needs a case, not {type(case).__name__}"
        raise InputError(given, where="load_case", fix="take one of find_cases(folder)")
    case.require_unchanged()
    warnings = list(case.notes)
    source, given = read_masked_scan(case.t1n_voided or case.t1n, case.mask, case.read_options, warnings)
    named = {"hidden": bool(case.t1n_voided), "scored": bool(case.t1n)}
    voided, mask = void_under(source, given, **named, warnings=warnings), masks.dilated(given, case.dilate)
    brain = None
    if case.brain_mask or case.read_options.skull_strip:
        brain, mask = read_brain(case.brain_mask, source, mask, case.read_options, warnings)
        voided[~brain] = 0
    voided[mask] = 0
    scale = intensity_scale(voided, mask, where=source.path)
    target = _read_target(case, source, given, warnings)
    parts = masks.read_parts(
        case.mask_healthy, case.mask_unhealthy, given, source, case.read_options, warnings=warnings
    )
    masks.require_in_brain(mask, voided, target, where=case.mask, warnings=warnings)
    if brain is None:
        require_stripped(voided, source, scale)
        require_void_covered(source, mask, where=case.mask, warnings=warnings)
    growth = masks.read_unit_map(case.growth, source, case.read_options, warnings=warnings) if case.growth else None
    tissue = None
    if case.tissue:
        tissue = masks.read_labels(case.tissue, source, TISSUE_LABELS, case.read_options, warnings=warnings)
    warnings += image_warnings(voided, source)
    voided, spikes = without_spikes(voided, scale)
    if target is not None:
        target = without_spikes(target if brain is None else np.where(brain, target, np.float32(0)), scale)[0]
    if spikes:
        warnings.append(f"{spikes} voxels above {SPIKE:g} times the 99.5th percentile ({scale:g}), up to "
                        f"{source.voxels.max():g}, replaced by the median of their neighbours")  # fmt: skip
    return CaseData(case, source, voided, mask, scale, target, *parts, growth, tissue, tuple(warnings), brain)


def _read_target(case: Case, source: Volume, mask: np.ndarray, warnings: list[str]) -> np.ndarray | None:
    if case.t1n is None:
        return None
    if case.t1n_voided is None:
        return source.voxels
    target = read_image(case.t1n, case.read_options)
    warnings += target.named_warnings
    target = from_darkest(on_grid_of(target, source, warnings), mask, [])
    if changed := int(np.count_nonzero((target.voxels != source.voxels) & ~mask)):
        warnings.append(f"{changed} voxels outside the mask differ between t1n and t1n-voided")
    return target.voxels
