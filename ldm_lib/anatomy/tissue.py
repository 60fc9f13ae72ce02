"""Define the tissue labels, and the smooth random fields that deform brains."""

from collections.abc import Sequence

import numpy as np

CSF, GM, WM = 1, 2, 3
TISSUES = {CSF: "CSF", GM: "GM", WM: "WM"}


def smooth_field(
    rng: np.random.Generator, positions_mm: Sequence[np.ndarray], node_mm: float, extent_mm: Sequence[float]
) -> np.ndarray:
    """Draw a smooth random field of mean 0 and standard deviation 1: a cubic B-spline with normal coefficients.

    It is float32 (x, y, z) and the same on any grid: the number of coefficients depends on extent and node distance.

    Args:
        positions_mm: three vectors, the positions of the grid's planes along x, y, z, from 0 to the extent.
        node_mm: distance between nodes; the field varies over about twice this length.
    """
    field = spline_coefficients(rng, extent_mm, node_mm)
    for positions, count in zip(positions_mm, field.shape, strict=True):
        weights = cubic_weights(np.asarray(positions) / node_mm, count)
        field = np.tensordot(field, weights, axes=(0, 1))
    return field


def spline_coefficients(rng: np.random.Generator, extent_mm: Sequence[float], node_mm: float) -> np.ndarray:
    """Draw the coefficients of a `smooth_field`: float32, as many as its extent and the distance of its nodes need."""
    return rng.standard_normal([int(np.ceil(e / node_mm)) + 4 for e in extent_mm], dtype=np.float32)


def cubic_weights(positions: np.ndarray, count: int) -> np.ndarray:
    """Return the cubic B-spline of each node at each position, scaled to unit sum of squares: (positions, nodes)."""
    t = np.abs(positions[:, None] + 1 - np.arange(count)[None])
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
