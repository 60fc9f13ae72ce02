"""The scores against torchmetrics, closed forms and the challenge's own conventions."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from ldm_lib.errors import InputError
from ldm_lib.evaluation.metrics import bootstrap_by_patient, brats_scores, mask_size_class, scores_by_tissue

SHAPE = (20, 26, 23)
REGIONS = {
    "inside": np.s_[7:14, 8:17, 7:15],
    "near the border": np.s_[2:9, 3:12, 17:21],
    "low corner": np.s_[:8, :7, :9],
    "high corner": np.s_[13:, 15:, 12:],
    "one voxel": np.s_[10:11, 12:13, 5:6],
    "whole volume": np.s_[:, :, :],
}


def case(region=REGIONS["inside"], seed=0):
    """Prediction, target, voided and mask: smooth anatomy, negative voxels, an air border."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(0, 3, n) for n in SHAPE), indexing="ij")
    target = 400 + 300 * np.sin(2 * x + y) * np.cos(3 * z - y) + rng.normal(0, 30, SHAPE)
    target[:2], target[:, :, -2:] = 0, 0
    prediction = target + rng.normal(0, 80, SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask[region] = True
    voided = np.where(mask, 0, target) if not mask.all() else target
    return prediction, target, voided, mask


def oracle(prediction, target, voided, mask):
    """The page's formulae in the plainest form, with torchmetrics' similarity map."""
    lo, hi = np.percentile(voided, [0.5, 99.5])
    lo = max(lo, 0)
    p, t = (torch.from_numpy((np.clip(v * mask, lo, hi) - lo) / (hi - lo)) for v in (prediction, target))
    data_range = float(max(p.max() - p.min(), t.max() - t.min()))
    similarity = StructuralSimilarityIndexMeasure(data_range=data_range, return_full_image=True)
    _, full = similarity(p[None], t[None])
    inside = torch.from_numpy(mask)
    mse = float(((p - t)[inside] ** 2).mean())
    return {
        "ssim": float(full[0][inside].mean()),
        "psnr_01": 10 * np.log10(1 / mse),
        "mse": mse,
        "rmse": np.sqrt(mse),
        "mae": float((p - t)[inside].abs().mean()),
    }


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())
@pytest.mark.parametrize("offset", [0, 500], ids=["with air", "lo above zero"])
def test_scores_equal_the_oracle(region, offset):
    prediction, target, voided, mask = case(region)
    volumes = (prediction + offset, target + offset, voided + offset, mask)
    assert brats_scores(*volumes) == pytest.approx(oracle(*volumes), abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("dim", [(0.2, 0.4), (0.4, 0.2)], ids=["prediction", "target"])
def test_the_wider_of_both_ranges_sets_the_constants(dim):
    prediction, target, voided, mask = case()
    volumes = (dim[0] * prediction, dim[1] * target, voided, mask)
    assert brats_scores(*volumes) == pytest.approx(oracle(*volumes), abs=1e-9, rel=1e-9)


def test_a_ragged_mask_and_the_integers_of_a_file_equal_the_oracle():
    prediction, target, voided, mask = case()
    mask = mask & (np.random.default_rng(1).random(SHAPE) < 0.4)
    files = [volume.astype(np.int16) for volume in (prediction, target, voided)]
    assert brats_scores(*files, mask.astype(np.uint8)) == pytest.approx(oracle(*files, mask))


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())
def test_a_perfect_prediction(region):
    _, target, voided, mask = case(region)
    scores = brats_scores(target, target, voided, mask)
    assert scores == pytest.approx({"ssim": 1, "psnr_01": np.inf, "mse": 0, "rmse": 0, "mae": 0})


