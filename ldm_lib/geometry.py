"""Convert voxel order, padding and resolution between a file's grid and the network's grid, with exact inverses.

The voxels of a file come in any axis order and any shape; the network needs LPS order and axes that are divisible by
its downsampling factor. The offset of the padding is recorded, because padding to the centre and cropping from the
centre shifts a volume by one slice when the remainder is odd.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from ldm_lib.errors import InputError

MODEL_ORIENTATION = "LPS"  # the order of BraTS files


def axis_codes(affine: np.ndarray) -> str:
    """Return three letters, the directions in which the voxel axes grow, such as "LPS"."""
    return "".join(nib.aff2axcodes(affine))


def nearest_rotation(affine: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) from the world's axes, in the order and directions nearest to a grid's, to the grid's.

    For orthogonal axes it is the identity, whatever their order.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    world = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(nib.orientations.io_orientation(affine)):
        world[int(axis), column] = sign
    return axes.T @ world


def oblique_degrees(affine: np.ndarray) -> float:
    """Return the angle by which a grid is rotated away from the nearest axes of the world, degrees.

    Examples:
        >>> turn = np.radians(12)
        >>> affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        >>> affine[:2, :2] = [[-np.cos(turn), np.sin(turn)], [-np.sin(turn), -np.cos(turn)]]
        >>> round(oblique_degrees(affine), 3)
        12.0
    """
    cosine = (np.trace(nearest_rotation(affine)) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def cropped_affine(affine: np.ndarray, box: Sequence[slice]) -> np.ndarray:
    """Return the affine (4, 4) of `array[box]`, given that of the array (x, y, z)."""
    cropped = affine.copy()
    cropped[:3, 3] = (affine @ [*(span.start for span in box), 1])[:3]
    return cropped


def blur_for(steps: Iterable[float]) -> list[float]:
    """Return the standard deviations, in source voxels, of the Gaussian that precedes a resampling, along each axis.

    Larger voxels have a wider point spread function: the Gaussian is as wide as theirs is wider than the source's
    (Cardoso et al., MICCAI 2015, section 2). `steps` are source voxels per target voxel; of 1 or less there is no blur.
    """
    return [math.sqrt(max(step**2 - 1, 0) / (8 * math.log(2))) for step in steps]


@dataclass(frozen=True)
class Padding:
    """Pad a grid with zeros: `before` and `after` are voxels per axis, never negative."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def to_multiple(cls, shape: tuple[int, ...], multiple: int) -> "Padding":
        """Return the smallest padding that makes every axis divisible by `multiple`; an odd voxel goes to the end."""
        total = [-n % multiple for n in shape]
        return cls(tuple(t // 2 for t in total), tuple(t - t // 2 for t in total))

    def pad(self, array: np.ndarray) -> np.ndarray:
        """Pad (x, y, z) with zeros (False for a mask)."""
        return np.pad(array, list(zip(self.before, self.after, strict=True)))

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Remove the padding from the last three axes of an array or tensor: the exact inverse of `pad`."""
        ends = [n - a for n, a in zip(array.shape[-3:], self.after, strict=True)]
        return array[(..., *(slice(b, e) for b, e in zip(self.before, ends, strict=True)))]


@dataclass(frozen=True)
class Frame:
    """Convert between a file's voxel order (x, y, z) and the model's padded LPS grid.

    Attributes:
        to_lps_transform: nibabel orientation transform from file order to LPS.
        to_file_transform: its inverse.
        padding: padding of the LPS grid.
        shape: shape of the padded LPS grid.
    """

    to_lps_transform: np.ndarray
    to_file_transform: np.ndarray
    padding: Padding
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, affine: np.ndarray, shape: tuple[int, int, int], multiple: int) -> "Frame":
        """Build the frame of a grid for a network that divides each axis by `multiple`.

        Args:
            affine: voxel to world (RAS, mm), 4 x 4; a grid that is a little oblique is assigned to its nearest axes.
            shape: shape of the file's grid.
            multiple: what every axis of the model's grid is divisible by.
        """
        file_order = nib.orientations.io_orientation(affine)
        lps = nib.orientations.axcodes2ornt(MODEL_ORIENTATION)
        to_lps = nib.orientations.ornt_transform(file_order, lps)
        lps_shape = tuple(np.array(shape)[np.argsort(to_lps[:, 0])].tolist())
        padding = Padding.to_multiple(lps_shape, multiple)
        padded = tuple(b + n + a for b, n, a in zip(padding.before, lps_shape, padding.after, strict=True))
        return cls(to_lps, nib.orientations.ornt_transform(lps, file_order), padding, padded)

    def lps_affine(self, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the (4, 4) affine of `to_lps(array)`, given that of the file's array (x, y, z) of this shape."""
        return affine @ nib.orientations.inv_ornt_aff(self.to_lps_transform, shape)

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """Reorder (x, y, z) to LPS and pad it; the result is contiguous."""
        return np.ascontiguousarray(self.padding.pad(self.to_lps(array)))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Crop and reorder a volume on the model's grid to the file's: the exact inverse of `to_model`."""
        return nib.orientations.apply_orientation(self.padding.crop(array), self.to_file_transform)

    def lps_spacing(self, spacing_mm: tuple[float, ...]) -> tuple[float, ...]:
        """Reorder voxel sizes along the file's axes to those along the LPS axes."""
        return tuple(spacing_mm[int(axis)] for axis in np.argsort(self.to_lps_transform[:, 0]))

    def to_lps(self, array: np.ndarray) -> np.ndarray:
        """Reorder (x, y, z) to LPS without padding, as figures show it."""
        return nib.orientations.apply_orientation(array, self.to_lps_transform)


def block_mean(array: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of `factor`^3 voxels: (..., x, y, z) -> (..., x/f, y/f, z/f) float32.

    The mean of a mask is the fraction of set voxels in each latent voxel.
    """
    total = np.asarray(array, np.float32)
    if any(n % factor for n in total.shape[-3:]):
        raise ValueError(f"{total.shape[-3:]} voxels in blocks of {factor}")
    for axis in (-3, -2, -1):  # sums of slices, one axis after the other, are faster than means of blocks
        slices = np.moveaxis(total, axis, 0)
        total = np.moveaxis(sum(slices[k::factor] for k in range(factor)), 0, axis)
    return np.ascontiguousarray(total / np.float32(factor**3))


def block_centre(array: np.ndarray, factor: int) -> np.ndarray:
    """Return the voxel at the centre of each block of `factor`^3 voxels: (..., x, y, z) -> (..., x/f, y/f, z/f).

    For an even factor it is the upper one of the two middle voxels along each axis.
    """
    middle = slice(factor // 2, None, factor)
    return np.asarray(array)[..., middle, middle, middle]


def latent_mask(mask: np.ndarray, factor: int, dilation: int = 0) -> np.ndarray:
    """Return the latent voxels that contain any voxel of the mask: (x, y, z) bool -> (x/f, y/f, z/f) bool.

    Args:
        mask: voxels to inpaint.
        factor: downsampling factor of the autoencoder.
        dilation: latent voxels by which the result grows (26-neighbourhood), because the encoder mixes voxels across
            the edge of the mask into the neighbouring latent voxels.
    """
    latent = block_mean(mask, factor) > 0
    if dilation == 0:
        return latent
    from scipy import ndimage  # it takes 0.4 s to load, and reading a case needs nothing of it

    return ndimage.binary_dilation(latent, np.ones((3, 3, 3), bool), iterations=dilation)


def in_voxels(box: Iterable[slice], factor: int) -> tuple[slice, ...]:
    """Return the voxels of a box of latent voxels."""
    return tuple(slice(side.start * factor, side.stop * factor) for side in box)


def face_neighbours(mask: np.ndarray) -> np.ndarray:
    """Return the voxels (x, y, z) that share a face with a mask and lie outside it."""
    box = bounding_box(mask, 1)
    around, inside = np.zeros_like(mask), mask[box]
    near = around[box]  # by numpy, because scipy.ndimage takes 0.4 s to load
    for axis in range(3):
        from_, to = np.moveaxis(inside, axis, 0), np.moveaxis(near, axis, 0)
        to[1:] |= from_[:-1]
        to[:-1] |= from_[1:]
    near &= ~inside
    return around


def bounding_box(mask: np.ndarray, margin_vox: ArrayLike = 0) -> tuple[slice, ...]:
    """Return the bounding box of a mask (x, y, z), widened by a margin and clipped to the volume.

    Args:
        mask: bool or integer, not empty.
        margin_vox: voxels on every side; one number, or one per axis.

    Raises:
        InputError: the mask is empty.

    Examples:
        >>> mask = np.zeros((8, 8, 8), bool)
        >>> mask[2:5, 3, 7] = True
        >>> bounding_box(mask, 1)
        (slice(1, 6, None), slice(2, 5, None), slice(6, 8, None))
    """
    if not mask.any():
        raise InputError("the mask is empty", fix="give a mask with at least one voxel")
    box = []
    for axis, margin in enumerate(np.broadcast_to(margin_vox, mask.ndim).tolist()):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(filled[0]) - margin, 0), min(int(filled[-1]) + 1 + margin, mask.shape[axis])))
    return tuple(box)
