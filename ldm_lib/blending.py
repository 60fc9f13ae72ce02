"""The last step to the hole's edge: what the decoder gets wrong just outside it is known, and made good just inside.

The error at the voxels around the hole is carried into it by the screened Laplace equation, so that it fades with
distance. It is added to what fills the hole; no voxel outside is ever touched.
"""

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg

from ldm_lib.baselines import laplace_system

RELATIVE_RESIDUAL = 1e-4  # of a correction, which is itself small


def rim(mask: np.ndarray) -> np.ndarray:
    """The hole and the voxels that share a face with it: (x, y, z) bool."""
    return ndimage.binary_dilation(mask)


def edge_correction(decoded: np.ndarray, known: np.ndarray, mask: np.ndarray, *, reach_vox: float) -> np.ndarray:
    """What to add in the hole so that its edge does not show: (n,) in the order of `decoded[mask]`.

    It solves (1 / reach^2 - Laplacian) r = 0 in the hole with r = known - decoded on the voxels around it, and no flux
    through the volume's border.

    Args:
        decoded: (x, y, z) what the decoder returns, of the hole and the voxels around it (`rim`).
        known: (x, y, z) what is known outside the hole, in the same units.
        mask: (x, y, z) bool, True in the hole.
        reach_vox: distance over which the correction fades to 1/e from a flat edge, voxels, above 0.

    Source: Pérez et al. 2003 (Poisson image editing, eq. 4, there without a screen).
    """
    spans = ndimage.find_objects(mask.astype(np.uint8))[0]
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in spans)
    hole = mask[box]
    error = np.where(rim(hole) & ~hole, known[box] - decoded[box], 0)
    laplacian, edge_sum = laplace_system(error, hole)
    screened = laplacian + sparse.identity(edge_sum.size, format="csr") / reach_vox**2
    correction, _ = cg(screened, edge_sum, rtol=RELATIVE_RESIDUAL)
    return correction.astype(np.float32)
