"""Convert a case to the grid of a network and back, and its maps to the conditioning tensor.

    file's grid (x y z) => the model's voxel size, axes of the world if oblique (x y z) => LPS, padded, normalised
                        => results: the file's grid again, under the mask only

Resampling never reads voxels under the mask, and never replaces voxels outside it.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.tissue import TISSUES, WM
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD, threshold_growth
from ldm_lib.data.case import CaseData
from ldm_lib.errors import InputError
from ldm_lib.geometry import block_centre, block_mean, blur_for, latent_mask, nearest_rotation, oblique_degrees
from ldm_lib.images.bias_field import bias_field
from ldm_lib.images.volume import intensity_scale, normalise

CONDITIONING_CHANNELS = ("growth", "CSF", "GM", "WM")
SAME_SPACING = 0.01  # relative difference of voxel sizes that is ignored: 2 mm over a head
LARGEST_TILT_DEGREES = 15.0  # of a grid that is treated as if it lay along the axes of the world
AROUND_MM = 8.0  # of air around the head in the grid of a scan that was oblique
LEAST_WEIGHT = 1e-3  # weight of voxels in a mean below which they are left out


@dataclass(frozen=True)
class Resampling:
    """Map a source grid to a target grid of isotropic voxels."""

    source_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of the target grid
    step: tuple[float, ...]  # source voxels per target voxel, along each axis of the source
    rotation: np.ndarray | None = None  # (3, 3) from the target's axes to the source's; None keeps the axes
    centre: tuple[float, ...] | None = None  # of the target grid, source voxels; None is the centre of the source

    @classmethod
    def of(cls, shape: tuple[int, ...], spacing_mm: tuple[float, ...], target_mm: float) -> "Resampling":
        """Make the resampling to isotropic voxels of another size; the target grid covers the source."""
        step = tuple(target_mm / s for s in spacing_mm)
        return cls(shape, tuple(max(2, math.ceil(n / k - 1e-6)) for n, k in zip(shape, step, strict=True)), step)

    @classmethod
    def to_axes(cls, affine: np.ndarray, needed: np.ndarray, target_mm: float) -> "Resampling":
        """Make the resampling of an oblique grid to isotropic voxels along the nearest axes of the world.

        Args:
            affine: (4, 4) of the source.
            needed: (x, y, z) bool, source voxels that the target grid covers, with `AROUND_MM` more on every side.
        """
        rotation, spacing_mm = nearest_rotation(affine), np.linalg.norm(affine[:3, :3], axis=0)
        turned = (np.argwhere(needed) * spacing_mm) @ rotation
        low, high = turned.min(axis=0) - AROUND_MM, turned.max(axis=0) + AROUND_MM
        shape = tuple(math.ceil(extent / target_mm) + 1 for extent in high - low)
        centre = tuple((rotation @ ((low + high) / 2) / spacing_mm).tolist())
        return cls(needed.shape, shape, tuple((target_mm / spacing_mm).tolist()), rotation, centre)

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """Return the (4, 4) affine of the target grid, given that of the source."""
        matrix = np.eye(4)
        matrix[:3, :3] = self._matrix
        matrix[:3, 3] = self._offset
        return affine @ matrix

    @cached_property
    def _matrix(self) -> np.ndarray:
        """Return the (3, 3) matrix from target voxels to source voxels."""
        return np.diag(self.step) @ (np.eye(3) if self.rotation is None else self.rotation)

    @cached_property
    def _offset(self) -> np.ndarray:
        """Return the source voxel index, with fraction, of the first target voxel."""
        source, target = ((np.array(shape) - 1) / 2 for shape in (self.source_shape, self.shape))
        return (source if self.centre is None else np.array(self.centre)) - self._matrix @ target

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Resample a mask (x, y, z): True where a target voxel covers or interpolates any masked source voxel."""
        extent = np.abs(self._matrix).sum(axis=1)  # of a target voxel along the source's axes
        reach = [2 * math.floor(step / 2) + 1 if step > 1 else 1 for step in extent]
        return self._sampled(ndimage.maximum_filter(mask, reach).astype(np.float32)) > LEAST_WEIGHT

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Resample labels (x, y, z) uint8: the label that covers most of each target voxel."""
        everywhere, found = np.ones(labels.shape, bool), np.unique(labels)
        return found[np.argmax([self.image(labels == label, everywhere) for label in found], axis=0)]

    def image(self, image: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Resample an image (x, y, z): float32 mean of the known source voxels in each target voxel, 0 without any."""
        sigma = blur_for(self.step)
        weight = known.astype(np.float32)
        parts = (self._sampled(ndimage.gaussian_filter(part, sigma)) for part in (image * weight, weight))
        value, weight = parts
        return np.divide(value, weight, out=np.zeros_like(value), where=weight > LEAST_WEIGHT)

    def back(self, volume: np.ndarray, voxels: np.ndarray) -> np.ndarray:
        """Interpolate a volume (x, y, z) on the target grid at source voxels, (n, 3) indices, by cubic splines."""
        offset = voxels - self._offset
        positions = offset / np.array(self.step) if self.rotation is None else offset @ np.linalg.inv(self._matrix).T
        return ndimage.map_coordinates(volume, positions.T, order=3, mode="nearest", output=np.float32)

    def _sampled(self, array: np.ndarray) -> np.ndarray:
        options = {"output_shape": self.shape, "offset": self._offset, "order": 1}
        if self.rotation is None:
            return ndimage.affine_transform(array, np.array(self.step), mode="nearest", **options)
        return ndimage.affine_transform(array, self._matrix, mode="constant", **options)  # corners lie outside the scan