def test_a_constant_offset_in_closed_form():
    """Voided spans 0..1000 evenly, so the percentiles are 5 and 995; an offset of 99 is 0.1 of it."""
    voided = np.linspace(0, 1000, 10 * 11 * 12).reshape(10, 11, 12)
    target = np.full(voided.shape, 300.0)
    mask = np.zeros(voided.shape, bool)
    mask[3:7, 3:7, 3:7] = True
    scores = brats_scores(target + 99, target, voided, mask)
    expected = {"mse": 0.01, "rmse": 0.1, "mae": 0.1, "psnr_01": 20}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_intensities_beyond_the_percentiles_are_clipped():
    _, target, voided, mask = case()
    hi = np.percentile(voided, 99.5)
    beyond = brats_scores(np.full(SHAPE, 9 * hi), target, voided, mask)
    assert beyond == pytest.approx(brats_scores(np.full(SHAPE, hi), target, voided, mask))
    below = brats_scores(np.full(SHAPE, -hi), target, voided, mask)
    assert below == pytest.approx(brats_scores(np.zeros(SHAPE), target, voided, mask))


def test_voxels_outside_the_mask_never_matter():
    prediction, target, voided, mask = case()
    noise = np.random.default_rng(2).normal(0, 900, SHAPE) * ~mask
    assert brats_scores(prediction + noise, target - noise, voided, mask) == brats_scores(
        prediction, target, voided, mask
    )


def test_the_first_axis_is_the_slice_axis():
    volumes = case()
    ssim = brats_scores(*volumes)["ssim"]
    swapped = brats_scores(*(volume.transpose(0, 2, 1) for volume in volumes))
    rolled = brats_scores(*(volume.transpose(1, 0, 2) for volume in volumes))
    assert swapped["ssim"] == pytest.approx(ssim, abs=1e-12)
    assert abs(rolled["ssim"] - ssim) > 1e-3
    assert rolled["mse"] == pytest.approx(brats_scores(*volumes)["mse"])


def with_nan(volume):
    return np.where(np.arange(volume.size).reshape(volume.shape) == 3, np.nan, volume)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, t, v, m: (p[1:], t, v, m), r"case-7: shapes differ: .*\(19, 26, 23\)"),
        (lambda p, t, v, m: (p[0], t[0], v[0], m[0]), r"case-7: volumes are 2-D, \(26, 23\)"),
        (lambda p, t, v, m: (p, t, v, m & False), "case-7: the healthy mask is empty"),
        (lambda p, t, v, m: (p, t, v * 0, m), "case-7: .* are 0 and 0: no intensity range"),
        (lambda p, t, v, m: (p, t, -1 - v**2, m), "case-7: .* no intensity range"),
        (lambda p, t, v, m: (with_nan(p), t, v, m), "case-7: 1 of 11960 voxels of the prediction"),
        (lambda p, t, v, m: (p, t / 0, v, m), "case-7: .* voxels of the target are not finite"),
        (lambda p, t, v, m: (p, t, with_nan(v), m), "case-7: 1 of 11960 voxels of the voided"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_errors_name_the_case(spoil, message):
    with pytest.raises(InputError, match=message):
        brats_scores(*spoil(*case()), where="case-7")


def test_tissue_rows_recombine_to_the_whole():
    prediction, target, voided, mask = case()
    tissue = np.random.default_rng(3).integers(1, 4, SHAPE)
    rows = scores_by_tissue(prediction, target, voided, mask, tissue)
    whole = brats_scores(prediction, target, voided, mask)
    fraction = [row["voxels"] / mask.sum() for row in rows]
    assert [row["tissue"] for row in rows] == ["CSF", "GM", "WM"]
    assert sum(fraction) == pytest.approx(1)
    for name in ("mse", "mae"):
        parts = [row[name] for row in rows]
        assert np.dot(fraction, parts) == pytest.approx(whole[name])


def test_a_tissue_row_scores_its_own_voxels_only():
    prediction, target, voided, mask = case()
    tissue = np.random.default_rng(3).integers(0, 3, SHAPE)
    prediction = np.where(tissue == 2, prediction, target)
    csf, gm, wm = scores_by_tissue(prediction, target, voided, mask, tissue)
    assert (csf["psnr_01"], csf["mae"]) == (np.inf, 0)
    assert gm["voxels"] == (mask & (tissue == 2)).sum()
    assert gm["mse"] == brats_scores(prediction, target, voided, mask & (tissue == 2))["mse"] > 0
    assert wm["voxels"] == 0
    assert np.isnan([wm["psnr_01"], wm["mse"], wm["mae"]]).all()


def test_mask_sizes():
    volumes_mm3 = [0, 9_999, 10_000, 34_744, 39_999, 40_000, 79_314]
    classes = [mask_size_class(volume) for volume in volumes_mm3]
    assert classes == ["small"] * 2 + ["medium"] * 3 + ["large"] * 2


# ---- intervals by patient


def test_the_interval_is_the_normal_one_when_patients_are_many():
    """For n patients the mean's standard error is s / sqrt(n), s with ddof 0: a resample draws from the sample."""
    scores = np.random.default_rng(3).normal(15, 2, 400)
    found = bootstrap_by_patient(scores, [f"P{k}" for k in range(400)])
    half = 1.959964 * scores.std() / 20
    assert found["mean"] == pytest.approx(scores.mean())
    assert (found["low"], found["high"]) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.06 * half)
    wide = bootstrap_by_patient(scores, [f"P{k}" for k in range(400)], level=0.99)
    assert (wide["high"] - wide["low"]) / (found["high"] - found["low"]) == pytest.approx(2.575829 / 1.959964, rel=0.06)


