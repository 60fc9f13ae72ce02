"""Correct the intensity of inpainted voxels so that the edge of the mask is not visible.

The decoder's error is known at the voxels around the mask. The screened Laplace equation carries it into the mask, so
that it fades with distance; the correction is added to the inpainted voxels, and no voxel outside is touched.
"""

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg

from ldm_lib.geometry import bounding_box, face_neighbours
from ldm_lib.poisson import masked_laplacian

CORRECTION_RTOL = 1e-4  # relative residual of the correction, which is small itself
FACES = ndimage.generate_binary_structure(3, 1)


def rim(mask: np.ndarray) -> np.ndarray:
    """Return the mask and the voxels that share a face with it: (x, y, z) bool."""
    return mask | face_neighbours(mask)


class EdgeCorrection:
    """Compute the correction of the inpainted voxels of one mask.

    The correction r satisfies (1 / reach^2 - Laplacian) r = 0 in the mask, r = known - decoded at the voxels around
    it, and no flux through the volume's border and into air.

    Args:
        air: (x, y, z) bool, voxels outside the mask where no image is known; None is nowhere.
        reach_vox: distance from a flat edge at which the correction has faded to 1/e, voxels, above 0.

    Source: Pérez et al. 2003, Poisson image editing, eq. 4, where nothing fades.
    """

    def __init__(self, mask: np.ndarray, *, reach_vox: float, air: np.ndarray | None = None) -> None:
        self._box = bounding_box(mask, 1)
        self._mask = mask[self._box]
        air = np.zeros_like(self._mask) if air is None else air[self._box] & ~self._mask
        self._around = face_neighbours(self._mask) & ~air
        laplacian, _ = masked_laplacian(np.zeros(self._mask.shape), self._mask, air)
        screened = laplacian + sparse.identity(laplacian.shape[0], format="csr") / reach_vox**2
        self._screened = screened.astype(np.float32)  # six times as fast as float64, and exact enough

    def __call__(self, decoded: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Return the correction, (n,) float32 in the order of `decoded[mask]`; both volumes are valid in its `rim`."""
        error = np.where(self._around, known[self._box] - decoded[self._box], 0).astype(np.float32)
        at_edge = ndimage.convolve(error, FACES.astype(np.float32), mode="constant")[self._mask]
        correction, _ = cg(self._screened, at_edge, rtol=CORRECTION_RTOL)
        return correction
