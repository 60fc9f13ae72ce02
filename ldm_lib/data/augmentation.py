"""Augment a training case: random changes of image, masks, growth and tissue.

Flip and rotation apply one transform to every array and void the transformed image again, so that the mask's edge is
as sharp as in a file. Gain and gamma change both images in the same way. The tissue map alone is also deformed, and
parts of it are removed or relabelled, because a map made from a scan is never exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.tissue import TISSUES, smooth_field
from ldm_lib.data.model_grid import GridCase

LEFT_RIGHT = 0  # axis of the LPS grid
SMOOTHNESS_MM = 24.0  # distance between the nodes of the displacement field of a tissue map
PATCH_RADIUS_MM = (4.0, 12.0)  # of the balls that are removed from it or relabelled
MAX_PATCHES = 3  # largest number of balls that are removed, and of those that are relabelled


@dataclass(frozen=True)
class Augmentation:
    """Hold the range of random changes of a case, as in `AugmentationOptions`; all zeros change nothing."""

    flip_probability: float = 0.0
    rotation_degrees: float = 0.0
    intensity_shift: float = 0.0
    tissue_deformation_mm: float = 0.0

    def __call__(self, case: GridCase, rng: np.random.Generator, *, spacing_mm: float) -> GridCase:
        """Return a random version of a case that has a target."""
        flipped = rng.random() < self.flip_probability
        degrees = rng.uniform(-1, 1, 3) * self.rotation_degrees
        gain, gamma = 1 + rng.uniform(-1, 1, 2) * self.intensity_shift
        if flipped:
            case = flip(case)
        if np.any(degrees):
            case = rotate(case, degrees)
        if self.intensity_shift:
            case = change_intensity(case, gain=gain, gamma=gamma)
        if self.tissue_deformation_mm and case.tissue.any():
            limit = self.tissue_deformation_mm
            tissue = deform_labels(case.tissue, rng, spacing_mm=spacing_mm, max_displacement_mm=limit)
            case = replace(case, tissue=tissue)
        return case


def flip(case: GridCase) -> GridCase:
    """Mirror left and right; its own inverse."""
    return _map(case, lambda array, _: np.flip(array, LEFT_RIGHT))


def rotate(case: GridCase, degrees: np.ndarray) -> GridCase:
    """Rotate isotropic voxels about the grid's centre by angles (3,) about x, y, z.

    Images are interpolated linearly, labels and masks by nearest neighbour; outside the grid is air.
    """
    matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    centre = (np.array(case.mask.shape) - 1) / 2
    offset = centre - matrix @ centre

    def turn(array: np.ndarray, order: int) -> np.ndarray:
        turned = ndimage.affine_transform(array.astype(np.float32), matrix, offset, order=order, mode="grid-constant")
        return turned.astype(array.dtype) if array.dtype != bool else turned > 0.5

    return _map(case, turn)


def change_intensity(case: GridCase, *, gain: float, gamma: float) -> GridCase:
    """Apply gain * v^gamma to both images; air stays 0."""
    return replace(
        case,
        voided=(gain * case.voided**gamma).astype(np.float32),
        target=(gain * case.target**gamma).astype(np.float32),
    )


def _map(case: GridCase, change: Callable[[np.ndarray, int], np.ndarray]) -> GridCase:
    """Change every array of a case, and void the image; the number is the array's interpolation order."""
    linear = {name: change(getattr(case, name), 1) for name in ("target", "growth")}
    nearest = {name: change(getattr(case, name), 0) for name in ("mask", "unknown", "tissue")}
    moved = {name: np.ascontiguousarray(array) for name, array in (linear | nearest).items()}
    return GridCase(voided=np.where(moved["mask"], np.float32(0), moved["target"]), **moved)


def deform_labels(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    spacing_mm: float | Sequence[float],
    max_displacement_mm: float = 4.0,
) -> np.ndarray:
    """Deform a copy of a segmentation smoothly, remove some balls of it and give others another label.

    Args:
        labels: segmentation (x, y, z) with 0 background, 1 CSF, 2 GM, 3 WM.
        rng: draws that do not depend on the spacing.
        spacing_mm: voxel size, one number or three.
        max_displacement_mm: the largest displacement is drawn from 0 to this; 0 moves nothing.
    """
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    out = labels[_moved_voxels(labels.shape, rng, h, rng.uniform(0, max_displacement_mm))]
    for relabel in (False, True):
        for _ in range(rng.integers(MAX_PATCHES + 1)):
            centre, radius = rng.uniform(size=3) * labels.shape, rng.uniform(*PATCH_RADIUS_MM)
            box, ball = _ball(centre, radius, h, labels.shape)
            patch = out[box]
            patch[ball & (patch > 0)] = rng.choice(list(TISSUES)) if relabel else 0
    return out


def _moved_voxels(
    shape: Sequence[int], rng: np.random.Generator, h: np.ndarray, largest_mm: float
) -> tuple[np.ndarray, ...]:
    """Return index arrays of the voxel that every voxel takes its label from, clipped to the volume."""
    positions = [np.arange(n) * s for n, s in zip(shape, h, strict=True)]
    extent = [n * s for n, s in zip(shape, h, strict=True)]
    shift = np.stack([smooth_field(rng, positions, SMOOTHNESS_MM, extent) for _ in range(3)])
    shift *= largest_mm / max(float(np.sqrt((shift**2).sum(0)).max()), 1e-6)
    index = []
    for axis, n in enumerate(shape):
        start = np.arange(n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        index.append(np.clip(np.rint(start + shift[axis] / h[axis]), 0, n - 1).astype(np.intp))
    return tuple(index)


def _ball(
    centre: np.ndarray, radius_mm: float, h: np.ndarray, shape: Sequence[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return the bounding box of a ball within the volume, and its voxels there."""
    low = np.maximum(np.floor(centre - radius_mm / h), 0).astype(int)
    high = np.minimum(np.ceil(centre + radius_mm / h) + 1, shape).astype(int)
    x, y, z = np.ix_(*((np.arange(a, b) - c) * s for a, b, c, s in zip(low, high, centre, h, strict=True)))
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True)), x**2 + y**2 + z**2 <= radius_mm**2
