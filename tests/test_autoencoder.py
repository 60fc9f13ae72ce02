"""Laws of the autoencoder: what its numbers mean, what it refuses, and what its training sees."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.networks.blocks import SABlock, SpatialAttentionBlock
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from ldm_lib import autoencoding
from ldm_lib.autoencoder import Autoencoder, kl_divergence
from ldm_lib.autoencoding import (
    CropLoader,
    block_statistics,
    ceiling,
    latent_statistics,
    reconstruct,
    train_autoencoder,
)
from ldm_lib.cases import load_case
from ldm_lib.conditioning import model_case
from ldm_lib.config import resolve
from ldm_lib.errors import InputError, TrainingError
from ldm_lib.geometry import cell_share
from ldm_lib.metrics import brats_scores
from ldm_lib.weights import load_model

CPU = torch.device("cpu")
HOW = {"device": CPU, "precision": "32"}


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    options = small | options
    return Autoencoder(**options)


def settings(**changes):
    small = {"channels": "4,8", "autoencoder_steps": 30, "autoencoder_batch_size": 2, "crop": 8, "precision": "32",
             "autoencoder_learning_rate": 1e-3}  # fmt: skip
    return resolve("smoke", small | changes)["02_autoencoder_check"]


def volume(*shape, seed=0):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def train(autoencoder, cases, **changes):
    """The rows that its training reported."""
    rows = []
    train_autoencoder(autoencoder, cases, settings(**changes), on_step=rows.append, **HOW)
    return rows


def test_kl_is_that_of_two_normals():
    mean, std = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) + 0.1
    oracle = torch_kl(Normal(mean, std), Normal(0.0, 1.0)).mean()
    assert kl_divergence(mean, std).item() == pytest.approx(oracle.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(1), torch.ones(1)) == 0


@pytest.mark.parametrize(("channels", "factor"), [((8,), 1), ((4, 8), 2), ((4, 8, 8), 4)])
def test_a_cell_is_factor_voxels_wide(channels, factor):
    autoencoder = fresh(channels=channels).freeze()
    latent = autoencoder.encode(volume(8, 12, 4))
    assert autoencoder.factor == factor
    assert latent.shape == (1, 3, 8 // factor, 12 // factor, 4 // factor)
    assert autoencoder.decode(latent).shape == (1, 1, 8, 12, 4)


def test_a_shape_that_would_be_shortened_is_refused():
    autoencoder = fresh(channels=(4, 4, 4)).freeze()
    with pytest.raises(InputError, match=r"\(8, 8, 155\) is not divisible by 4"):
        autoencoder.encode(volume(8, 8, 155))


def test_there_is_no_attention():
    kinds = {type(module) for module in fresh(channels=(4, 4, 4)).modules()}
    assert not kinds & {SpatialAttentionBlock, SABlock}


def test_encoding_is_the_posterior_mean_and_draws_nothing():
    autoencoder = fresh().freeze()
    image, state = volume(8, 8, 8), torch.get_rng_state()
    latent = autoencoder.encode(image)
    mean, std = autoencoder.moments(image)
    assert torch.equal(latent, mean) and torch.equal(latent, autoencoder.encode(image))
    assert std.min() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_standardising_is_undone_in_decoding():
    autoencoder, image = fresh().freeze(), volume(8, 8, 8)
    mean, std = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.01, 2.0, 30.0])
    raw = autoencoder.encode(image)
    before = autoencoder.decode(raw)
    autoencoder.standardise(mean, std)
    assert torch.allclose(autoencoder.scale_factor, 1 / std)
    latent = autoencoder.encode(image)
    assert torch.allclose(latent, (raw - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1), atol=1e-4)
    assert torch.allclose(autoencoder.decode(latent), before, atol=1e-4)


def test_the_statistics_are_kept_with_the_weights(tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, "autoencoder")
    assert autoencoder.spacing_mm == 8.0
    assert not torch.equal(autoencoder.scale_factor, torch.ones(3)) and autoencoder.latent_mean.any()


def test_standardised_brain_cells_have_mean_0_and_std_1(cases, tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, "autoencoder")  # standardised on these four cases
    seen = []
    for case in cases[:4]:
        image = model_case(load_case(case), autoencoder.factor).target
        latent = autoencoder.encode(torch.from_numpy(image)[None, None])[0].numpy()
        seen.append(latent[:, cell_share(image > 0, autoencoder.factor) > 0.5])
    seen = np.concatenate(seen, axis=1)
    assert seen.shape[1] > 100
    np.testing.assert_allclose(seen.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(axis=1), 1, atol=1e-3)


def test_no_brain_cell_at_all_is_an_error(monkeypatch, cases):
    monkeypatch.setattr(autoencoding, "cell_share", lambda image, factor: np.zeros([n // factor for n in image.shape]))
    with pytest.raises(TrainingError, match="no cell lies mostly in the brain"):
        latent_statistics(fresh().freeze(), cases[:1], **HOW)


def test_training_lowers_the_loss_and_standardises(cases):
    autoencoder = fresh()
    rows = train(autoencoder, cases[:4], autoencoder_steps=60)
    start, end = (np.mean([row["l1"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert [row["step"] for row in rows] == list(range(60))
    assert end < 0.6 * start
    assert max(row["learning_rate"] for row in rows) == pytest.approx(1e-3, rel=0.05)
    assert not autoencoder.training and not any(p.requires_grad for p in autoencoder.parameters())
    mean, std = latent_statistics(autoencoder, [cases[1], cases[3]], **HOW)
    assert torch.allclose(autoencoder.latent_mean, mean) and torch.allclose(autoencoder.scale_factor, 1 / std)


def test_training_is_a_function_of_the_seed(cases):
    one, same, other = fresh(), fresh(), fresh()
    for autoencoder, seed in ((one, 0), (same, 0), (other, 1)):
        torch.manual_seed(np.random.randint(1000))  # what was drawn before does not matter
        train(autoencoder, cases[:2], seed=seed, autoencoder_steps=3)
    weights = [torch.cat([p.flatten() for p in a.parameters()]) for a in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def blocks_of(cases):
    """Every 2 x 2 x 2 block with any brain in it, as rows of eight voxels: a loop as oracle."""
    rows = []
    for case in cases:
        image = model_case(load_case(case), 2).target
        for x, y, z in np.argwhere(cell_share(image > 0, 2) > 0):
            rows.append(image[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].ravel())
    return np.array(rows, np.float64)


def test_the_linear_start_is_the_best_linear_code(cases):
    """Against principal components by numpy's SVD: the network beside it is silent at first."""
    autoencoder = fresh(linear_start=True)
    few = [cases[0], cases[2]]
    autoencoder.linear.fit(*block_statistics(few, 2))
    blocks = blocks_of(few)
    centred = blocks - blocks.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    oracle = centred @ axes.T @ axes + blocks.mean()
    volume = torch.from_numpy(blocks.astype(np.float32)).view(-1, 1, 2, 2, 2)
    with torch.inference_mode():
        code, _ = autoencoder.moments(volume)
        rebuilt = autoencoder.rebuild(code)
    np.testing.assert_allclose(rebuilt.numpy().reshape(oracle.shape), oracle, atol=1e-4)
    np.testing.assert_allclose(code.flatten(1).numpy().std(axis=0), 1, atol=1e-3)


