"""Voxel order, padding and latent cells, each with an exact inverse.

A file's voxels come in any axis order and any shape; the network wants one order and axes divisible by its factor.
`Frame` is the way there and exactly back. The offset of the padding is recorded: padding by centre and cropping by
centre shifts an odd remainder by one slice.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from einops import reduce
from numpy.typing import ArrayLike
from scipy import ndimage

MODEL_ORIENTATION = "LPS"  # the order of BraTS files


@dataclass(frozen=True)
class Padding:
    """Zeros around a grid: `before` and `after` are voxels per axis, never negative."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def to_multiple(cls, shape: tuple[int, ...], multiple: int) -> "Padding":
        """The smallest padding that makes every axis divisible by `multiple`, the odd voxel behind."""
        total = [-n % multiple for n in shape]
        return cls(tuple(t // 2 for t in total), tuple(t - t // 2 for t in total))

    def pad(self, array: np.ndarray) -> np.ndarray:
        """(x, y, z) -> padded (x, y, z), with zeros (False for a mask)."""
        return np.pad(array, list(zip(self.before, self.after, strict=True)))

    def crop(self, array: np.ndarray) -> np.ndarray:
        """The exact inverse of `pad`, on the last three axes of an array or tensor."""
        ends = [n - a for n, a in zip(array.shape[-3:], self.after, strict=True)]
        return array[(..., *(slice(b, e) for b, e in zip(self.before, ends, strict=True)))]


@dataclass(frozen=True)
class Frame:
    """From a file's voxel order (x, y, z) to the model's padded LPS grid, and exactly back.

    Attributes:
        turn: nibabel orientation transform, file order to LPS.
        turn_back: its inverse.
        padding: of the turned grid.
        shape: the padded LPS grid.
    """

    turn: np.ndarray
    turn_back: np.ndarray
    padding: Padding
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, affine: np.ndarray, shape: tuple[int, int, int], multiple: int) -> "Frame":
        """The frame of a grid with this affine and shape, for a network that divides each axis by `multiple`."""
        here = nib.orientations.io_orientation(affine)
        there = nib.orientations.axcodes2ornt(MODEL_ORIENTATION)
        turn = nib.orientations.ornt_transform(here, there)
        turned = tuple(np.array(shape)[np.argsort(turn[:, 0])].tolist())
        padding = Padding.to_multiple(turned, multiple)
        padded = tuple(b + n + a for b, n, a in zip(padding.before, turned, padding.after, strict=True))
        return cls(turn, nib.orientations.ornt_transform(there, here), padding, padded)

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """File order (x, y, z) -> padded LPS (x, y, z), contiguous."""
        return np.ascontiguousarray(self.padding.pad(self.to_lps(array)))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The exact inverse of `to_model`."""
        return nib.orientations.apply_orientation(self.padding.crop(array), self.turn_back)

    def turn_spacing(self, spacing_mm: tuple[float, ...]) -> tuple[float, ...]:
        """Voxel sizes along the file's axes -> along the model's."""
        return tuple(spacing_mm[int(axis)] for axis in np.argsort(self.turn[:, 0]))

    def to_lps(self, array: np.ndarray) -> np.ndarray:
        """Turn without padding: what figures show."""
        return nib.orientations.apply_orientation(array, self.turn)


def cell_share(array: np.ndarray, factor: int) -> np.ndarray:
    """(..., x, y, z) -> (..., x/f, y/f, z/f) float32: the mean of each cell, for a mask its share of set voxels."""
    cells = "... (x fx) (y fy) (z fz) -> ... x y z"
    return reduce(np.asarray(array, np.float32), cells, "mean", fx=factor, fy=factor, fz=factor)


def latent_mask(mask: np.ndarray, factor: int, dilation: int = 0) -> np.ndarray:
    """(x, y, z) bool -> latent (x/f, y/f, z/f) bool: cells that hold any voxel of the mask.

    Args:
        dilation: cells by which the result grows (26-neighbourhood), because the encoder carries the hole's edge
            into the neighbouring cells.
    """
    cells = cell_share(mask, factor) > 0
    if dilation == 0:
        return cells
    return ndimage.binary_dilation(cells, np.ones((3, 3, 3), bool), iterations=dilation)


def cell_centre(array: np.ndarray, factor: int) -> np.ndarray:
    """(..., x, y, z) -> (..., x/f, y/f, z/f): the voxel at each cell's centre (the upper one of the middle pair)."""
    middle = slice(factor // 2, None, factor)
    return np.asarray(array)[..., middle, middle, middle]


def box_around(mask: np.ndarray, margin_vox: ArrayLike = 0) -> tuple[slice, ...]:
    """Bounding box of a mask that is not empty, widened by a margin, one or three, and clipped to the volume."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(
        slice(max(b.start - m, 0), min(b.stop + m, n))
        for b, m, n in zip(box, np.broadcast_to(margin_vox, 3).tolist(), mask.shape, strict=True)
    )
