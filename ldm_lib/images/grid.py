"""Bring what belongs to an image to the image's grid, without changing a voxel; or reject it, with the distance."""

from dataclasses import replace

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.images.affines import corner_distance_mm
from ldm_lib.images.volume import Volume

EXACT_MM = 1e-3
SAME_GRID = 0.1  # of the shortest edge of a voxel; headers that another tool rounded are 0.001 to 0.05 off
RESAMPLE = "resample it onto the image's grid"


def reordered(volume: Volume, like: Volume) -> Volume:
    """Return a volume with its axes permuted and flipped into the order of another, each voxel where it was.

    Its `preamble` stays that of the file, so it is not to be written.
    """
    order = nib.orientations.io_orientation(np.linalg.solve(like.affine, volume.affine))
    if np.array_equal(order, [[0, 1], [1, 1], [2, 1]]):
        return volume
    affine = volume.affine @ nib.orientations.inv_ornt_aff(order, volume.shape)
    return replace(volume, raw=nib.orientations.apply_orientation(volume.raw, order), affine=affine)


def has_grid_of(volume: Volume, like: Volume, tolerance_mm: float | None = None) -> bool:
    """Return whether shape and voxel order of two files are the same, and the corners up to a tenth of a voxel."""
    tolerance_mm = SAME_GRID * min(like.spacing_mm) if tolerance_mm is None else tolerance_mm
    return volume.shape == like.shape and corner_distance_mm(volume.shape, volume.affine, like.affine) <= tolerance_mm


def on_grid_of(volume: Volume, like: Volume, warnings: list[str], *, fix: str = RESAMPLE) -> Volume:
    """Return a volume in the voxel order of another file on the same grid; rounding is appended to `warnings`.

    Raises:
        InputError: the grids differ by more than their voxel order and a tenth of a voxel.
    """
    turned = reordered(volume, like)
    apart_mm = corner_distance_mm(turned.shape, turned.affine, like.affine)
    if turned.shape != like.shape:
        cause = f"shape {volume.shape}, but {like.path.name} has {like.shape}"
        raise InputError(cause, where=volume.path, fix=fix)
    if not has_grid_of(turned, like):
        voxels, axes = apart_mm / min(like.spacing_mm), f"{volume.orientation} against {like.orientation}"
        cause = f"its corners lie {apart_mm:.3g} mm ({voxels:.3g} voxels) from those of {like.path.name} ({axes})"
        raise InputError(cause, where=volume.path, fix=fix)
    if apart_mm > EXACT_MM:
        warnings.append(f"{volume.path.name}: its corners lie {apart_mm:.2g} mm from the image's, less than a tenth of "
                        "a voxel: read as the same grid")  # fmt: skip
    return turned
