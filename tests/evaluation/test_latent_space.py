"""Laws of the latents: moments by an independent library, flips and reach by definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from ldm_lib.autoencoder.fitting import fit_linear_codec, latent_brain_mask
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.region_decoding import reconstruct
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.evaluation.latent_space import (
    LARGEST_DISTANCE,
    dilation_needed,
    flip_error,
    latent_table,
    mask_reach,
    posterior_kl,
)
from ldm_lib.geometry import latent_mask

HOW = {"device": torch.device("cpu"), "precision": "32"}


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    return Autoencoder.of(**small | options).freeze()


@pytest.fixture(scope="module")
def on_grid(cases):
    return grid_case(load_case(cases[0]), 2)


def test_a_latent_brain_voxel_is_mostly_above_0():
    image = np.zeros((4, 2, 2))
    image[:2].flat[:5], image[2:].flat[:4] = 1, 1
    assert latent_brain_mask(image, 2).ravel().tolist() == [True, False]


def test_moments_are_those_of_scipy():
    rng = np.random.default_rng(0)
    latent = np.stack([rng.normal(2, 3, (9, 8, 7)), rng.exponential(1, (9, 8, 7))]).astype(np.float32)
    cells = rng.random((9, 8, 7)) < 0.7
    for channel, row in enumerate(latent_table(latent, cells)):
        values = latent[channel][cells].astype(np.float64)
        assert row["channel"] == channel
        assert (row["mean"], row["std"]) == pytest.approx((values.mean(), values.std()))
        assert row["skew"] == pytest.approx(stats.skew(values))
        assert row["beyond_3_sigma"] == pytest.approx(np.mean(np.abs(stats.zscore(values)) > 3))


def test_a_dead_channel_has_numbers_too():
    (row,) = latent_table(np.full((1, 3, 3, 3), 0.7), np.ones((3, 3, 3), bool))
    assert row == pytest.approx({"channel": 0, "mean": 0.7, "std": 0, "skew": 0, "beyond_3_sigma": 0}, abs=1e-12)


def test_kl_is_that_of_two_normals_over_the_chosen_voxels(on_grid):
    autoencoder, cells = fresh(), latent_brain_mask(on_grid.target, 2)
    found = posterior_kl(autoencoder, on_grid.target, cells, **HOW)
    mean, std = autoencoder.moments(torch.from_numpy(on_grid.target)[None, None])
    oracle = kl_divergence(Normal(mean, std), Normal(0.0, 1.0))[0].numpy()[:, cells].mean(axis=1)
    assert found == pytest.approx(oracle.tolist(), rel=1e-4)


def test_flip_errors_are_those_of_flipped_arrays(on_grid):
    """The latent flipped and decoded is, by numpy: decode(flip(encode(image))), flipped back."""
    autoencoder, image = fresh(), on_grid.target
    mirrored = np.ascontiguousarray(reconstruct(autoencoder, image, **HOW).latent[:, ::-1])
    with torch.inference_mode():
        decoded = autoencoder.decode(torch.from_numpy(mirrored)[None])[0, 0].numpy()[::-1]
    errors, brain = flip_error(autoencoder, image, reconstruct(autoencoder, image, **HOW), **HOW), image > 0
    plain = reconstruct(autoencoder, image, **HOW).volume
    assert errors["coding"] == pytest.approx(np.sqrt(np.mean((plain - image)[brain] ** 2)), rel=1e-5)
    assert errors["coding with a latent flip"] == pytest.approx(
        np.sqrt(np.mean((decoded - image)[brain] ** 2)), rel=1e-5
    )
    assert len(set(errors.values())) == 2


# ---- how far the mask reaches


def test_the_reach_by_its_definition(on_grid):
    autoencoder = fresh()
    rows = reach(autoencoder, on_grid)
    images = (on_grid.target, on_grid.voided)
    difference = np.subtract(*(reconstruct(autoencoder, image, **HOW).latent for image in images))
    mask, brain = np.argwhere(latent_mask(on_grid.mask, 2)), latent_brain_mask(on_grid.target, 2)
    squares = {k: [] for k in range(LARGEST_DISTANCE + 1)}
    for voxel in np.argwhere(brain):
        nearest = np.abs(mask - voxel).max(axis=1).min()
        if nearest in squares:
            squares[nearest].append(difference[:, *voxel] ** 2)
    assert [row["latent_voxels_from_mask"] for row in rows] == list(squares)
    assert [row["latent_voxels"] for row in rows] == [len(found) for found in squares.values()]
    found = [row["rms_difference"] for row in rows if row["latent_voxels"]]
    assert found == pytest.approx([np.sqrt(np.mean(s)) for s in squares.values() if s], rel=1e-5)


def test_a_codec_of_blocks_changes_in_the_mask_alone(cases, on_grid):
    autoencoder = fresh(linear_start=True)
    fit_linear_codec(autoencoder.linear, cases[:1])
    first, *others = [row["rms_difference"] for row in reach(autoencoder, on_grid)]
    assert first > 0.1 and not np.nansum(others)
    assert dilation_needed(reach(autoencoder, on_grid)) == 0


def reach(autoencoder, case):
    """Reach of a case's mask, from its two images."""
    full, voided = (reconstruct(autoencoder, image, **HOW).latent for image in (case.target, case.voided))
    return mask_reach(full, voided, latent_mask(case.mask, 2), latent_brain_mask(case.target, 2))