def _has_spacing(data: CaseData, spacing_mm: float) -> bool:
    return all(abs(s / spacing_mm - 1) < SAME_SPACING for s in data.source.spacing_mm)


def is_oblique(data: CaseData) -> bool:
    """Return whether the grid of a case is rotated too far to be treated as if it lay along the axes of the world."""
    return oblique_degrees(data.affine) > LARGEST_TILT_DEGREES


def resampling_to(data: CaseData, spacing_mm: float) -> Resampling | None:
    """Return how to resample a case to isotropic voxels of a size; None if it has that size and is not oblique."""
    if is_oblique(data):
        return Resampling.to_axes(data.affine, (data.voided != 0) | data.mask, spacing_mm)
    if _has_spacing(data, spacing_mm):
        return None
    return Resampling.of(data.source.shape, data.source.spacing_mm, spacing_mm)


def require_spacing(data: CaseData, spacing_mm: float) -> None:
    """Check that a training case has the voxel size of the model: only inference resamples.

    Raises:
        InputError: another voxel size.
    """
    if not _has_spacing(data, spacing_mm):
        voxels = "x".join(f"{mm:g}" for mm in data.source.spacing_mm)
        raise InputError(f"has voxels of {voxels} mm, the autoencoder was trained at {spacing_mm:g} mm",
                         where=data.case.key, fix="train an autoencoder on these cases (pretrained=false, "
                         f"autoencoder_dir=), or give cases of {spacing_mm:g} mm")  # fmt: skip


def resample_case(data: CaseData, resampling: Resampling | None) -> CaseData:
    """Resample what a model needs of a case to inpaint it: image, mask and maps; None returns the case itself."""
    if resampling is None:
        return data
    mask, known = resampling.mask(data.mask), ~data.mask
    voided = np.where(mask, 0, resampling.image(data.voided, known)).astype(np.float32)
    source = replace(data.source, raw=voided, affine=resampling.affine(data.affine), slope=1.0, intercept=0.0)
    everywhere = np.ones(data.mask.shape, bool)
    return replace(
        data, source=source, voided=voided, mask=mask, target=None, healthy=None, unhealthy=None,
        growth=None if data.growth is None else resampling.image(data.growth, everywhere),
        tissue=None if data.tissue is None else resampling.labels(data.tissue),
    )  # fmt: skip


