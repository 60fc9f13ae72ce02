"""Convert a case to the grid of a network and back, and its maps to the conditioning tensor.

    file's grid (x y z) => same axes and centre, the model's voxel size (x y z) => LPS, padded, normalised
                        => results: the file's grid again, under the mask only

Resampling never reads voxels under the mask, and never replaces voxels outside it.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.tissue import one_hot
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD, threshold_growth
from ldm_lib.data.case import CaseData
from ldm_lib.errors import InputError
from ldm_lib.geometry import block_centre, block_mean, blur_for, latent_mask
from ldm_lib.images.volume import normalise

CONDITIONING_CHANNELS = ("growth", "CSF", "GM", "WM")
SAME_SPACING = 0.01  # relative difference of voxel sizes that is ignored: 2 mm over a head
LEAST_WEIGHT = 1e-3  # weight of voxels in a mean below which they are left out


@dataclass(frozen=True)
class Resampling:
    """Map a source grid to a target grid with the same axes and the same centre."""

    source_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of the target grid
    step: tuple[float, ...]  # source voxels per target voxel, along each axis

    @classmethod
    def of(cls, shape: tuple[int, ...], spacing_mm: tuple[float, ...], target_mm: float) -> "Resampling":
        """Make the resampling to isotropic voxels of another size; the target grid covers the source."""
        step = tuple(target_mm / s for s in spacing_mm)
        return cls(shape, tuple(max(2, math.ceil(n / k - 1e-6)) for n, k in zip(shape, step, strict=True)), step)

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """Return the (4, 4) affine of the target grid, given that of the source."""
        matrix = np.diag([*self.step, 1.0])
        matrix[:3, 3] = self._offset
        return affine @ matrix

    @property
    def _offset(self) -> np.ndarray:
        """Source voxel index, with fraction, of the first target voxel."""
        source, target = ((np.array(shape) - 1) / 2 for shape in (self.source_shape, self.shape))
        return source - np.array(self.step) * target

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Resample a mask (x, y, z): True where a target voxel covers or interpolates any masked source voxel."""
        reach = [2 * math.floor(step / 2) + 1 if step > 1 else 1 for step in self.step]
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
        positions = (voxels - self._offset) / np.array(self.step)
        return ndimage.map_coordinates(volume, positions.T, order=3, mode="nearest", output=np.float32)

    def _sampled(self, array: np.ndarray) -> np.ndarray:
        options = {"output_shape": self.shape, "order": 1, "mode": "nearest"}
        return ndimage.affine_transform(array, np.array(self.step), offset=self._offset, **options)


def resampling_to(data: CaseData, spacing_mm: float) -> Resampling | None:
    """Return how to resample a case to isotropic voxels of a size; None if it has that size already."""
    if all(abs(s / spacing_mm - 1) < SAME_SPACING for s in data.source.spacing_mm):
        return None
    return Resampling.of(data.source.shape, data.source.spacing_mm, spacing_mm)


def require_spacing(data: CaseData, spacing_mm: float) -> None:
    """Check that a training case has the voxel size of the model: only inference resamples.

    Raises:
        InputError: another voxel size.
    """
    if resampling_to(data, spacing_mm):
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


@dataclass(frozen=True)
class GridCase:
    """Hold one case on the model's padded LPS grid; every array is (x, y, z)."""

    voided: np.ndarray  # float32, normalised, 0 under the mask
    target: np.ndarray | None  # float32, normalised full image
    mask: np.ndarray  # bool, True = voxels to inpaint
    unknown: np.ndarray  # bool, voxels that are excluded from the loss: unhealthy ones without a growth map
    growth: np.ndarray  # float32 in [0, 1]; zero (healthy) when missing
    tissue: np.ndarray  # uint8 labels 0..3; zero (unlabelled) when missing


def grid_case(data: CaseData, multiple: int) -> GridCase:
    """Normalise a case and reorder and pad it to the grid of a network that divides each axis by `multiple`."""
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
    channels = np.concatenate([threshold_growth(growth, threshold)[None], one_hot(tissue)])
    pool = {"area": block_mean, "nearest": block_centre}[pooling]
    return pool(channels, factor).astype(np.float32)


def loss_mask(case: GridCase, factor: int, dilation: int) -> np.ndarray:
    """Return the latent voxels (x/f, y/f, z/f) bool that enter the loss: inpainted, and not `unknown`."""
    return latent_mask(case.mask, factor, dilation) & ~latent_mask(case.unknown, factor, 0)
