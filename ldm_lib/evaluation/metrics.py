"""The scores of the BraTS inpainting challenge, their break-downs and their aggregates.

All of them judge the healthy mask only, on intensities normalised by two percentiles of the voided image.
Axes are `x y z` in the file's own voxel order: the challenge's SSIM is 2-D, one slice along x at a time.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter

from ldm_lib.anatomy.tissue import TISSUES
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

PERCENTILES = (0.5, 99.5)
WINDOW_SIGMA_VOX, WINDOW_RADIUS_VOX = 1.5, 5
K1, K2 = 0.01, 0.03
# Spheres of 27 mm and 42 mm diameter; real healthy holes measured 14, 35, 60 and 79 mL, synthetic ones 6 to 25 mL.
SMALL_HOLE_BELOW_MM3, LARGE_HOLE_FROM_MM3 = 10_000.0, 40_000.0

Box = tuple[slice, ...]


def brats_scores(
    prediction: ArrayLike,
    target: ArrayLike,
    voided: ArrayLike,
    healthy_mask: ArrayLike,
    *,
    where: str = "",
) -> dict[str, float]:
    """The challenge's scores of one case: `ssim`, `psnr_01` in dB, `mse`, `rmse` and `mae`.

    Errors are in units of the normalised intensity, which lies in [0, 1]. A perfect prediction has
    `psnr_01` = inf and `ssim` = 1.

    Args:
        prediction: (x, y, z), the whole volume in the source's units.
        target: (x, y, z), the full T1n.
        voided: (x, y, z), the T1n with its hole; it alone sets the normalisation.
        healthy_mask: (x, y, z), nonzero where voxels are judged.
        where: the case, named by errors.

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
    """Structural similarity of every voxel within its plane of axes y and z, each x by itself.

    Gaussian window of sigma 1.5 and 11x11 voxels, mirrored at the borders without repeating the edge.

    Args:
        prediction, target: (x, y, z) of the same range.
        data_range: L of the constants (K1 L)^2 and (K2 L)^2.

    Source: Wang et al., IEEE TIP 13 (2004) 600, equation 13.
    """
    mu_p, mu_t = _window_mean(prediction), _window_mean(target)
    var_p = np.maximum(_window_mean(prediction**2) - mu_p**2, 0)
    var_t = np.maximum(_window_mean(target**2) - mu_t**2, 0)
    cov = _window_mean(prediction * target) - mu_p * mu_t
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * mu_p * mu_t + c1) * (2 * cov + c2)
    below = (mu_p**2 + mu_t**2 + c1) * (var_p + var_t + c2)
    # 0 / 0 arises when both volumes are 0 throughout: they are alike.
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
    """`psnr_01`, `mse`, `rmse` and `mae` of each tissue in the healthy mask, one row a tissue.

    Rows have `tissue` (CSF, GM, WM), `voxels`, and the scores with the normalisation of the whole
    case; a tissue without voxels has NaN scores. Voxels of other labels are in no row.

    Args:
        prediction, target, voided, healthy_mask, where: as in `brats_scores`.
        tissue: (x, y, z) labels, CSF 1, GM 2, WM 3.

    Raises:
        InputError: as `brats_scores`.
    """
    tissue = np.asarray(tissue)
    _check_shapes({"target": np.asarray(target), "tissue": tissue}, where)
    p, t, mask, box = _normalised(prediction, target, voided, healthy_mask, where)
    rows = []
    for label, name in TISSUES.items():
        difference = (p - t)[mask & (tissue[box] == label)]
        rows.append({"tissue": name, "voxels": difference.size, **_errors(difference)})
    return rows


def hole_size_class(volume_mm3: float) -> str:
    """`small` below 10 mL, `large` from 40 mL on, `medium` between."""
    if volume_mm3 < SMALL_HOLE_BELOW_MM3:
        return "small"
    return "medium" if volume_mm3 < LARGE_HOLE_FROM_MM3 else "large"


