"""Estimate the masked region from the tissue map and the intensities around it, as a start for the diffusion model.

p        = b_0 + sum over tissues k and widths s of b_ks (G_s * [tissue = k]),  ridge regression on the visible voxels
estimate = w p + h,  h harmonic in the mask, h = image - w p on the voxels around it

The same tissue map is used inside and outside the mask, so that the regression learns how reliable it is. A map that
fits the visible voxels better than the hidden ones, such as one that was refined by the scan's own intensities, would
be trusted too much. Air at the brain's surface is not known to be dark, see `air_at_surface`.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.geometry import bounding_box
from ldm_lib.poisson import harmonic

REGRESSION_WEIGHT = 0.5  # w: the other half of the regression's contrast comes from the edge of the mask
WIDTHS_MM = (2.0, 4.0)  # s: about the error of a registered atlas
NEAR_MM, FAR_MM = 15.0, 40.0  # the regression's weights fall by 1/e over NEAR, and end at FAR
SURFACE_MM = 10.0  # of the registered atlas, within which the surface of the brain may be
RIDGE = 1e-3  # relative to the mean variance of the regressors
MIN_VISIBLE_VOXELS = 100  # with fewer there is no regression
ESTIMATE_RTOL = 1e-4  # relative residual of the harmonic continuation


def initial_estimate(image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, *, spacing_mm: float) -> np.ndarray:
    """Fill the masked region by tissue regression and harmonic continuation.

    Args:
        image: (x, y, z) normalised, 0 in air; voxels under the mask are not read.
        mask: (x, y, z) bool, True = inpaint.
        tissue: (x, y, z) labels 0 none, 1 CSF, 2 GM, 3 WM, made by one method inside and outside the mask; all zeros
            mean unknown, and the estimate is the harmonic one.
        spacing_mm: edge of an isotropic voxel.

    Returns:
        float32 (x, y, z): the image outside the mask, at least 0 inside. Without any voxel around the mask it is the
        regression alone.

    Examples:
        >>> image, mask = np.full((12, 12, 12), 0.5), np.zeros((12, 12, 12), bool)
        >>> mask[4:8, 4:8, 4:8] = True
        >>> estimate = initial_estimate(image, mask, np.full(image.shape, 3), spacing_mm=2.0)
        >>> bool(np.allclose(estimate, 0.5, atol=1e-3))
        True
    """
    filled = np.where(mask, 0, image).astype(np.float32)
    if not mask.any():
        return filled
    box = bounding_box(mask, int(np.ceil(FAR_MM / spacing_mm)))
    regression = REGRESSION_WEIGHT * _regression(filled[box], mask[box], tissue[box], spacing_mm)
    core = bounding_box(mask[box], 1)
    residual, inside = np.where(mask[box], 0, filled[box] - regression)[core], mask[box][core]
    air = air_at_surface(filled, mask, tissue, spacing_mm=(spacing_mm,) * 3)[box][core]
    continued = harmonic(residual, inside, rtol=ESTIMATE_RTOL, dtype=np.float32, air=air)
    filled[mask] = np.maximum(regression[core][inside] + continued, 0)
    return filled


def air_at_surface(
    image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, *, spacing_mm: Sequence[float]
) -> np.ndarray:
    """Return the air next to the mask from which nothing is continued into it, bool (x, y, z).

    A lesion that is drawn up to the brain's surface ends at air, which says nothing about the intensity of the lesion's
    edge. Air farther from all tissue than a registration errs is what the mask continues where it was drawn beyond
    the surface.

    Args:
        image: (x, y, z), 0 in air.
        mask: (x, y, z) bool, True = inpaint.
        tissue: (x, y, z) labels, 0 none.
        spacing_mm: edges of a voxel.
    """
    box = bounding_box(mask, [int(np.ceil(SURFACE_MM / mm)) + 1 for mm in spacing_mm])
    distance_mm = ndimage.distance_transform_edt(tissue[box] == 0, sampling=spacing_mm)
    found = np.zeros(mask.shape, bool)
    if tissue[box].any():
        found[box] = ~mask[box] & (image[box] <= 0) & (distance_mm <= SURFACE_MM)
    return found


def _regression(image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Return p (x, y, z), or 0 where too little is visible; the image is 0 under the mask."""
    distance_mm = ndimage.distance_transform_edt(~mask) * spacing_mm
    visible = ~mask & (distance_mm <= FAR_MM)
    present = [label for label in TISSUES if (tissue[visible] == label).any()]
    if not present or np.count_nonzero(visible) < MIN_VISIBLE_VOXELS:
        return np.zeros_like(image)
    blurred = [ndimage.gaussian_filter((tissue == label).astype(np.float32), width / spacing_mm)
               for label in present for width in WIDTHS_MM]  # fmt: skip
    regressors = np.stack([volume[visible] for volume in blurred], axis=1).astype(np.float64)
    weights = np.exp(-distance_mm[visible] / NEAR_MM)
    weights /= weights.sum()
    values, centre = image[visible].astype(np.float64), weights @ regressors
    centred = regressors - centre
    gram = centred.T @ (centred * weights[:, None])
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    slopes = np.linalg.solve(gram, centred.T @ (weights * (values - weights @ values)))
    offset = weights @ values - slopes @ centre
    return np.float32(offset) + sum(np.float32(slope) * volume for slope, volume in zip(slopes, blurred, strict=True))