def test_two_patients_have_the_three_means_that_can_be_drawn():
    """0, 1/2 and 1 with probability 1/4, 1/2, 1/4: the 95 % interval is the whole range, the 40 % one its middle."""
    assert bootstrap_by_patient([0, 1], ["a", "b"]) == {"mean": 0.5, "low": 0, "high": 1, "patients": 2, "masks": 2}
    narrow = bootstrap_by_patient([0, 1], ["a", "b"], level=0.4)
    assert narrow["low"] == narrow["high"] == 0.5


def test_more_masks_of_the_same_patients_do_not_narrow_the_interval():
    scores, patients = [10.0, 14.0, 17.0], ["a", "b", "c"]
    once = bootstrap_by_patient(scores, patients)
    often = bootstrap_by_patient([*scores * 3, 9.0, 11.0], [*patients * 3, "a", "a"])
    assert {k: v for k, v in often.items() if k != "masks"} == {k: v for k, v in once.items() if k != "masks"}
    assert (once["masks"], often["masks"]) == (3, 11)


def test_an_interval_is_drawn_from_the_seed_whatever_the_order():
    values, names = np.arange(9.0), [f"P{k}" for k in range(9)]
    assert bootstrap_by_patient(values, names) == bootstrap_by_patient(values[::-1], names[::-1])
    assert bootstrap_by_patient(values, names)["low"] != bootstrap_by_patient(values, names, seed=1)["low"]


@pytest.mark.parametrize(
    ("values", "mean"), [([3.0, 5.0], 4.0), ([np.inf, 3.0], np.inf), ([np.nan, 3.0], 3.0), ([np.nan, np.nan], np.nan)]
)
def test_where_there_is_no_interval_there_is_none(values, mean):
    patients = ["a", "a"] if np.isfinite(values).all() else ["a", "b"]
    found = bootstrap_by_patient(values, patients)
    assert np.isnan(found["low"]) and np.isnan(found["high"])
    assert found["mean"] == pytest.approx(mean, nan_ok=True)


# ---- more laws


def test_a_perfect_prediction_of_air():
    prediction, target, voided, mask = case()
    scores = brats_scores(prediction * ~mask, target * ~mask, voided, mask)
    assert (scores["ssim"], scores["psnr_01"]) == (1, np.inf)


def test_scoring_needs_no_heavy_library():
    code = "import sys, ldm_lib.evaluation.metrics; print({'torch', 'nilearn', 'dipy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_tissue_map_of_another_grid_is_rejected():
    *volumes, mask = case()
    with pytest.raises(InputError, match=r"case-7: shapes differ: .*'tissue': \(26, 23\)"):
        scores_by_tissue(*volumes, mask, mask[0], where="case-7")
