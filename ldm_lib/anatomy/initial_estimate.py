"""Estimate the masked region from the tissue map and the intensities around it, as a start for the diffusion model.

p        = b_0 + sum over tissues k and widths s of b_ks (G_s * [tissue = k]),  ridge regression on the visible voxels
estimate = w p + h,  h harmonic in the mask, h = image - w p on the voxels around it

The same tissue map is used inside and outside the mask, so that the regression learns how reliable it is. A map that
fits the visible voxels better than the hidden ones, such as one that was refined by the scan's own intensities, would
be trusted too much. Air at the brain's surface is not known to be dark, see `air_at_surface`.

Everything but distances is computed in torch, in batches: training and inference share these functions.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.geometry import bounding_box, face_neighbours

REGRESSION_WEIGHT = 0.6  # w: chosen on left-out people and synthetic patients, see docs/registration.md
WIDTHS_MM = (1.0, 3.0)  # s: a voxel, and about the error of a registered atlas
NEAR_MM, FAR_MM = 15.0, 40.0  # the regression's weights fall by 1/e over NEAR, and end at FAR
SURFACE_MM = 10.0  # of the registered atlas, within which the surface of the brain may be
RIDGE = 1e-3  # relative to the mean variance of the regressors
MIN_VISIBLE_VOXELS = 100  # of COARSE_MM; with fewer there is no regression
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
    one = [torch.from_numpy(np.ascontiguousarray(array[box]))[None, None] for array in (filled, mask, tissue, air)]
    estimate = fill(*one, spacing_mm=spacing_mm)
    filled[mask] = estimate[0, 0].numpy()[mask[box]]
    return filled


def air_at_surface(
    image: np.ndarray, mask: np.ndarray, tissue: np.ndarray, *, spacing_mm: Sequence[float]
) -> np.ndarray:
    """Return the voxels of air next to the mask from which nothing is continued into it, bool (x, y, z).

    A lesion that is drawn up to the brain's surface ends at air, which says nothing about the intensity of the lesion's
    edge. Air farther from all tissue than a registration errs is what the mask continues where it was drawn beyond
    the surface.

    Args:
        image: (x, y, z), 0 in air.
        mask: (x, y, z) bool, True = inpaint.
        tissue: (x, y, z) labels, 0 none.
        spacing_mm: edges of a voxel.
    """
    found = face_neighbours(mask) & (image <= 0)
    if not found.any():
        return found
    box = bounding_box(found, [int(np.ceil(SURFACE_MM / mm)) + 1 for mm in spacing_mm])
    if not tissue[box].any():
        return np.zeros_like(found)
    found[box] &= ndimage.distance_transform_edt(tissue[box] == 0, sampling=spacing_mm) <= SURFACE_MM
    return found


def fill(image: Tensor, mask: Tensor, tissue: Tensor, air: Tensor, *, spacing_mm: float) -> Tensor:
    """Fill the masked regions of a batch of images: `initial_estimate` in torch, on any device.

    Args:
        image: (b 1 x y z) normalised, 0 under the mask.
        mask, air: (b 1 x y z) bool, voxels to fill, and air that is not continued into them.
        tissue: (b 1 x y z) labels.
        spacing_mm: edge of an isotropic voxel.

    Returns:
        (b 1 x y z) float32, at least 0 under the mask.
    """
    core = (..., *bounding_box(mask.any(0)[0].cpu().numpy(), 1))
    regression = REGRESSION_WEIGHT * _regression(image, mask, tissue, core, spacing_mm)
    residual = torch.where(mask[core], 0, image[core] - regression)
    inside = regression + continue_harmonically(residual, mask[core], air[core])
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
    filled = fill(image, hidden, tissue[every], air, spacing_mm=coarse_mm)
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


def gaussian_blur(
    volumes: Tensor, sigma_vox: float | Sequence[float], kept: Sequence[slice] = (slice(None),) * 3
) -> Tensor:
    """Blur volumes (b c x y z) by a Gaussian, mirrored at the borders, by one matrix product along each axis.

    Args:
        kept: the voxels of each axis that are computed.
    """
    sizes, sigmas = volumes.shape[2:], np.broadcast_to(sigma_vox, 3).tolist()
    x, y, z = (_blur_matrix(n, s)[rows].to(volumes) for n, s, rows in zip(sizes, sigmas, kept, strict=True))
    volumes = (x @ volumes.flatten(3)).unflatten(3, sizes[1:])
    return y @ volumes @ z.T


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma: float) -> Tensor:
    identity = np.eye(size)
    return torch.from_numpy(ndimage.gaussian_filter1d(identity, sigma, 0, truncate=TRUNCATE) if sigma else identity)


def _regression(image: Tensor, mask: Tensor, tissue: Tensor, core: tuple[slice, ...], spacing_mm: float) -> Tensor:
    """Return p in a box (b 1 x y z), or 0 where too little is visible; it is fitted on voxels of about `COARSE_MM`."""
    step = coarse_step(spacing_mm)
    every = (slice(None, None, step),) * 3
    one_hot = torch.cat([tissue == label for label in TISSUES], dim=1).float()
    # whole blocks, so that a thin mask between the voxels that are kept counts, too
    hidden = F.max_pool3d(mask.float(), step, ceil_mode=True) > 0
    weight = _weight(hidden, step * spacing_mm).flatten(2)
    labels = one_hot[(..., *every)].flatten(2)
    present = ((labels * (weight > 0)).sum(2) > 0).float().repeat(1, len(WIDTHS_MM))[..., None]  # b r 1
    usable = present.any(1) & ((weight > 0).sum(2) >= MIN_VISIBLE_VOXELS)

    def regressors(labels: Tensor, kept: Sequence[slice]) -> Tensor:
        blurred = [gaussian_blur(labels, width / spacing_mm, kept) for width in WIDTHS_MM]
        return torch.cat(blurred, dim=1) * present[..., None, None]

    w = (weight / weight.sum(2, keepdim=True).clamp(min=1e-12)).double()
    flat, values = regressors(one_hot, every).flatten(2).double(), image[(..., *every)].flatten(2).double()
    centre, mean = flat @ w.mT, values @ w.mT  # b r 1, b 1 1
    centred = flat - centre
    gram = (centred * w) @ centred.mT
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1) / present.sum((1, 2)).clamp(min=1)
    gram = gram + (ridge + torch.finfo(torch.float32).tiny)[:, None, None] * torch.eye(gram.shape[1]).to(gram)
    slopes = torch.linalg.solve(gram, centred @ ((values - mean) * w).mT)
    offset = mean - (slopes * centre).sum(1, keepdim=True)
    inside = regressors(*_with_margin(one_hot, core[1:], math.ceil(TRUNCATE * max(WIDTHS_MM) / spacing_mm)))
    fitted = offset[..., None, None].float() + (inside * slopes[..., None, None].float()).sum(1, keepdim=True)
    return torch.where(usable[..., None, None, None], fitted, 0)


def _with_margin(volumes: Tensor, box: Sequence[slice], margin: int) -> tuple[Tensor, list[slice]]:
    """Crop volumes (b c x y z) to a box and a margin, as far as they go; return them and where the box is in them."""
    starts = [max(side.start - margin, 0) for side in box]
    wide = [slice(start, side.stop + margin) for start, side in zip(starts, box, strict=True)]
    inner = [slice(side.start - start, side.stop - start) for start, side in zip(starts, box, strict=True)]
    return volumes[(..., *wide)], inner


def continue_harmonically(known: Tensor, mask: Tensor, air: Tensor) -> Tensor:
    """Solve Laplace's equation under the masks of a batch by conjugate gradients; see `poisson.masked_laplacian`.

    Args:
        known: (b 1 x y z), 0 under the mask.
        mask, air: (b 1 x y z) bool.

    Returns:
        (b 1 x y z) the solution under the mask, 0 elsewhere; all 0 without any voxel around the mask.
    """
    neighbours, faces, right = _masked_voxels(known, mask, ~mask & ~air)
    degree = faces + (neighbours > 0).sum(0)
    counts = mask.flatten(1).sum(1)
    sizes = counts.tolist()

    def total(values: Tensor) -> Tensor:
        """Sum over the voxels of each volume, for each voxel (n,), or once (1,) if there is one volume."""
        sums = torch.stack([part.sum() for part in values.split(sizes)])
        return sums if len(sums) == 1 else sums.repeat_interleave(counts)

    def laplacian(values: Tensor) -> Tensor:
        return degree * values - F.pad(values, (1, 0))[neighbours].sum(0)

    tiny = torch.finfo(known.dtype).tiny
    x = (total(right) / total(faces).clamp(min=1)).expand_as(right)
    r = right - laplacian(x)
    p, power = r, total(r.square())
    enough = ESTIMATE_RTOL**2 * total(right.square())
    for iteration in range(MOST_ITERATIONS):
        if iteration % CHECK_EVERY == 0 and bool((power <= enough).all()):
            break
        image = laplacian(p)
        step = power / total(p * image).clamp(min=tiny)
        x, r = x + step * p, r - step * image
        following = total(r.square())
        p, power = r + following / power.clamp(min=tiny) * p, following
    return torch.zeros_like(known).masked_scatter(mask, x)


def _masked_voxels(known: Tensor, mask: Tensor, edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the neighbours of the n masked voxels of a batch, which are numbered from 1.

    Returns:
        (6 n) number of each face neighbour, 0 for one that is not masked; (n,) how many neighbours are at the edge, and
        the sum of their values.
    """
    values, inside, edge = (F.pad(volume, (1,) * 6).flatten() for volume in (known, mask, edge))
    y, z = (n + 2 for n in mask.shape[3:])
    voxels = inside.nonzero()[:, 0]
    around = voxels + torch.tensor([-y * z, y * z, -z, z, -1, 1]).to(voxels)[:, None]
    number = inside.long().cumsum(0) * inside
    at_edge = edge[around]
    return number[around], at_edge.sum(0).float(), (values[around] * at_edge).sum(0)