def aggregate(rows: Iterable[Mapping[str, float]], keys: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean, median and population standard deviation (ddof 0) of each key over the rows.

    NaN (a tissue that a case lacks) is left out; with nothing left all three are NaN. A perfect case's
    infinite `psnr_01` stays in, as in the challenge: the mean is then inf and the deviation NaN, and
    the median still tells.

    Raises:
        InputError: a row without one of the keys.
    """
    rows = list(rows)
    return {key: _moments(_column(rows, key)) for key in keys}


def bootstrap_by_patient(
    values: ArrayLike, patients: Sequence[str], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Mean over patients and its percentile interval: `mean`, `low`, `high`, and how many `patients` and `holes`.

    Holes of one patient are not independent: they are averaged first, and it is patients that are drawn, with
    replacement. Values that are NaN are left out. There is no interval (NaN) for one patient or an infinite score.

    Args:
        values: a score of each hole.
        patients: whose hole it is.
        level: share of the resampled means inside the interval.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values, names = np.asarray(values, np.float64), np.asarray(patients, str)
    values, names = values[~np.isnan(values)], names[~np.isnan(values)]
    means = np.array([values[names == name].mean() for name in np.unique(names)])
    low = high = np.nan
    if means.size > 1 and np.isfinite(means).all():
        drawn = np.random.default_rng(seed).integers(0, means.size, (resamples, means.size))
        low, high = np.percentile(means[drawn].mean(axis=1), [50 * (1 - level), 50 * (1 + level)])
    mean = float(means.mean()) if means.size else np.nan
    return {"mean": mean, "low": float(low), "high": float(high), "patients": means.size, "holes": values.size}


def _column(rows: list[Mapping[str, float]], key: str) -> np.ndarray:
    lacking = [index for index, row in enumerate(rows) if key not in row]
    if lacking:
        raise InputError(
            f"row {lacking[0]} of {len(rows)} has no score {key!r}; it has {sorted(rows[lacking[0]])}",
            where="aggregate",
            fix="ask for scores that every row has",
        )
    values = np.array([row[key] for row in rows], dtype=np.float64)
    return values[~np.isnan(values)]


def _moments(values: np.ndarray) -> dict[str, float]:
    if values.size == 0:
        return dict.fromkeys(("mean", "median", "std"), np.nan)
    std = values.std() if np.isfinite(values).all() else np.nan
    return {"mean": float(values.mean()), "median": float(np.median(values)), "std": float(std)}


def _errors(difference: np.ndarray) -> dict[str, float]:
    """Error scores of normalised differences, whatever their shape; NaN of none."""
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
    prediction: ArrayLike,
    target: ArrayLike,
    voided: ArrayLike,
    healthy_mask: ArrayLike,
    where: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Box]:
    """Prediction and target, masked and then brought to [0, 1] by the voided image; mask and box.

    All three are cropped to the box, which holds whatever the scores depend on.
    """
    volumes = {"prediction": prediction, "target": target, "voided": voided, "mask": healthy_mask}
    volumes = {name: np.asarray(volume) for name, volume in volumes.items()}
    _check_shapes(volumes, where)
    _check_finite(volumes, where)
    mask: np.ndarray = volumes["mask"] != 0
    if not mask.any():
        raise InputError("the healthy mask is empty", where=where, fix="give the mask of a hole")
    lo, hi = _intensity_range(volumes["voided"], where)
    box = _window_box(mask)
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
        raise InputError(
            f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of the voided image are {lo:g} and"
            f" {hi:g}: no intensity range to normalise by",
            where=where,
            fix="check that the voided image holds a brain",
        )
    return lo, hi


def _window_mean(volume: np.ndarray) -> np.ndarray:
    return gaussian_filter(volume, WINDOW_SIGMA_VOX, radius=WINDOW_RADIUS_VOX, mode="mirror", axes=(1, 2))


def _window_box(mask: np.ndarray) -> Box:
    """The mask's bounding box, grown by what the window reaches, within the volume.

    Windows of masked voxels meet the box's border only where it is the volume's, so mirroring agrees.
    The window has no extent in x, but the growth there puts unmasked voxels into the box whenever the
    volume has any: the range of intensities is then that of the whole volume too.
    """
    return bounding_box(mask, WINDOW_RADIUS_VOX)


def _check_shapes(volumes: Mapping[str, np.ndarray], where: str) -> None:
    shapes = {name: volume.shape for name, volume in volumes.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"shapes differ: {shapes}", where=where, fix="give volumes of one grid")
    shape = next(iter(shapes.values()))
    if len(shape) != 3:
        raise InputError(f"volumes are {len(shape)}-D, {shape}", where=where, fix="give (x, y, z)")


def _check_finite(volumes: Mapping[str, np.ndarray], where: str) -> None:
    for name, volume in volumes.items():
        bad = volume.size - np.count_nonzero(np.isfinite(volume))
        if bad:
            raise InputError(
                f"{bad} of {volume.size} voxels of the {name} are not finite",
                where=where,
                fix="replace NaN and infinity by finite values",
            )
