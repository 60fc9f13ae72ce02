"""Estimate the bias field of an MRI scan: the smooth gain that coils and the radio-frequency field give to it.

log v = log(mean of white matter) + polynomial of the position + noise     in white matter

Scans of one scanner share much of their bias field, such as the bright centre at 3 T, and a network that is trained on
them expects it in every scan. Divided by it, scans of all scanners are alike.
"""

from collections.abc import Sequence

import numpy as np
from numpy.polynomial.legendre import leggrid3d, legvander3d
from scipy import ndimage

DEGREE = 3  # of the polynomial
STEP_MM = 3.0  # distance of the voxels that it is fitted to
OUTLIERS = (0.4, 0.3, 0.2, 0.2)  # largest logarithm of an intensity over the median, in each iteration
MIN_VOXELS = 200  # of white matter; with fewer the field is 1
BEYOND = 0.1  # largest logarithm of the field over its range in white matter: further out a polynomial has no bound


def bias_field(image: np.ndarray, white: np.ndarray, *, spacing_mm: Sequence[float]) -> np.ndarray:
    """Estimate the bias field of a T1w scan from its white matter.

    Args:
        image: (x, y, z).
        white: (x, y, z) bool, visible white matter, as a registered atlas labels it: voxels at its border and of other
            intensities are left out.
        spacing_mm: of the voxels along each axis.

    Returns:
        float32 (x, y, z), above 0, 1 on geometric average over white matter, at most `BEYOND` outside its range there,
        and constant beyond its ends; all 1 where too little white matter is found.

    Source: Van Leemput et al. 1999 (IEEE Trans. Med. Imaging 18:885), eq. 5, for one tissue and hard labels.

    Examples:
        >>> gain = np.exp(np.linspace(-0.1, 0.1, 20))[:, None, None] * np.ones((20, 20, 20))
        >>> field = bias_field(gain, gain > 0, spacing_mm=(3.0, 3.0, 3.0))
        >>> bool(np.allclose(field, gain, rtol=1e-3))
        True
    """
    every = tuple(slice(None, None, max(1, round(STEP_MM / mm))) for mm in spacing_mm)
    voxels = np.argwhere(ndimage.binary_erosion(white[every]) & (image[every] > 0))
    if len(voxels) < MIN_VOXELS:
        return np.ones(image.shape, np.float32)
    axes = [np.linspace(-1, 1, n) for n in image.shape]
    positions = [axis[step][index] for axis, step, index in zip(axes, every, voxels.T, strict=True)]
    powers = np.indices([DEGREE + 1] * 3).sum(0) <= DEGREE
    basis = legvander3d(*positions, [DEGREE] * 3)[:, powers.flatten()]
    values = np.log(image[every][tuple(voxels.T)].astype(np.float64))
    fitted = np.zeros_like(values)
    for limit in OUTLIERS:
        used = np.abs(values - fitted - np.median(values - fitted)) < limit
        solution, *_ = np.linalg.lstsq(basis[used], values[used], rcond=None)
        fitted = basis @ solution
    coefficients = np.zeros(powers.shape)
    coefficients[powers], coefficients[0, 0, 0] = solution, solution[0] - fitted.mean()
    clipped = (np.clip(axis, own.min(), own.max()) for axis, own in zip(axes, positions, strict=True))
    limits = fitted.min() - fitted.mean() - BEYOND, fitted.max() - fitted.mean() + BEYOND
    return np.exp(np.clip(leggrid3d(*clipped, coefficients), *limits)).astype(np.float32)
