"""A first guess at what fills a hole: what the tissue map says of the intensities, and what the hole's edge says.

p     = b_0 + sum over tissues k and widths s of b_ks (G_s * [tissue = k]),  ridge regression on what is seen around
draft = a p + h,  h harmonic in the hole, h = image - a p on the voxels around it

The same map is read inside and outside the hole, so that the regression learns how far it is to be trusted: from a map
that fits what is seen better than what is not, such as one refined by the scan's own intensities, it learns too much.
"""

import numpy as np
from scipy import ndimage
from scipy.sparse.linalg import cg

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.geometry import bounding_box
from ldm_lib.poisson import masked_laplacian

TRUST = 0.5  # a: the other half of the regression's contrast is left to the edge
WIDTHS_MM = (2.0, 4.0)  # s: a registered atlas is off by about so much
NEAR_MM, FAR_MM = 15.0, 40.0  # the regression's weights fade by 1/e in NEAR, and end at FAR
RIDGE = 1e-3  # of the mean variance of the regressors
LEAST_SEEN = 100  # voxels, or nothing is learnt from them
RELATIVE_RESIDUAL = 1e-4


def initial_estimate(image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, *, spacing_mm: float) -> np.ndarray:
    """Fill the hole with a first guess.

    Args:
        image: (x, y, z) normalised, air 0; what it holds under the mask is not looked at.
        mask: (x, y, z) bool, True = fill this.
        tissue: (x, y, z) labels 0 none, 1 CSF, 2 GM, 3 WM, the map of one method inside and outside the hole; all
            zeros mean unknown, and the guess is the harmonic one.
        spacing_mm: edge of an isotropic voxel.

    Returns:
        float32 (x, y, z), the image outside the mask, from 0 up inside; where nothing of the hole's edge is in the
        volume, the regression alone.
    """
    filled = np.where(mask, 0, image).astype(np.float32)
    if not mask.any():
        return filled
    box = bounding_box(mask, int(np.ceil(FAR_MM / spacing_mm)))
    told = TRUST * _regressed(filled[box], mask[box], tissue[box], spacing_mm)
    core = bounding_box(mask[box], 1)
    known, hole = np.where(mask[box], 0, filled[box] - told)[core], mask[box][core]
    values = told[core][hole] + _harmonic(known, hole)
    filled[mask] = np.maximum(values, 0)
    return filled


def _regressed(image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, spacing_mm: float) -> np.ndarray:
    """p (x, y, z), or 0 where nothing can be learnt; arguments as of `draft_fill`, the image 0 in the hole."""
    distance_mm = ndimage.distance_transform_edt(~mask) * spacing_mm
    seen = ~mask & (distance_mm <= FAR_MM)
    present = [label for label in TISSUES if (tissue[seen] == label).any()]
    if not present or np.count_nonzero(seen) < LEAST_SEEN:
        return np.zeros_like(image)
    shares = [
        ndimage.gaussian_filter((tissue == label).astype(np.float32), width / spacing_mm)
        for label in present
        for width in WIDTHS_MM
    ]
    regressors = np.stack([share[seen] for share in shares], axis=1).astype(np.float64)
    weights = np.exp(-distance_mm[seen] / NEAR_MM)
    weights /= weights.sum()
    values, centre = image[seen].astype(np.float64), weights @ regressors
    apart = regressors - centre
    gram = apart.T @ (apart * weights[:, None])
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    slopes = np.linalg.solve(gram, apart.T @ (weights * (values - weights @ values)))
    offset = weights @ values - slopes @ centre
    return np.float32(offset) + sum(np.float32(slope) * share for slope, share in zip(slopes, shares, strict=True))


def _harmonic(known: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(n,) float32: the harmonic continuation of what is known into the hole's n voxels."""
    laplacian, edge = masked_laplacian(known, hole)
    if not laplacian.sum():  # no voxel around the hole
        return np.zeros(len(edge), np.float32)
    start = np.full(len(edge), edge.sum() / laplacian.sum(), np.float32)
    values, _ = cg(laplacian.astype(np.float32), edge.astype(np.float32), x0=start, rtol=RELATIVE_RESIDUAL)
    return values
