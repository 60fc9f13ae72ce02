"""Inpaint without a network: the baselines that a learned model has to outperform.

Axes are `x y z`. The mask is nonzero where the volume is inpainted; the brain is what differs from 0 outside it (real
files hold negative brain voxels). Every baseline returns a float32 volume that equals the voided one outside the mask
and does not depend on the voxels under it. It raises InputError for volumes that are not 3-D or differ in shape, for a
voxel outside the mask that is not finite, and where there is nothing outside the mask to fill it from.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import gaussian_filter

from ldm_lib.errors import InputError
from ldm_lib.poisson import harmonic

HARMONIC_RTOL = 5e-7  # relative residual, with room for rounding the solution to float32
BORDER_SIGMA_VOX = 1.0  # standard deviation of the Gaussian that softens the borders between painted tissues


def mean_fill(voided: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """Fill with the mean of the brain outside the mask."""
    known, mask = _known(voided, mask)
    return _pasted(known, mask, _brain_mean(known)) if mask.any() else known


def mirror_fill(voided: ArrayLike, mask: ArrayLike, *, lateral_axis: int) -> np.ndarray:
    """Fill the mask with the other hemisphere, mirrored at the brain's mid-sagittal plane.

    The plane is perpendicular to the lateral axis, at the voxel or half voxel where the brain resembles
    its mirror image most. Voxels whose mirror lies in the mask, in air or outside the volume get
    the mean of the brain.

    Args:
        lateral_axis: the array's left-right axis, 0 to 2; 0 for files in RAS or LPS order.
    """
    known, mask = _known(voided, mask)
    if not mask.any():
        return known
    lateral_first = np.moveaxis(known, lateral_axis, 0)
    mirrored = np.zeros_like(lateral_first)
    index = np.arange(len(mirrored))
    partner = mirror_sum_vox(known, mask, lateral_axis=lateral_axis) - index
    inside = (partner >= 0) & (partner < len(mirrored))
    mirrored[inside] = lateral_first[partner[inside]]
    mirrored = np.moveaxis(mirrored, 0, lateral_axis)
    return _pasted(known, mask, np.where(mirrored == 0, _brain_mean(known), mirrored))


def mirror_sum_vox(voided: ArrayLike, mask: ArrayLike, *, lateral_axis: int) -> int:
    """Find the mid-sagittal plane: twice its position, the sum of the indices of two mirrored voxels.

    The plane maximises the correlation between the volume and its mirror image over the pairs of voxels that both lie
    outside the mask. Only planes that leave less than half of the volume without a partner are considered.
    """
    known, mask = _known(voided, mask)
    volume = np.moveaxis(known / np.abs(known).max(initial=1e-9), lateral_axis, 0)
    weight = np.moveaxis(~mask, lateral_axis, 0).astype(np.float32)
    sums = 2 * len(volume) - 1
    length = next_fast_len(sums, real=True)
    ones, first, second = (rfft(v, length, axis=0) for v in (weight, volume, volume**2))

    def over_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Sum a(x) b(s - x) over all x and columns, for every index sum s."""
        return irfft((a * b).sum(axis=(1, 2), dtype=np.complex128), length)[:sums]

    pairs = over_pairs(ones, ones)
    enough = pairs > 0.5 * pairs.max()
    pairs = np.maximum(pairs, 1)
    mean = over_pairs(first, ones) / pairs
    variance = over_pairs(second, ones) / pairs - mean**2
    covariance = over_pairs(first, first) / pairs - mean**2
    correlation = covariance / np.maximum(variance, 1e-12)
    return int(np.argmax(np.where(enough, correlation, -np.inf)))


