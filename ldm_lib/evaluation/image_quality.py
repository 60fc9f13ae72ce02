"""Measure how a reconstructed volume differs from the true one: scores over the brain, spectra, blocking artefacts.

Volumes are numpy arrays (x, y, z), normalised; air is 0, and brain is what is above it.
"""

from collections.abc import Sequence

import numpy as np

from ldm_lib.evaluation.metrics import ssim_by_slice

PEAK = 1.0  # of PSNR and SSIM: the normalised scale itself


def brain_scores(rebuilt: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Compute `psnr` in dB, `ssim` and `mae` over the voxels of the image that are above 0.

    A voided image is thereby scored outside its mask. The peak of PSNR and the range of SSIM are 1, the normalised
    scale itself, so that PSNR is -10 log10 of the mean squared error.
    """
    brain = image > 0
    difference = (np.asarray(rebuilt, np.float64) - image)[brain]
    similarity = ssim_by_slice(np.asarray(rebuilt, np.float64), np.asarray(image, np.float64), data_range=PEAK)
    mae = float(np.abs(difference).mean())
    return {"psnr": psnr(difference), "ssim": float(similarity[brain].mean()), "mae": mae}


def psnr(difference: np.ndarray) -> float:
    """Compute -10 log10 of the mean square of normalised differences, dB; inf if all are 0, NaN without any voxel."""
    mean_square = rms(difference) ** 2
    return -10 * float(np.log10(mean_square / PEAK**2)) if mean_square != 0 else np.inf


def rms(values: np.ndarray) -> float:
    """Compute the root mean square; NaN without any value."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else np.nan


def error_spectrum(rebuilt: np.ndarray, image: np.ndarray, spacing_mm: Sequence[float]) -> list[dict[str, float]]:
    """Compute the power of an image and of its error by spatial frequency, up to the coarsest axis' Nyquist frequency.

    Rows have `cycles_per_mm` (above 0), and `image` and `error` as `power_spectrum` gives them.
    """
    frequency, image_power = power_spectrum(image, spacing_mm)
    _, error_power = power_spectrum(np.asarray(rebuilt, np.float64) - image, spacing_mm)
    nyquist = 0.5 / max(spacing_mm) * (1 + 1e-9)
    table = np.stack([frequency, image_power, error_power], axis=1)[1:]
    names = ("cycles_per_mm", "image", "error")
    return [dict(zip(names, row, strict=True)) for row in table[table[:, 0] <= nyquist].tolist()]


def power_spectrum(image: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in cycles per mm, and the power summed over the shell of wave vectors around each.

    Shells are as thick as the longest axis' lowest frequency. Over all shells, to the corners of the spectrum, power
    adds up to the mean square of the image (Parseval's theorem); without the first, to its variance.
    """
    shape, last = image.shape, image.shape[-1]
    power = np.abs(np.fft.rfftn(image)) ** 2 / image.size**2
    power[..., 1 : (last + 1) // 2] *= 2  # their mirror images are left out by rfftn
    axes = [np.fft.fftfreq(n, h) for n, h in zip(shape[:2], spacing_mm[:2], strict=True)]
    x, y, z = np.ix_(*axes, np.fft.rfftfreq(last, spacing_mm[2]))
    step = 1 / max(n * h for n, h in zip(shape, spacing_mm, strict=True))
    shell = np.rint(np.sqrt(x**2 + y**2 + z**2) / step).astype(int)
    summed = np.bincount(shell.ravel(), power.ravel())
    return np.arange(len(summed)) * step, summed


def blockiness(image: np.ndarray, brain: np.ndarray, period: int) -> float:
    """Measure the blocking artefacts of an image (x, y, z): 1 is none.

    The mean absolute difference between neighbours across planes at multiples of `period` voxels, over that across
    all other planes; the mean of the three axes. Both neighbours lie in `brain`, bool (x, y, z). NaN where an axis
    has no such pair, as with a period of 1.
    """
    return float(np.mean([_step_ratio(np.moveaxis(image, k, 0), np.moveaxis(brain, k, 0), period) for k in range(3)]))


def _step_ratio(image: np.ndarray, brain: np.ndarray, period: int) -> float:
    steps, pairs = np.abs(np.diff(image, axis=0)), brain[1:] & brain[:-1]
    at_grid = np.arange(1, len(image)) % period == 0
    across, elsewhere = (steps[planes][pairs[planes]] for planes in (at_grid, ~at_grid))
    if not across.size or not elsewhere.size:
        return np.nan
    if not elsewhere.any():
        return np.inf if across.any() else 1.0
    return float(across.mean(dtype=np.float64) / elsewhere.mean(dtype=np.float64))