def test_a_linear_start_is_no_worse_after_training(cases):
    rows = train(fresh(linear_start=True), cases[:4], autoencoder_steps=60)
    start, end = (np.mean([row["l1"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert end < 1.2 * start
    random = train(fresh(), cases[:4], autoencoder_steps=1)[0]["l1"]
    assert start < 0.5 * random


def test_more_channels_than_voxels_of_a_block_still_rebuild_it(cases):
    autoencoder = fresh(linear_start=True, latent_channels=10)
    autoencoder.linear.fit(*block_statistics(cases[:1], 2))
    image = torch.from_numpy(model_case(load_case(cases[0]), 2).target)[None, None]
    with torch.inference_mode():
        error = autoencoder.rebuild(autoencoder.moments(image)[0]) - image
    assert error[image > 0].abs().mean() < 0.05 * image[image > 0].mean()


@pytest.mark.parametrize("steps", [1, 2])
def test_even_one_step_is_a_training(cases, steps):
    assert len(train(fresh(), cases[:1], autoencoder_steps=steps)) == steps


def test_training_never_opens_another_patient(cases, monkeypatch):
    opened = []
    monkeypatch.setattr(autoencoding, "load_case", lambda case: opened.append(case.patient) or load_case(case))
    train(fresh(), cases[:4], autoencoder_steps=5)
    assert set(opened) == {cases[0].patient, cases[2].patient}


def test_a_loss_that_is_not_finite_stops_the_training(cases):
    autoencoder = fresh()

    def spoil(row):
        if row["step"] == 2:
            next(autoencoder.parameters()).data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="loss is nan at step 3"):
        train_autoencoder(autoencoder, cases[:1], settings(), on_step=spoil, **HOW)


def labelled(monkeypatch, with_target=True):
    """Every image is constant: 1 where it is the voided one, 2 where it is the full one, and air around a centre."""
    brain = np.zeros((24, 24, 24), np.float32)
    brain[10:14, 10:14, 10:14] = 1
    case = SimpleNamespace(voided=brain, target=2 * brain if with_target else None)
    monkeypatch.setattr(autoencoding, "load_case", lambda case: case)
    monkeypatch.setattr(autoencoding, "model_case", lambda data, factor: case)


def test_half_of_the_crops_show_the_voided_image(monkeypatch):
    labelled(monkeypatch)
    loader = CropLoader(["case"], settings(crop=12, autoencoder_batch_size=400), factor=2)
    brightest = loader.batch(0).amax(dim=(1, 2, 3, 4))
    voided, full, air = ((brightest == value).sum().item() for value in (1, 2, 0))
    assert voided + full + air == 400
    assert abs(voided - full) < 4 * 20  # four standard deviations of a fair coin
    assert air < 0.1 * 400  # only crops that are placed anywhere can miss the brain


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 2), (1.0, 1)])
def test_the_share_of_voided_crops_is_a_parameter(monkeypatch, fraction, value):
    labelled(monkeypatch)
    loader = CropLoader(["case"], settings(crop=24, autoencoder_batch_size=20, voided_fraction=fraction), factor=2)
    assert loader.batch(0).amax() == value == loader.batch(0).amax(dim=(1, 2, 3, 4)).min()


