"""Tissue segmentations: the three labels, and how training roughens them so that nothing trusts them blindly."""

from collections.abc import Sequence

import numpy as np

CSF, GM, WM = 1, 2, 3
TISSUES = {CSF: "CSF", GM: "GM", WM: "WM"}


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Labels x y z to one channel a tissue, in the order CSF, GM, WM: float32 (3, x, y, z) of 0 and 1."""
    return np.stack([labels == tissue for tissue in TISSUES]).astype(np.float32)


def deform_labels(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    spacing_mm: float | Sequence[float],
    max_displacement_mm: float = 4.0,
    smoothness_mm: float = 24.0,
    max_patches: int = 3,
    patch_radius_mm: tuple[float, float] = (4.0, 12.0),
) -> np.ndarray:
    """Bend a segmentation smoothly, blank some balls of it and give others another label.

    Args:
        labels: segmentation x y z with 0 background, 1 CSF, 2 GM, 3 WM.
        rng: the only source of randomness; draws do not depend on the spacing.
        spacing_mm: voxel size, one number or three.
        max_displacement_mm: how far the farthest voxel moves is drawn from 0 to this; 0 moves nothing.
        smoothness_mm: distance between the nodes of the displacement.
        max_patches: up to so many balls are blanked (label 0) and up to so many relabelled; 0 for none.
        patch_radius_mm: smallest and largest radius of a ball.

    Returns:
        A new array of the same shape and dtype, nearest neighbour, so with the same labels only.
    """
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    out = labels[_moved_voxels(labels.shape, rng, h, rng.uniform(0, max_displacement_mm), smoothness_mm)]
    for relabel in (False, True):
        for _ in range(rng.integers(max_patches + 1)):
            centre, radius = rng.uniform(size=3) * labels.shape, rng.uniform(*patch_radius_mm)
            patch = out[_box(centre, radius, h, labels.shape)]
            ball = _ball(centre, radius, h, labels.shape) & (patch > 0)
            patch[ball] = rng.choice(list(TISSUES)) if relabel else 0
    return out


def smooth_field(
    rng: np.random.Generator, positions_mm: Sequence[np.ndarray], node_mm: float, extent_mm: Sequence[float]
) -> np.ndarray:
    """Smooth random field of mean 0 and standard deviation 1: a cubic B-spline with normal coefficients.

    Args:
        rng: draws one coefficient a node; their number depends on extent and node distance only, so the
            same field is found again on any grid.
        positions_mm: three vectors, where the grid's planes lie along x, y, z, from 0 to the extent.
        node_mm: distance between nodes; detail is about twice as long.
        extent_mm: size of the region that carries the field.

    Returns:
        float32, one value for each grid point (x, y, z).
    """
    counts = [int(np.ceil(e / node_mm)) + 4 for e in extent_mm]
    field = rng.standard_normal(counts, dtype=np.float32)
    for positions, count in zip(positions_mm, counts, strict=True):
        weights = _cubic_weights(np.asarray(positions) / node_mm, count)
        field = np.tensordot(field, weights, axes=(0, 1))
    return field


def _cubic_weights(positions: np.ndarray, count: int) -> np.ndarray:
    """Cubic B-spline of every node at every position, scaled to unit sum of squares: (positions, nodes)."""
    t = np.abs(positions[:, None] + 1 - np.arange(count)[None])
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _moved_voxels(
    shape: Sequence[int], rng: np.random.Generator, h: np.ndarray, largest_mm: float, node_mm: float
) -> tuple[np.ndarray, ...]:
    """Index arrays of the voxel that every voxel takes its label from, clipped to the volume."""
    positions = [np.arange(n) * s for n, s in zip(shape, h, strict=True)]
    extent = [n * s for n, s in zip(shape, h, strict=True)]
    shift = np.stack([smooth_field(rng, positions, node_mm, extent) for _ in range(3)])
    shift *= largest_mm / max(float(np.sqrt((shift**2).sum(0)).max()), 1e-6)
    index = []
    for axis, n in enumerate(shape):
        start = np.arange(n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        index.append(np.clip(np.rint(start + shift[axis] / h[axis]), 0, n - 1).astype(np.intp))
    return tuple(index)


def _box(centre: np.ndarray, radius_mm: float, h: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    low = np.maximum(np.floor(centre - radius_mm / h), 0).astype(int)
    high = np.minimum(np.ceil(centre + radius_mm / h) + 1, shape).astype(int)
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def _ball(centre: np.ndarray, radius_mm: float, h: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    box = _box(centre, radius_mm, h, shape)
    axes = [(np.arange(b.start, b.stop) - c) * s for b, c, s in zip(box, centre, h, strict=True)]
    x, y, z = np.ix_(*axes)
    return x**2 + y**2 + z**2 <= radius_mm**2
