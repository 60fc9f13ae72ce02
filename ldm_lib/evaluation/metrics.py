"""Compute the scores of the BraTS inpainting challenge, and their means over patients with bootstrap intervals.

All scores are of the healthy mask only, on intensities normalised by two percentiles of the voided image. Axes are
`x y z` in the file's own voxel order: the challenge's SSIM is 2-D, one slice along x at a time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

PERCENTILES = (0.5, 99.5)
WINDOW_SIGMA_VOX, WINDOW_RADIUS_VOX = 1.5, 5
K1, K2 = 0.01, 0.03
# Spheres of 27 mm and 42 mm diameter; four real healthy masks have 14, 35, 60 and 79 mL, synthetic ones 6 to 25 mL.
SMALL_BELOW_MM3, LARGE_FROM_MM3 = 10_000.0, 40_000.0
RESAMPLES = 2000  # bootstrap means of an interval


def brats_scores(
    prediction: ArrayLike, target: ArrayLike, voided: ArrayLike, healthy_mask: ArrayLike, *, where: str = ""
) -> dict[str, float]:
    """Compute the challenge's scores of one case: `ssim`, `psnr_01` in dB, `mse`, `rmse` and `mae`.

    Errors are in units of the normalised intensity, which lies in [0, 1]. A perfect prediction has
    `psnr_01` = inf and `ssim` = 1.

    Args:
        prediction, target: (x, y, z), whole volumes in the source's units.
        voided: (x, y, z), the voided T1n; it alone sets the normalisation.
        healthy_mask: (x, y, z), nonzero where voxels are scored.
        where: the case, for error messages.

    Raises:
        InputError: volumes that are not 3-D, differ in shape, hold a non-finite voxel, or leave no
            intensity range; an empty mask.

    Source: BraTS Local Synthesis of Tissue via Inpainting, arXiv 2305.08992; SSIM of Wang et al.,
    IEEE TIP 13 (2004) 600, equation 13.
    """
    p, t, mask, _ = _normalised(prediction, target, voided, healthy_mask, where)
    similarity = ssim_by_slice(p, t, data_range=float(max(np.ptp(p), np.ptp(t))))
    return {"ssim": float(similarity[mask].mean()), **_errors((p - t)[mask])}


def ssim_by_slice(prediction: np.ndarray, target: np.ndarray, *, data_range: float) -> np.ndarray:
    """Compute the structural similarity of every voxel within its plane of axes y and z, for each x separately.

    Gaussian window of sigma 1.5 and 11x11 voxels, mirrored at the borders without repeating the edge. `data_range` is L
    of the constants (K1 L)^2 and (K2 L)^2.

    Source: Wang et al., IEEE TIP 13 (2004) 600, equation 13.
    """
    mu_p, mu_t = _window_mean(prediction), _window_mean(target)
    var_p = np.maximum(_window_mean(prediction**2) - mu_p**2, 0)
    var_t = np.maximum(_window_mean(target**2) - mu_t**2, 0)
    cov = _window_mean(prediction * target) - mu_p * mu_t
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * mu_p * mu_t + c1) * (2 * cov + c2)
    below = (mu_p**2 + mu_t**2 + c1) * (var_p + var_t + c2)
    # 0 / 0 arises when both volumes are 0 throughout: they are equal.
    return np.divide(above, below, out=np.ones_like(above), where=below > 0)


def scores_by_tissue(
    prediction: ArrayLike,
    target: ArrayLike,
    voided: ArrayLike,
    healthy_mask: ArrayLike,
    tissue: ArrayLike,
    *,
    where: str = "",
) -> list[dict[str, str | int | float]]:
    """Compute `psnr_01`, `mse`, `rmse` and `mae` of each tissue in the healthy mask, one row per tissue.

    Rows have `tissue` (CSF, GM, WM), `voxels`, and the scores with the normalisation of the whole case; these are NaN
    for a tissue without voxels. The other arguments and errors are those of `brats_scores`.

    Args:
        tissue: (x, y, z) labels, CSF 1, GM 2, WM 3; voxels of other labels are in no row.
    """
    tissue = np.asarray(tissue)
    _check_shapes({"target": np.asarray(target), "tissue": tissue}, where)
    p, t, mask, box = _normalised(prediction, target, voided, healthy_mask, where)
    rows = []
    for label, name in TISSUES.items():
        difference = (p - t)[mask & (tissue[box] == label)]
        rows.append({"tissue": name, "voxels": difference.size, **_errors(difference)})
    return rows


def mask_size_class(volume_mm3: float) -> str:
    """Return the size class of a mask: `small` below 10 mL, `large` from 40 mL on, `medium` between."""
    if volume_mm3 < SMALL_BELOW_MM3:
        return "small"
    return "medium" if volume_mm3 < LARGE_FROM_MM3 else "large"


def bootstrap_by_patient(
    values: ArrayLike, patients: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Compute the mean over patients and its percentile interval: `mean`, `low`, `high`, number of `patients`, `masks`.

    Masks of one patient are not independent: they are averaged first, and patients are drawn with replacement. NaN
    values are left out. There is no interval (NaN) for one patient or an infinite score.

    Args:
        values, patients: score and patient of each mask.
        level: fraction of the resampled means inside the interval.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values, names = np.asarray(values, np.float64), np.asarray(patients, str)
    values, names = values[~np.isnan(values)], names[~np.isnan(values)]
    means = np.array([values[names == name].mean() for name in np.unique(names)])
    low = high = np.nan
    if means.size > 1 and np.isfinite(means).all():
        drawn = np.random.default_rng(seed).integers(0, means.size, (RESAMPLES, means.size))
        low, high = np.percentile(means[drawn].mean(axis=1), [50 * (1 - level), 50 * (1 + level)])
    mean = float(means.mean()) if means.size else np.nan
    return {"mean": mean, "low": float(low), "high": float(high), "patients": means.size, "masks": values.size}


def _errors(difference: np.ndarray) -> dict[str, float]:
    """Compute the error scores of normalised differences; NaN if there are none."""
    if difference.size == 0:
        return dict.fromkeys(("psnr_01", "mse", "rmse", "mae"), np.nan)
    mse = float(np.mean(difference**2))
    return {
        "psnr_01": -10 * float(np.log10(mse)) if mse > 0 else np.inf,
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(np.mean(np.abs(difference))),
    }


def _normalised(
    prediction: ArrayLike, target: ArrayLike, voided: ArrayLike, healthy_mask: ArrayLike, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[slice, ...]]:
    """Mask prediction and target, normalise them to [0, 1] by the voided image, and crop them and the mask to a box.

    The box, returned last, is the mask's, widened by the reach of the SSIM window. Windows of masked voxels meet its
    border only where it is the volume's, so mirroring agrees. The window has no extent in x, but the margin there puts
    unmasked voxels into the box whenever the volume has any: the range of intensities is then that of the whole volume.
    """
    volumes = {"prediction": prediction, "target": target, "voided": voided, "mask": healthy_mask}
    volumes = {name: np.asarray(volume) for name, volume in volumes.items()}
    _check_shapes(volumes, where)
    for name, volume in volumes.items():
        if bad := volume.size - np.count_nonzero(np.isfinite(volume)):
            raise InputError(f"{bad} of {volume.size} voxels of the {name} are not finite", where=where,
                             fix="replace NaN and infinity by finite values")  # fmt: skip
    mask: np.ndarray = volumes["mask"] != 0
    if not mask.any():
        raise InputError("the healthy mask is empty", where=where, fix="give a mask with at least one voxel")
    lo, hi = _intensity_range(volumes["voided"], where)
    box = bounding_box(mask, WINDOW_RADIUS_VOX)
    mask = mask[box]
    p, t = (
        (np.clip(volumes[name][box].astype(np.float64) * mask, lo, hi) - lo) / (hi - lo)
        for name in ("prediction", "target")
    )
    return p, t, mask, box


def _intensity_range(voided: np.ndarray, where: str) -> tuple[float, float]:
    lo, hi = (float(bound) for bound in np.percentile(voided, PERCENTILES))
    lo = max(lo, 0.0)
    if not lo < hi:
        percentiles = f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of the voided image are {lo:g} and {hi:g}"
        raise InputError(f"{percentiles}: no intensity range to normalise by", where=where,
                         fix="check that the voided image holds a brain")  # fmt: skip
    return lo, hi


def _window_mean(volume: np.ndarray) -> np.ndarray:
    return gaussian_filter(volume, WINDOW_SIGMA_VOX, radius=WINDOW_RADIUS_VOX, mode="mirror", axes=(1, 2))


def _check_shapes(volumes: Mapping[str, np.ndarray], where: str) -> None:
    shapes = {name: volume.shape for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"shapes differ: {shapes}", where=where, fix="give volumes of one grid")
    shape = next(iter(shapes.values()))
    if len(shape) != 3:
        raise InputError(f"volumes are {len(shape)}-D, {shape}", where=where, fix="give (x, y, z)")
