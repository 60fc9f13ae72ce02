"""Laws of the context "initial_estimate": its residual is generated, and nothing hidden is looked at."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import changed

from ldm_lib.anatomy.contralateral import contralateral_image
from ldm_lib.anatomy.initial_estimate import initial_estimate
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion.latents import (
    LatentSpec,
    add_initial_estimate,
    collate,
    denoiser_input,
    encode_case,
    input_channels,
    keep_known,
    measure_residual_std,
)
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.model_io import load_model

STD = (0.5, 1.0, 2.0)
HOW = {"device": torch.device("cpu"), "precision": "32"}
PLAIN, SCALED = LatentSpec(context="initial_estimate"), LatentSpec(context="initial_estimate", residual_std=STD)


@pytest.fixture(scope="module")
def autoencoder(tiny_autoencoder_folder):
    return load_model(tiny_autoencoder_folder, Autoencoder)


@pytest.fixture(scope="module")
def case(cases):
    return grid_case(load_case(cases[0]), 2)


@pytest.fixture(scope="module")
def inpainter(tiny_initial_estimate_folder):
    return Inpainter.load(tiny_initial_estimate_folder, device="cpu", precision="32")


def latent_of(autoencoder, image):
    with torch.inference_mode():
        return autoencoder.encode(torch.from_numpy(image)[None, None])[0]


@pytest.fixture(scope="module")
def truth(autoencoder, case):
    return latent_of(autoencoder, case.target)


@pytest.fixture(scope="module")
def guess(autoencoder, case):
    return latent_of(autoencoder, initial_estimate(case.voided, case.mask, case.tissue, spacing_mm=8.0))


# ---- what a case becomes


def test_a_case_is_its_initial_estimate_and_the_residual(autoencoder, case, truth, guess):
    latents = encode_case(case, autoencoder, PLAIN, **HOW)
    assert torch.equal(latents["initial_estimate"], guess) and torch.equal(latents["target"], truth - guess)
    scaled = encode_case(case, autoencoder, SCALED, **HOW)["target"]
    torch.testing.assert_close(scaled, (truth - guess) / torch.tensor(STD).view(3, 1, 1, 1))
    assert latents["voided"].shape == guess.shape and not latents["voided"].any()
    assert (truth - guess).abs().max() > 0.1, "or there were nothing to generate"


@pytest.mark.parametrize("settings", [PLAIN, SCALED])
def test_what_was_made_of_the_truth_gives_it_back(autoencoder, case, truth, settings):
    latents = encode_case(case, autoencoder, settings, **HOW)
    torch.testing.assert_close(add_initial_estimate(latents["target"], latents, settings), truth, atol=1e-5, rtol=1e-5)
    two = torch.stack([latents["target"], 0 * latents["target"]])
    found = add_initial_estimate(two, latents, settings)
    assert torch.equal(found[0], add_initial_estimate(latents["target"], latents, settings))
    assert torch.equal(found[1], latents["initial_estimate"]), "a residual of 0 is the initial estimate"


@pytest.mark.parametrize("hidden", [0.0, 7.0, np.nan])
@pytest.mark.parametrize("contralateral", [False, True])
def test_nothing_under_the_mask_is_looked_at(autoencoder, case, hidden, contralateral):
    spec = SCALED.model_copy(update={"contralateral": contralateral})
    other = replace(case, voided=np.where(case.mask, np.float32(hidden), case.voided), target=None)
    own, found = (encode_case(seen, autoencoder, spec, **HOW) for seen in (case, other))
    assert found.keys() == own.keys() - {"target"}
    assert all(torch.equal(found[name], own[name]) for name in found)


def test_the_denoiser_sees_the_initial_estimate_and_the_mask_fraction(autoencoder, case):
    batch = collate([encode_case(case, autoencoder, SCALED, **HOW)])
    noisy = torch.randn(batch["initial_estimate"].shape, generator=torch.Generator().manual_seed(0))
    seen = denoiser_input(noisy, batch, SCALED)
    assert seen.shape[1] == input_channels(3, SCALED) == 12
    assert torch.equal(seen[:, :3], batch["mask"] * noisy), "known voxels have no residual"
    assert torch.equal(seen[:, :3], keep_known(noisy, batch))
    assert torch.equal(seen[:, 8:11], batch["initial_estimate"]) and torch.equal(seen[:, 11:], batch["mask_fraction"])


# ---- the other hemisphere

BOTH = LatentSpec(context="initial_estimate", residual_std=STD, contralateral=True)


def test_the_denoiser_sees_the_mirror_image_and_where_it_is_known(autoencoder, case):
    latents = encode_case(case, autoencoder, BOTH, **HOW)
    plain = encode_case(case, autoencoder, SCALED, **HOW)
    assert latents.keys() - plain.keys() == {"contralateral", "contralateral_known"}
    assert all(torch.equal(latents[name], tensor) for name, tensor in plain.items())
    estimate = initial_estimate(case.voided, case.mask, case.tissue, spacing_mm=8.0)
    mirrored, known = contralateral_image(estimate, case.mask, spacing_mm=8.0)
    assert known.any() and np.abs(mirrored - estimate)[known & case.mask].max() > 0.05
    expected = latent_of(autoencoder, mirrored) - latents["initial_estimate"]
    torch.testing.assert_close(latents["contralateral"] * torch.tensor(STD).view(3, 1, 1, 1), expected)
    fraction = known.reshape(15, 2, 15, 2, 10, 2).mean((1, 3, 5))
    np.testing.assert_allclose(latents["contralateral_known"][0], fraction, atol=1e-6)
    batch = collate([latents])
    seen = denoiser_input(batch["target"], batch, BOTH)
    assert seen.shape[1] == input_channels(3, BOTH) == 16
    assert torch.equal(seen[:, :12], denoiser_input(batch["target"], batch, SCALED))
    assert torch.equal(seen[:, 12:15], batch["contralateral"])
    assert torch.equal(seen[:, 15:], batch["contralateral_known"])


def test_only_a_model_of_initial_estimates_sees_the_other_hemisphere():
    with pytest.raises(ConfigError, match="contralateral = True: with context 'concat'; it needs initial_estimate"):
        LatentSpec.parse({"context": "concat", "contralateral": True})


# ---- the residual of initial estimates


def test_it_is_the_root_of_the_mean_square_over_the_latent_voxels_that_are_generated(autoencoder, cases):
    lacks = []
    for case in (cases[0], cases[2]):
        data = grid_case(load_case(case), 2)
        estimate = initial_estimate(data.voided, data.mask, data.tissue, spacing_mm=8.0)
        blocks = data.mask.reshape(15, 2, 15, 2, 10, 2).any((1, 3, 5))
        difference = latent_of(autoencoder, data.target) - latent_of(autoencoder, estimate)
        lacks.append(difference[:, torch.from_numpy(blocks)].double().numpy())
    expected = np.sqrt(np.square(np.concatenate(lacks, axis=1)).mean(axis=1))
    settings = LatentSpec(context="initial_estimate", mask_dilation=0)
    found = measure_residual_std(settings, map(load_case, (cases[0], cases[2])), autoencoder)
    np.testing.assert_allclose(found.residual_std, expected, rtol=1e-5)
    assert found.model_copy(update={"residual_std": ()}) == settings and lacks[0].shape[1] != lacks[1].shape[1]


# ---- the model


def test_a_model_of_initial_estimates_needs_maps_and_others_follow_the_request(inpainter, tiny_model_folder):
    other = Inpainter.load(tiny_model_folder, device="cpu")
    assert [inpainter.makes_maps(requested) for requested in (None, True, False)] == [True, True, False]
    assert [other.makes_maps(requested) for requested in (None, True, False)] == [False, True, False]
    assert (inpainter.model.spec.refinement, other.model.spec.refinement) == ("none", "mixture")


def test_a_denoiser_of_no_residual_returns_the_initial_estimate(inpainter, cases):
    """What is sampled is the residual: where it is 0, the estimate comes back from the autoencoder."""
    data = load_case(cases[0])

    def silent(shown, t, conditioned=None):
        _, sigma = inpainter.model.schedule.alpha_sigma(t, shown)
        return shown[:, :3] / sigma  # all of x is noise: x_0 = 0

    silenced = replace(changed(inpainter, denoiser=silent), blend_mm=0.0)
    latents = silenced.encode(data)
    drawn = silenced.model.sample(latents, ["a/0"], seed=0, sampler="ddim", num_inference_steps=3)[0]
    torch.testing.assert_close(drawn, latents["initial_estimate"], atol=1e-4, rtol=1e-4)
    filled = silenced(data, num_inference_steps=3).mean
    np.testing.assert_allclose(filled, silenced.decode(latents["initial_estimate"], data), atol=1e-3 * data.scale)


def test_known_voxels_are_those_of_the_initial_estimate_whatever_is_sampled(inpainter, cases):
    latents = inpainter.encode(load_case(cases[0]))
    drawn = inpainter.model.sample(latents, ["a/0"], seed=0, sampler="ddim", num_inference_steps=2)[0]
    known = (latents["mask"] == 0).expand_as(drawn)
    assert torch.equal(drawn[known], latents["initial_estimate"][known])
    assert (drawn - latents["initial_estimate"])[~known].abs().max() > 0.1


@pytest.mark.parametrize("std", [
    [1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], ["much", 1.0, 1.0], "111", [10**400, 1.0, 1.0], None,
], ids=lambda std: str(std)[:20])  # fmt: skip
def test_a_scale_that_cannot_be_is_rejected(tiny_initial_estimate_folder, tmp_path, std):
    folder = shutil.copytree(tiny_initial_estimate_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["residual_std"] = std
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"does not say how it was trained .*Fix: copy") as error:
        Inpainter.load(folder, device="cpu")
    assert "\n" not in str(error.value)


# ---- more laws


def test_without_initial_estimates_what_is_sampled_is_the_latent(truth):
    assert add_initial_estimate(truth, {}, LatentSpec()) is truth


def test_the_targets_of_what_was_measured_have_a_mean_square_of_1(autoencoder, cases):
    data = load_case(cases[0])
    settings = measure_residual_std(PLAIN, [data], autoencoder)
    latents = encode_case(grid_case(data, 2), autoencoder, settings, **HOW)
    square = latents["target"][:, latents["loss"][0] > 0].square().mean(dim=1)
    torch.testing.assert_close(square, torch.ones(3), atol=1e-4, rtol=0)


def test_no_more_cases_are_measured_than_are_enough(autoencoder, cases, monkeypatch):
    monkeypatch.setattr("ldm_lib.diffusion.latents.RESIDUAL_CASES", 1)
    seen = []
    found = measure_residual_std(PLAIN, (seen.append(case) or load_case(case) for case in cases), autoencoder)
    assert seen == cases[:1] and found == measure_residual_std(PLAIN, [load_case(cases[0])], autoencoder)


def test_a_model_states_the_standard_deviation_of_its_residuals(inpainter):
    assert inpainter.model.spec.residual_std == STD
