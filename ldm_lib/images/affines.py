"""Check affines, the matrices from voxel indices to millimetres, and compare grids by them."""

from collections.abc import Sequence

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError

EXPORT = "export it with its scanner orientation"
SHORTEST_MM, LONGEST_MM = 1e-3, 1e3  # edge of a voxel
LARGEST_COSINE = 1e-2  # between two axes of a grid, beyond which it counts as sheared


def no_orientation(what: str) -> InputError:
    """Return the error of a file without orientation; `what` says how its header shows it."""
    return InputError(f"no orientation: {what}", fix=f"{EXPORT}, or state it with --assume-orientation LPS")


def require_usable(affine: np.ndarray) -> np.ndarray:
    """Return an affine (4, 4) that is invertible and has orthogonal axes, else raise InputError."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < SHORTEST_MM or abs(np.linalg.det(axes)) < 1e-6:
        raise InputError("its affine is not finite and invertible", fix=EXPORT)
    if lengths.max() > LONGEST_MM:
        raise InputError(f"voxels of {lengths.max():.3g} mm; need {SHORTEST_MM:g} to {LONGEST_MM:g} mm", fix=EXPORT)
    cosines = np.abs(axes.T @ axes / np.outer(lengths, lengths) - np.eye(3)).max()
    if cosines > LARGEST_COSINE:
        raise InputError(f"sheared axes (cosine {cosines:.2f})", fix="resample it first")
    return affine


def assumed_affine(orientation: str, shape: Sequence[int], spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the affine (4, 4) of an orientation such as "LPS": the volume's centre is at the world's origin."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(orientation)):
        affine[int(axis), column] = sign * abs(float(spacing_mm[column]))
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def corner_distance_mm(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """Return the largest distance between the corners of a grid and where another affine puts them."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm(corners @ (affine - other).T, axis=1).max())
