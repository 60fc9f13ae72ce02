"""Solve Laplace's equation in masked voxels, for harmonic inpainting, initial estimates and edge blending."""

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.linalg import cg

KNOWN, IGNORED = -1, -2  # in the place of the number of a masked voxel


def harmonic(known: np.ndarray, mask: np.ndarray, *, rtol: float, dtype: type) -> np.ndarray:
    """Continue the known voxels harmonically into the n masked ones: (n,), all 0 without any voxel around the mask."""
    laplacian, edge_sum = masked_laplacian(known, mask)
    if not (faces := laplacian.sum()):  # its sum counts the faces of the mask's edge
        return np.zeros(len(edge_sum), dtype)
    start = np.full(len(edge_sum), edge_sum.sum() / faces, dtype)
    values, _ = cg(laplacian.astype(dtype), edge_sum.astype(dtype), x0=start, rtol=rtol)
    return values


def masked_laplacian(
    known: np.ndarray, mask: np.ndarray, air: np.ndarray | None = None
) -> tuple[csr_array, np.ndarray]:
    """Return the 6-neighbour Laplacian of the masked voxels and the sum of their known neighbours.

    Args:
        known: (x, y, z) intensities; those under the mask are not read.
        mask: (x, y, z) bool, the n unknown voxels, in C order.
        air: (x, y, z) bool, voxels outside the mask that do not count, like those outside the volume.

    Returns:
        The Laplacian (n, n), positive on its diagonal, and for each masked voxel the sum of its neighbours outside
        the mask (n,). Neighbours in the air or outside the volume do not count: no flux through the border.
    """
    count = int(mask.sum())
    number = np.full(mask.shape, KNOWN)
    if air is not None:
        number[air] = IGNORED
    number[mask] = np.arange(count)
    degree, edge_sum = np.zeros(count), np.zeros(count)
    rows, columns = [], []
    for axis in range(3):
        lower, upper = np.s_[:-1], np.s_[1:]
        for first, second in ((lower, upper), (upper, lower)):
            a, b = (np.moveaxis(number, axis, 0)[part] for part in (first, second))
            value = np.moveaxis(known, axis, 0)[second]
            inside, edge = (a >= 0) & (b >= 0), (a >= 0) & (b == KNOWN)
            rows.append(a[inside])
            columns.append(b[inside])
            degree[a[inside | edge]] += 1
            edge_sum[a[edge]] += value[edge]
    positions = np.concatenate([*rows, range(count)]), np.concatenate([*columns, range(count)])
    values = np.concatenate([np.full(positions[0].size - count, -1.0), degree])
    return csr_array((values, positions), shape=(count, count)), edge_sum
