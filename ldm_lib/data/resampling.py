"""Another voxel size than the model's: a case brought to the model's, and what was filled there brought back.

    native grid (x y z) => the same directions and middle, the model's voxels (x y z) => native grid, in the hole only

What a voxel under the mask holds is never read, and no voxel outside it is ever replaced: only the hole comes back.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ldm_lib.data.case import CaseData

ALIKE = 0.01  # voxel sizes that differ by less are taken for the same: 2 mm over a head
LEAST_WEIGHT = 1e-3  # of voxels in a mean, below which they are not in it


@dataclass(frozen=True)
class Resampling:
    """From one grid to another with the same directions and the same middle.

    Attributes:
        here: voxels of the grid here.
        shape: voxels of the grid there.
        step: voxels here to one voxel there, along each axis.
    """

    here: tuple[int, ...]
    shape: tuple[int, ...]
    step: tuple[float, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], spacing_mm: tuple[float, ...], wanted_mm: float) -> "Resampling":
        """The way to isotropic voxels of another size; the grid there covers the one here."""
        step = tuple(wanted_mm / s for s in spacing_mm)
        return cls(shape, tuple(max(2, math.ceil(n / k - 1e-6)) for n, k in zip(shape, step, strict=True)), step)

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """(4, 4) of the grid here -> of the grid there."""
        matrix = np.diag([*self.step, 1.0])
        matrix[:3, 3] = self._offset
        return affine @ matrix

    @property
    def _offset(self) -> np.ndarray:
        """The voxel here, whole or not, at the first voxel there."""
        here, there = ((np.array(shape) - 1) / 2 for shape in (self.here, self.shape))
        return here - np.array(self.step) * there

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(x, y, z) bool -> True wherever a voxel there covers, or is interpolated from, any masked voxel here."""
        reach = [2 * math.floor(step / 2) + 1 if step > 1 else 1 for step in self.step]
        return self._sampled(ndimage.maximum_filter(mask, reach).astype(np.float32)) > LEAST_WEIGHT

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """(x, y, z) uint8 -> the label that covers most of each voxel there."""
        everywhere, found = np.ones(labels.shape, bool), np.unique(labels)
        return found[np.argmax([self.image(labels == label, everywhere) for label in found], axis=0)]

    def image(self, image: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(x, y, z) -> the mean of the known voxels here that a voxel there covers, float32; 0 where there are none.

        Coarser voxels see through a wider point spread: a Gaussian of the standard deviation by which theirs is wider
        than ours (Cardoso et al., MICCAI 2015, section 2).
        """
        sigma = [math.sqrt(max(step**2 - 1, 0) / (8 * math.log(2))) for step in self.step]
        weight = known.astype(np.float32)
        parts = (self._sampled(ndimage.gaussian_filter(part, sigma)) for part in (image * weight, weight))
        value, weight = parts
        return np.divide(value, weight, out=np.zeros_like(value), where=weight > LEAST_WEIGHT)

    def back(self, volume: np.ndarray, voxels: np.ndarray) -> np.ndarray:
        """The values of a volume there (x, y, z) at some voxels here, by cubic splines.

        Args:
            voxels: (n, 3) indices.
        """
        there = (voxels - self._offset) / np.array(self.step)
        return ndimage.map_coordinates(volume, there.T, order=3, mode="nearest", output=np.float32)

    def _sampled(self, array: np.ndarray) -> np.ndarray:
        how = {"output_shape": self.shape, "order": 1, "mode": "nearest"}
        return ndimage.affine_transform(array, np.array(self.step), offset=self._offset, **how)


def resampling(data: CaseData, spacing_mm: float) -> Resampling | None:
    """How a case comes to a model of this voxel size; None where it has it already."""
    if all(abs(s / spacing_mm - 1) < ALIKE for s in data.source.spacing_mm):
        return None
    return Resampling.of(data.source.shape, data.source.spacing_mm, spacing_mm)


def resampled(data: CaseData, way: Resampling | None) -> CaseData:
    """The case as far as a model needs it to fill the hole, on the grid there; as it is where there is no way to go."""
    if way is None:
        return data
    hole, known = way.mask(data.mask), ~data.mask
    voided = np.where(hole, 0, way.image(data.voided, known)).astype(np.float32)
    source = replace(data.source, raw=voided, affine=way.affine(data.source.affine), slope=1.0, intercept=0.0)
    everywhere = np.ones(data.mask.shape, bool)
    return replace(
        data, source=source, voided=voided, mask=hole, target=None, healthy=None, unhealthy=None,
        growth=None if data.growth is None else way.image(data.growth, everywhere),
        tissue=None if data.tissue is None else way.labels(data.tissue),
    )  # fmt: skip