def without_bias_field(data: CaseData) -> tuple[CaseData, np.ndarray]:
    """Divide a case by the bias field of its visible white matter.

    White matter is that of the tissue map; of a case without one it is what is brighter than the median.

    Returns:
        The case, and the field, (x, y, z) in the file's order.
    """
    frame, hidden = data.frame(1), data.mask if data.unhealthy is None else data.mask | data.unhealthy
    visible = (data.voided > 0) & ~hidden
    if not visible.any():
        return data, np.ones(data.mask.shape, np.float32)
    white = data.voided > np.median(data.voided[visible]) if data.tissue is None else data.tissue == WM
    # in LPS order, as sums over the same voxels are rounded differently in another one
    image, white = frame.to_lps(data.voided), frame.to_lps(white & visible)
    field = frame.to_file(bias_field(image, white, spacing_mm=data.lps_spacing_mm))
    voided, target = data.voided / field, None if data.target is None else data.target / field
    return replace(data, voided=voided, target=target, scale=intensity_scale(voided, data.mask)), field


@dataclass(frozen=True)
class GridCase:
    """Hold one case on the model's padded LPS grid; every array is (x, y, z)."""

    voided: np.ndarray  # float32, normalised, 0 under the mask
    target: np.ndarray | None  # float32, normalised full image
    mask: np.ndarray  # bool, True = voxels to inpaint
    unknown: np.ndarray  # bool, voxels that are excluded from the loss: unhealthy ones without a growth map
    growth: np.ndarray  # float32 in [0, 1]; zero (healthy) when missing
    tissue: np.ndarray  # uint8 labels 0..3; zero (unlabelled) when missing


def grid_case(data: CaseData, multiple: int, *, bias_field_correction: bool = False) -> GridCase:
    """Normalise a case and reorder and pad it to the grid of a network that divides each axis by `multiple`."""
    if bias_field_correction:
        data, _ = without_bias_field(data)
    to_model = data.frame(multiple).to_model
    nothing = np.zeros(data.mask.shape, bool)
    without_growth = data.growth is None and data.unhealthy is not None
    return GridCase(
        voided=to_model(normalise(data.voided, data.scale)),
        target=None if data.target is None else to_model(normalise(data.target, data.scale)),
        mask=to_model(data.mask),
        unknown=to_model(data.unhealthy if without_growth else nothing),
        growth=to_model(nothing.astype(np.float32) if data.growth is None else data.growth),
        tissue=to_model(nothing.astype(np.uint8) if data.tissue is None else data.tissue),
    )


def conditioning(
    growth: np.ndarray, tissue: np.ndarray, *, factor: int, threshold: float = GROWTH_THRESHOLD, pooling: str = "area"
) -> np.ndarray:
    """Return growth (x, y, z) in [0, 1] and one-hot tissue, of labels (x, y, z), as float32 (4, x/f, y/f, z/f).

    Args:
        factor: voxels per latent voxel and axis.
        threshold: concentrations below it become 0, the others are kept.
        pooling: "area" is the mean over a latent voxel (for a label: its fraction), "nearest" the voxel at its centre.
    """
    channels = threshold_growth(growth, threshold), *(tissue == label for label in TISSUES)
    pool = {"area": block_mean, "nearest": block_centre}[pooling]
    return np.stack([pool(channel, factor) for channel in channels]).astype(np.float32)


def loss_mask(case: GridCase, factor: int, dilation: int) -> np.ndarray:
    """Return the latent voxels (x/f, y/f, z/f) bool that enter the loss: inpainted, and not `unknown`."""
    return latent_mask(case.mask, factor, dilation) & ~latent_mask(case.unknown, factor, 0)
