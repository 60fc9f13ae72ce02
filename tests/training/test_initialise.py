"""A training that starts from a model has its weights and settings, and rejects options that differ."""

import json
import shutil
import types
from dataclasses import replace

import pytest
import torch

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.diffusion.latents import LatentSpec
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError, WeightsError
from ldm_lib.experiment.presets import resolve
from ldm_lib.model_io import load_model, save_model
from ldm_lib.training.initialise import new_model
from ldm_lib.training.train import save_trained

SPEC = LatentSpec(context="initial_estimate", mask_dilation=0)
STD = (0.5, 1.0, 2.0)


def settings(**changes):
    small = {"base_width": 8, "multipliers": "1,2", "attention_rates": "2", "precision": "32", "device": "cpu",
             "latent_crop": 6, "seed": 3, "prediction": "noise", "conditioning_dropout": 0.0}  # fmt: skip
    return resolve("smoke", small | changes)["04_training"]


@pytest.fixture(scope="module")
def model(tiny_autoencoder_folder, tmp_path_factory):
    """A model folder as a training leaves it, random in every layer, with a scale and a temperature of its own."""
    config = settings(seed=5, dropout=0.1)
    model = new_model(tiny_autoencoder_folder, config, SPEC.model_copy(update={"residual_std": STD}))
    model = replace(model, temperature=0.8)
    torch.manual_seed(4)
    for parameter in model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("start") / "model"
    trained = types.SimpleNamespace(config=config, model=model, best=[], step=7)
    save_trained(trained, tiny_autoencoder_folder, folder)
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_starts_from_the_weights_and_settings_of_the_model(model, tiny_autoencoder_folder):
    config = settings(start_dir=str(model), learning_rate=1e-5, dropout=0.2)
    started = new_model(tiny_autoencoder_folder, config, SPEC.model_copy(update={"residual_std": (9.0, 9.0, 9.0)}))
    assert same(started.denoiser.state_dict(), load_model(model, ADM).state_dict())
    assert started.spec == SPEC.model_copy(update={"residual_std": STD}) and started.temperature == 0.8
    assert started.crop == 6 and started.denoiser.config["dropout"] == 0.2, "the options decide how it is trained"
    assert all(p.requires_grad for p in started.denoiser.parameters()), "its weights are trained"


def test_without_a_model_it_starts_from_random_weights(model, tiny_autoencoder_folder):
    fresh = new_model(tiny_autoencoder_folder, settings(), SPEC.model_copy(update={"residual_std": STD}))
    assert not fresh.denoiser.head.weight.any() and fresh.temperature == 1
    assert not same(fresh.denoiser.state_dict(), load_model(model, ADM).state_dict())


@pytest.fixture
def other_autoencoder(tiny_autoencoder_folder, tmp_path):
    """One of the same build with other weights."""
    autoencoder = load_model(tiny_autoencoder_folder, Autoencoder)
    autoencoder.latent_mean.add_(1)
    save_model(tmp_path / "other", autoencoder)
    return tmp_path / "other"


@pytest.mark.parametrize(("changes", "spec", "message"), [
    ({"base_width": 16}, {}, "base_width is 8, not 16"),
    ({"multipliers": "1,3"}, {}, r"multipliers is \[1, 2\], not \[1, 3\]"),
    ({"prediction": "velocity"}, {}, "prediction is 'noise', not 'velocity'"),
    ({"schedule": "cosine"}, {}, "schedule is 'linear', not 'cosine'"),
    ({"diffusion_steps": 500}, {}, "steps is 1000, not 500"),
    ({"conditioning_dropout": 0.1}, {}, r"conditioning is \[\], not \[3, 7\]"),
    ({}, {"context": "concat"}, "context is 'initial_estimate', not 'concat'"),
    ({}, {"mask_dilation": 1}, "mask_dilation is 0, not 1"),
])  # fmt: skip
def test_a_model_of_another_kind_is_rejected(model, tiny_autoencoder_folder, changes, spec, message):
    config = settings(start_dir=str(model), **changes)
    with pytest.raises(
        ConfigError, match=rf"^the model to start from: {message}\. Fix: set the options to these values"
    ):
        new_model(tiny_autoencoder_folder, config, SPEC.model_copy(update=spec))


def test_all_that_differs_is_named_in_one_line(model, other_autoencoder):
    config = settings(start_dir=str(model), base_width=16, prediction="velocity", schedule="cosine")
    with pytest.raises(ConfigError) as rejection:
        new_model(other_autoencoder, config, SPEC.model_copy(update={"context": "composite"}))
    message = str(rejection.value)
    for name in ("autoencoder is", "prediction is", "base_width is", "schedule is", "context is", "in_channels is 12"):
        assert message.count(name) == 1, message
    assert "\n" not in message


def test_a_model_of_other_latents_is_rejected_by_the_digests_of_both(model, tiny_autoencoder_folder, other_autoencoder):
    digests = [load_model(folder, Autoencoder).folder_config["sha256"][:12]
               for folder in (tiny_autoencoder_folder, other_autoencoder)]  # fmt: skip
    with pytest.raises(ConfigError, match="autoencoder is '{}', not '{}'".format(*digests)):
        new_model(other_autoencoder, settings(start_dir=str(model)), SPEC)


def test_autoencoders_are_compared_by_weights_not_by_files(model, tmp_path):
    halved = load_model(model / "autoencoder", Autoencoder).half()
    config = json.loads((model / "config.json").read_text())
    shutil.copytree(model, tmp_path / "exported")
    config["autoencoder_sha256"] = save_model(tmp_path / "exported" / "autoencoder", halved)
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    save_model(tmp_path / "longer", load_model(tmp_path / "exported" / "autoencoder", Autoencoder), box_margin=4)
    started = new_model(tmp_path / "longer", settings(start_dir=str(tmp_path / "exported")), SPEC)
    assert same(started.denoiser.state_dict(), load_model(model, ADM).state_dict())


def test_a_folder_that_holds_no_model_is_rejected(model, tiny_autoencoder_folder, tmp_path):
    with pytest.raises(WeightsError, match="no such model folder"):
        new_model(tiny_autoencoder_folder, settings(start_dir=str(tmp_path / "nowhere")), SPEC)
    shutil.copytree(model, tmp_path / "spoilt")
    (tmp_path / "spoilt" / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="sha256 differs"):
        new_model(tiny_autoencoder_folder, settings(start_dir=str(tmp_path / "spoilt")), SPEC)


def test_what_was_started_from_and_saved_again_is_the_model(model, tiny_autoencoder_folder, tmp_path):
    """A training of no step changes nothing that a result depends on."""
    config = settings(start_dir=str(model))
    started = new_model(tiny_autoencoder_folder, config, SPEC)
    trained = types.SimpleNamespace(config=config, model=started, best=[], step=0)
    save_trained(trained, tiny_autoencoder_folder, tmp_path / "again")
    one, other = (LatentDiffusion.load(folder, device="cpu") for folder in (model, tmp_path / "again"))
    assert same(one.denoiser.state_dict(), other.denoiser.state_dict())
    for name in ("spec", "temperature", "crop", "prediction"):
        assert getattr(one, name) == getattr(other, name)