def harmonic_fill(voided: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """Fill with the solution of Laplace's equation: the smoothest continuation of the mask's edge.

    Each filled voxel is the mean of its six neighbours, with the voxels around the mask given
    (air too) and no flux through the volume's border. The equations hold to a relative residual of 1e-6.
    """
    known, mask = _known(voided, mask)
    if not mask.any():
        return known
    if mask.all():
        raise InputError(f"the mask covers all {mask.size} voxels: no edge to continue from", where="harmonic_fill",
                         fix="give a mask that leaves part of the volume")  # fmt: skip
    filled = known.copy()
    filled[mask] = harmonic(known, mask, rtol=HARMONIC_RTOL, dtype=np.float64)
    return filled


def tissue_paint(voided: ArrayLike, mask: ArrayLike, tissue: ArrayLike) -> np.ndarray:
    """Fill with the mean of each tissue outside the mask, by the tissue map, and smooth.

    Args:
        tissue: (x, y, z) labels; 0 is air and painted 0. A label without brain outside the mask gets
            the mean of the brain.
    """
    known, mask = _known(voided, mask)
    tissue = _of_this_grid(tissue, mask)
    if not mask.any():
        return known
    painted = known.copy()
    for label in np.unique(tissue[mask]):
        if label:
            sample = known[(tissue == label) & (known != 0)]
            mean = sample.mean(dtype=np.float64) if sample.size else _brain_mean(known)
            painted[mask & (tissue == label)] = mean
    # Smoothing with the real surroundings scored 0.1 to 0.5 dB better than painting them too.
    return _pasted(known, mask, gaussian_filter(painted, BORDER_SIGMA_VOX))


def initial_estimate_baseline(
    voided: ArrayLike, mask: ArrayLike, tissue: ArrayLike, *, spacing_mm: float
) -> np.ndarray:
    """Fill with the initial estimate that a denoiser is conditioned on (`anatomy.initial_estimate`), in any units."""
    from ldm_lib.anatomy.initial_estimate import initial_estimate  # loads torch, which no other baseline needs

    known, mask = _known(voided, mask)
    return initial_estimate(known, mask, _of_this_grid(tissue, mask), spacing_mm=spacing_mm)


# All have one signature, f(voided, mask, tissue=labels, lateral_axis=axis, spacing_mm=edge); each takes what it needs.
BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "mean intensity": lambda voided, mask, **_: mean_fill(voided, mask),
    "mirror": lambda voided, mask, *, lateral_axis, **_: mirror_fill(voided, mask, lateral_axis=lateral_axis),
    "harmonic": lambda voided, mask, **_: harmonic_fill(voided, mask),
    "tissue paint": lambda voided, mask, *, tissue, **_: tissue_paint(voided, mask, tissue),
    "initial estimate": lambda voided, mask, *, tissue, spacing_mm, **_: initial_estimate_baseline(
        voided, mask, tissue, spacing_mm=spacing_mm
    ),
}
OF_TISSUE = ("tissue paint", "initial estimate")  # baselines that need a tissue map


def _known(voided: ArrayLike, mask: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return a float32 copy of the volume with 0 under the mask, and the mask as bool."""
    voided, mask = np.asarray(voided), np.asarray(mask) != 0
    if voided.shape != mask.shape or voided.ndim != 3:
        raise InputError(f"the voided volume is {voided.shape}, the mask {mask.shape}; both must be one (x, y, z)",
                         fix="give the mask of this volume")  # fmt: skip
    known = np.where(mask, 0, voided).astype(np.float32)
    if bad := known.size - np.count_nonzero(np.isfinite(known)):
        raise InputError(f"{bad} of {known.size} voxels outside the mask are not finite",
                         fix="replace NaN and infinity by finite values")  # fmt: skip
    return known, mask


def _of_this_grid(tissue: ArrayLike, mask: np.ndarray) -> np.ndarray:
    tissue = np.asarray(tissue)
    if tissue.shape != mask.shape:
        raise InputError(f"the tissue map is {tissue.shape}, the voided volume {mask.shape}",
                         fix="resample the map to the volume's grid")  # fmt: skip
    return tissue


def _brain_mean(known: np.ndarray) -> float:
    brain = known[known != 0]
    if brain.size == 0:
        raise InputError(f"none of {known.size} voxels outside the mask differs from 0: there is no brain",
                         fix="check that volume and mask are not swapped")  # fmt: skip
    return float(brain.mean(dtype=np.float64))


def _pasted(known: np.ndarray, mask: np.ndarray, values: ArrayLike) -> np.ndarray:
    return np.where(mask, values, known).astype(np.float32)