def test_a_case_without_a_target_shows_what_it_has(monkeypatch):
    labelled(monkeypatch, with_target=False)
    assert CropLoader(["case"], settings(crop=24, voided_fraction=0.0), factor=2).batch(0).amax() == 1


@pytest.mark.parametrize(("crop", "factor", "edge"), [(8, 2, 8), (11, 4, 8), (1000, 2, 24)])
def test_crops_are_divisible(monkeypatch, crop, factor, edge):
    labelled(monkeypatch)
    batch = CropLoader(["case"], settings(crop=crop), factor).batch(0)
    assert batch.shape == (2, 1, edge, edge, edge) and batch.dtype == torch.float32


def test_a_crop_is_a_function_of_seed_step_and_place(cases):
    def crops(step, **changes):
        return CropLoader(cases, settings(**changes), factor=2).batch(step)

    first = crops(3, autoencoder_batch_size=3)
    assert torch.equal(first, crops(3, autoencoder_batch_size=3))
    assert torch.equal(first[:2], crops(3, autoencoder_batch_size=2))
    assert not torch.equal(first, crops(4, autoencoder_batch_size=3))
    assert not torch.equal(first, crops(3, autoencoder_batch_size=3, seed=1))


def test_the_ceiling_is_the_truth_through_the_autoencoder(cases, tiny_autoencoder_folder):
    autoencoder = load_model(tiny_autoencoder_folder, "autoencoder")
    data = load_case(cases[0])
    on_grid = model_case(data, autoencoder.factor)
    filled, scores = ceiling(data, on_grid, autoencoder, **HOW)
    outside = ~data.mask
    assert np.array_equal(filled[outside], data.voided[outside])
    rebuilt = reconstruct(autoencoder, on_grid.target, **HOW)
    inside = data.frame(autoencoder.factor).to_model(data.mask)
    order = data.frame(autoencoder.factor).to_model(np.where(data.mask, filled, 0))
    np.testing.assert_allclose(order[inside], np.maximum(rebuilt[inside], 0) * data.scale, rtol=1e-5)
    assert scores == brats_scores(filled, data.target, data.voided, data.healthy)
