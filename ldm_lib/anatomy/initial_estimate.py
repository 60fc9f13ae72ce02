"""Estimate the masked region from the tissue map and the intensities around it, as a start for the diffusion model.

p        = b_0 + sum over tissues k and widths s of b_ks (G_s * [tissue = k]),  ridge regression on the visible voxels
estimate = w p + h,  h harmonic in the mask, h = image - w p on the voxels around it

The same tissue map is used inside and outside the mask, so that the regression learns how reliable it is. A map that
fits the visible voxels better than the hidden ones, such as one that was refined by the scan's own intensities, would
be trusted too much. Air at the brain's surface is not known to be dark, see `air_at_surface`.

Everything but distances is computed in torch, in batches: training and inference share these functions.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.geometry import bounding_box

REGRESSION_WEIGHT = 0.6  # w: chosen on left-out people and synthetic patients, see docs/registration.md
WIDTHS_MM = (1.0, 3.0)  # s: a voxel, and about the error of a registered atlas
NEAR_MM, FAR_MM = 15.0, 40.0  # the regression's weights fall by 1/e over NEAR, and end at FAR
SURFACE_MM = 10.0  # of the registered atlas, within which the surface of the brain may be
RIDGE = 1e-3  # relative to the mean variance of the regressors
MIN_VISIBLE_VOXELS = 100  # with fewer there is no regression
TRUNCATE = 4.0  # of a Gaussian kernel, standard deviations
ESTIMATE_RTOL, MOST_ITERATIONS = 1e-4, 500  # of the conjugate gradients
COARSE_MM = 2.0  # voxels of the estimate in training
CHECK_EVERY = 10  # iterations, as a test of convergence waits for a GPU


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
    air = air_at_surface(filled, mask, tissue, spacing_mm=(spacing_mm,) * 3)
    distance_mm = ndimage.distance_transform_edt(~mask[box]) * spacing_mm
    weight = np.where((distance_mm > 0) & (distance_mm <= FAR_MM), np.exp(-distance_mm / NEAR_MM), 0)
    one = [torch.from_numpy(np.ascontiguousarray(array[box]))[None, None] for array in (filled, mask, tissue, air)]
    estimate = fill(*one, torch.from_numpy(weight.astype(np.float32))[None, None], spacing_mm=spacing_mm)
    filled[mask] = estimate[0, 0].numpy()[mask[box]]
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


def fill(image: Tensor, mask: Tensor, tissue: Tensor, air: Tensor, weight: Tensor, *, spacing_mm: float) -> Tensor:
    """Fill the masked regions of a batch of images: `initial_estimate` in torch, on any device.

    Args:
        image: (b 1 x y z) normalised, 0 under the mask.
        mask, air: (b 1 x y z) bool, voxels to fill, and air that is not continued into them.
        tissue: (b 1 x y z) labels.
        weight: (b 1 x y z) of each visible voxel in the regression, 0 where it is left out.
        spacing_mm: edge of an isotropic voxel.

    Returns:
        (b 1 x y z) float32, at least 0 under the mask.
    """
    regression = REGRESSION_WEIGHT * _regression(image, tissue, weight, spacing_mm)
    core = (..., *bounding_box(mask.any(0)[0].cpu().numpy(), 1))
    residual = torch.where(mask, 0, image - regression)[core]
    inside = regression[core] + continue_harmonically(residual, mask[core], air[core])
    filled = image.clone()
    filled[core] = torch.where(mask[core], inside.clamp(min=0), image[core])
    return filled


def coarse_estimate(voided: Tensor, mask: Tensor, tissue: Tensor, near: Tensor, *, spacing_mm: float) -> Tensor:
    """Make the initial estimates of a batch on voxels of about `COARSE_MM`, as training needs thousands of them.

    Args:
        voided: (b 1 x y z), 0 under the mask.
        mask: (b 1 x y z) bool.
        tissue: (b 1 x y z) labels.
        near: (b 1 x y z) bool, within `SURFACE_MM` of tissue.
        spacing_mm: edge of an isotropic voxel.
    """
    step = coarse_step(spacing_mm)
    visible = F.avg_pool3d((~mask).float(), step)
    hidden = visible < 0.5
    image = torch.where(hidden, 0, F.avg_pool3d(voided, step) / visible.clamp(min=0.5))
    every = (..., *(slice(None, None, step),) * 3)
    air = ~hidden & (image <= 0) & near[every]
    coarse_mm = step * spacing_mm
    filled = fill(image, hidden, tissue[every], air, _weight(hidden, coarse_mm), spacing_mm=coarse_mm)
    return torch.where(mask, F.interpolate(filled, scale_factor=step, mode="trilinear"), voided)


def coarse_step(spacing_mm: float) -> int:
    """Return how many voxels make one of `coarse_estimate`."""
    return max(1, round(COARSE_MM / spacing_mm))


def _weight(hidden: Tensor, mm: float) -> Tensor:
    """Return the weights of the regression: exp(-distance / NEAR_MM), in steps of two voxels to the 26 neighbours."""
    weight = F.max_pool3d(hidden.float(), 2, ceil_mode=True)
    for _ in range(round(FAR_MM / (2 * mm))):
        weight = torch.maximum(weight, F.max_pool3d(weight, 3, 1, 1) * float(np.exp(-2 * mm / NEAR_MM)))
    weight = F.interpolate(weight, scale_factor=2, mode="nearest")[..., *(slice(0, n) for n in hidden.shape[2:])]
    return torch.where(hidden | (weight < float(np.exp(-FAR_MM / NEAR_MM))), 0, weight)


def gaussian_blur(volumes: Tensor, sigma_vox: float | Sequence[float]) -> Tensor:
    """Blur volumes (b c x y z) by a Gaussian, mirrored at the borders, by one matrix product along each axis."""
    for axis, sigma in zip((2, 3, 4), np.broadcast_to(sigma_vox, 3).tolist(), strict=True):
        if sigma > 0:
            matrix = _blur_matrix(volumes.shape[axis], sigma).to(volumes)
            volumes = torch.tensordot(volumes, matrix, dims=([axis], [1])).movedim(-1, axis)
    return volumes


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma: float) -> Tensor:
    kernel = ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, truncate=TRUNCATE)
    return torch.from_numpy(kernel)


def _regression(image: Tensor, tissue: Tensor, weight: Tensor, spacing_mm: float) -> Tensor:
    """Return p (b 1 x y z), or 0 where too little is visible."""
    one_hot = torch.cat([tissue == label for label in TISSUES], dim=1).float()
    present = ((one_hot * (weight > 0)).flatten(2).sum(2) > 0).float()  # b k
    blurred = torch.cat([gaussian_blur(one_hot, width / spacing_mm) for width in WIDTHS_MM], dim=1)
    blurred = blurred * present.repeat(1, len(WIDTHS_MM))[..., None, None, None]
    usable = present.any(1) & ((weight > 0).flatten(1).sum(1) >= MIN_VISIBLE_VOXELS)
    flat, w = blurred.flatten(2), weight.flatten(2)
    w = (w / w.sum(2, keepdim=True).clamp(min=1e-12)).double()
    centre = flat.double() @ w.mT  # b r 1
    centred, values = flat.double() - centre, image.flatten(2).double()
    gram = (centred * w) @ centred.mT
    count = present.sum(1).clamp(min=1) * len(WIDTHS_MM)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1) / count + torch.finfo(torch.float32).tiny
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1]).to(gram)
    mean = values @ w.mT
    slopes = torch.linalg.solve(gram, centred @ ((values - mean) * w).mT)
    offset = mean - (slopes * centre).sum(1, keepdim=True)
    fitted = offset[..., None, None].float() + (blurred * slopes[..., None, None].float()).sum(1, keepdim=True)
    return torch.where(usable[:, None, None, None, None], fitted, 0)


def continue_harmonically(known: Tensor, mask: Tensor, air: Tensor) -> Tensor:
    """Solve Laplace's equation under the masks of a batch by conjugate gradients; see `poisson.masked_laplacian`.

    Args:
        known: (b 1 x y z), 0 under the mask.
        mask, air: (b 1 x y z) bool.

    Returns:
        (b 1 x y z) the solution under the mask, 0 elsewhere; all 0 without any voxel around the mask.
    """
    inside = mask.float()
    edge = (~mask & ~air).float()
    degree = _sum_of_neighbours(inside + edge) * inside
    right = _sum_of_neighbours(known * edge) * inside
    faces = _sum_of_neighbours(edge) * inside
    total = (1, 2, 3, 4)
    mean = right.sum(total, keepdim=True) / faces.sum(total, keepdim=True).clamp(min=1)
    x = inside * mean
    r = right - (degree * x - _sum_of_neighbours(x) * inside)
    p, power = r, r.square().sum(total, keepdim=True)
    enough = ESTIMATE_RTOL**2 * right.square().sum(total, keepdim=True)
    for iteration in range(MOST_ITERATIONS):
        if iteration % CHECK_EVERY == 0 and bool((power <= enough).all()):
            break
        image = degree * p - _sum_of_neighbours(p) * inside
        step = power / (p * image).sum(total, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        x, r = x + step * p, r - step * image
        following = r.square().sum(total, keepdim=True)
        p, power = r + following / power.clamp(min=torch.finfo(p.dtype).tiny) * p, following
    return x


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """Sum the six face neighbours of each voxel (b 1 x y z); there are none outside the volume."""
    total = torch.zeros_like(values)
    for axis in (2, 3, 4):
        size = values.shape[axis]
        total.narrow(axis, 1, size - 1).add_(values.narrow(axis, 0, size - 1))
        total.narrow(axis, 0, size - 1).add_(values.narrow(axis, 1, size - 1))
    return total