def column(length, norm):
    """A brain of one long column with a mask at its lower end, and the reach of the mask along it."""
    image = np.random.default_rng(0).uniform(0.5, 1, (length, 8, 8)).astype(np.float32)
    mask = np.zeros(image.shape, bool)
    mask[:3] = True
    case = SimpleNamespace(target=image, voided=np.where(mask, 0, image), mask=mask)
    return [row["rms_difference"] for row in reach(fresh(norm=norm), case)]


def test_norms_of_one_voxel_end_the_reach_and_norms_of_the_grid_do_not(monkeypatch):
    monkeypatch.setattr("ldm_lib.evaluation.latent_space.LARGEST_DISTANCE", 19)
    local, group = column(44, "local"), column(44, "group")
    assert local[0] > local[1] > 0 and not any(local[16:])
    assert all(group)


@pytest.mark.parametrize(("differences", "fraction", "dilation"), [
    ([1.0, 0.3, 0.05, 0.01], 0.1, 1),
    ([1.0, 0.3, 0.05, 0.01], 0.02, 2),
    ([1.0, 0.05, 0.3, 0.01], 0.1, 2),  # all that lies beyond must be little
    ([1.0, 0.3, 0.2, 0.15], 0.1, 3),  # at least as far as was measured
    ([1.0, 0.3, np.nan, np.nan], 0.1, 1),
    ([0.0, 0.0, 0.0, 0.0], 0.1, 0),
])  # fmt: skip
def test_the_dilation_that_covers_the_reach(differences, fraction, dilation):
    rows = [{"latent_voxels_from_mask": k, "rms_difference": r} for k, r in enumerate(differences)]
    assert dilation_needed(rows, fraction) == dilation


# ---- more laws


def test_a_normal_channel_has_no_skew_and_27_in_10000_beyond_3_sigma():
    values = stats.norm.ppf((np.arange(10**6) + 0.5) / 10**6)  # its quantiles, no luck involved
    (row,) = latent_table(5 - 2 * values.reshape(1, 100, 100, 100), np.ones((100, 100, 100), bool))
    assert (row["mean"], row["std"], row["skew"]) == pytest.approx((5, 2, 0), abs=1e-4)
    assert row["beyond_3_sigma"] == pytest.approx(2 * stats.norm.sf(3), rel=1e-3)


def test_a_latent_flip_costs_nothing_where_latents_are_symmetric(on_grid):
    autoencoder = fresh(linear_start=True, latent_channels=1)  # one channel: about the mean of the block
    with torch.no_grad():
        autoencoder.linear.project.weight.fill_(1 / 8)
        autoencoder.linear.estimate.weight.zero_()
        autoencoder.linear.estimate.weight[..., 1, 1, 1] = 1.0
    errors = flip_error(autoencoder, on_grid.target, reconstruct(autoencoder, on_grid.target, **HOW), **HOW)
    assert errors["coding with a latent flip"] == pytest.approx(errors["coding"], rel=1e-6)


def test_a_distance_without_latent_voxels_is_nan():
    rms = column(8, "local")
    assert np.isfinite(rms[:3]).all() and np.isnan(rms[3:]).all()
