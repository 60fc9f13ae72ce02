"""The discrete Laplacian of the voxels in a hole: what fills, drafts and the fit at the edge are solved with."""

import numpy as np
from scipy.sparse import csr_array


def laplace_system(known: np.ndarray, mask: np.ndarray) -> tuple[csr_array, np.ndarray]:
    """The 6-neighbour Laplacian of the masked voxels, in C order, and the sum of their known neighbours."""
    count = int(mask.sum())
    number = np.full(mask.shape, -1)
    number[mask] = np.arange(count)
    degree, edge_sum = np.zeros(count), np.zeros(count)
    rows, columns = [], []
    for axis in range(3):
        lower, upper = np.s_[:-1], np.s_[1:]
        for here, there in ((lower, upper), (upper, lower)):
            a, b = (np.moveaxis(number, axis, 0)[part] for part in (here, there))
            value = np.moveaxis(known, axis, 0)[there]
            inside, edge = (a >= 0) & (b >= 0), (a >= 0) & (b < 0)
            rows.append(a[inside])
            columns.append(b[inside])
            degree[a[a >= 0]] += 1
            edge_sum[a[edge]] += value[edge]
    rows, columns = np.concatenate([*rows, range(count)]), np.concatenate([*columns, range(count)])
    values = np.concatenate([np.full(rows.size - count, -1.0), degree])
    return csr_array((values, (rows, columns)), shape=(count, count)), edge_sum
