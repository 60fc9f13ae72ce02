"""Laws of the model bundle: what is saved is loaded, and samples the same."""

import doctest
import json
import shutil

import pytest
import torch

from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion import model as module
from ldm_lib.diffusion.latents import encode_case
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.errors import WeightsError
from ldm_lib.files import sha256

CPU = {"device": "cpu", "precision": "32"}


@pytest.fixture
def model(tiny_model_folder):
    return LatentDiffusion.load(tiny_model_folder, **CPU)


def samples(model, case):
    latents = encode_case(grid_case(case, 2), model.autoencoder, model.spec, device=torch.device("cpu"), precision="32")
    return model.sample(latents, ["a"], seed=0, sampler="ddim", num_inference_steps=2)


def test_the_example_is_right():
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("copied", [True, False])
def test_what_is_saved_is_loaded_and_samples_the_same(model, tiny_model_folder, tmp_path, cases, copied):
    source = tiny_model_folder / "autoencoder" if copied else None
    digest = model.save(tmp_path / "own", autoencoder_folder=source, optimiser_steps=7)
    again = LatentDiffusion.load(tmp_path / "own", **CPU)
    assert again.denoiser.folder_config["sha256"] == digest and again.denoiser.folder_config["optimiser_steps"] == 7
    assert again.spec == model.spec and again.process == model.process and again.temperature == model.temperature
    assert torch.equal(samples(model, load_case(cases[0])), samples(again, load_case(cases[0])))
    weights = [folder / "autoencoder" / "model.safetensors" for folder in (tmp_path / "own", tiny_model_folder)]
    assert sha256(weights[0]) == sha256(weights[1])
    own, before = (m.autoencoder.folder_config for m in (again, model))
    assert own == before


@pytest.mark.parametrize("removed", [{}, {"shift": 1.0}, {"shift": 1.0, "zero_terminal_snr": False}])
def test_a_model_that_states_removed_options_at_their_defaults_is_loaded(model, tiny_model_folder, tmp_path, removed):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"schedule": config["schedule"] | removed}))
    loaded = LatentDiffusion.load(folder, **CPU)
    assert loaded.process == model.process and torch.equal(loaded.schedule.alpha, model.schedule.alpha)


@pytest.mark.parametrize("removed", [{"shift": 2.0}, {"zero_terminal_snr": True}, {"shift": "1"}])
def test_a_model_that_was_trained_with_a_removed_option_is_rejected(tiny_model_folder, tmp_path, removed):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"schedule": config["schedule"] | removed}))
    with pytest.raises(WeightsError, match=r"was trained with (shift|zero_terminal_snr) = .*, which was removed"):
        LatentDiffusion.load(folder, **CPU)
