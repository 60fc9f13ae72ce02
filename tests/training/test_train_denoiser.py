"""A denoiser is trained by one call, without notebooks and run folders."""

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.training.options import TrainingOptions
from ldm_lib.training.train import train_denoiser

OPTIONS = TrainingOptions(base_width=8, multipliers="1", attention_rates="1", max_epochs=2, val_every=1,
                          num_inference_steps=2, save_samples_every=0, latent_crop=5, device="cpu")  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.denoiser.parameters(), b.denoiser.parameters(), strict=True))


@pytest.fixture(scope="module")
def trained(coarse, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return train_denoiser(Autoencoder.load(coarse), cases[:2], OPTIONS, folder=folder), folder


def test_what_was_trained_is_saved_loaded_and_inpaints(trained, cases, tmp_path):
    model, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == ["autoencoder", "checkpoints", "latents", "metrics.csv"]
    model.save(tmp_path / "model")
    loaded, case = LatentDiffusion.load(tmp_path / "model", device="cpu"), load_case(cases[0])
    assert same(loaded, model)
    results = [Inpainter(each)(case, seed=1, num_inference_steps=2).mean for each in (model, loaded)]
    np.testing.assert_array_equal(*results)


def test_a_finished_training_is_returned_as_it_is(trained, coarse, cases):
    model, folder = trained
    before = (folder / "metrics.csv").read_bytes()
    again = train_denoiser(Autoencoder.load(coarse), cases[:2], OPTIONS, folder=folder)
    assert same(again, model) and (folder / "metrics.csv").read_bytes() == before


def test_validation_cases_are_scored_and_change_nothing(trained, coarse, cases, tmp_path):
    model = train_denoiser(Autoencoder.load(coarse), cases[:2], OPTIONS, folder=tmp_path, validation_cases=cases[4:5])
    assert same(model, trained[0]) and "val_psnr" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_the_training_of_a_model_continues_from_its_weights(trained, cases, tmp_path):
    model = trained[0]
    still = OPTIONS.model_copy(update={"max_epochs": 1, "learning_rate": 1e-12, "seed": 5})
    assert not same(model, train_denoiser(model, cases[:2], OPTIONS, folder=tmp_path / "a"))
    slow = train_denoiser(model, cases[:2], still, folder=tmp_path / "b")
    pairs = zip(slow.denoiser.parameters(), model.denoiser.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs), "the seed of the options draws no new weights"
    wider = OPTIONS.model_copy(update={"base_width": 16})
    with pytest.raises(ConfigError, match="the model to start from: base_width is 8, not 16"):
        train_denoiser(model, cases[:2], wider, folder=tmp_path / "c")


def test_a_patient_is_never_on_both_sides(coarse, cases, tmp_path):
    with pytest.raises(ConfigError, match=r"patients Synthetic_00000 are among both training and validation cases"):
        train_denoiser(Autoencoder.load(coarse), cases[:1], OPTIONS, folder=tmp_path, validation_cases=cases[1:2])


@pytest.mark.parametrize(("given", "line"), [([], "none of 0 cases has a t1n"), ("cases", "needs cases, not str")])
def test_without_a_case_nothing_is_written(coarse, tmp_path, given, line):
    with pytest.raises(InputError, match=line):
        train_denoiser(Autoencoder.load(coarse), given, OPTIONS, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kept", [0, 2])
def test_fresh_samples_train_the_same_network_each_time(coarse, cases, tmp_path, kept):
    """Drawn when they are needed, or twice for each case and kept."""
    options = OPTIONS.model_copy(update={"fresh_samples": True, "cache_variants": kept})
    models = [train_denoiser(Autoencoder.load(coarse), cases[:2], options, folder=tmp_path / name) for name in "ab"]
    assert same(*models) and len(list((tmp_path / "a" / "latents").glob("*.safetensors"))) == kept
    other = options.model_copy(update={"seed": 1})
    assert not same(models[0], train_denoiser(Autoencoder.load(coarse), cases[:2], other, folder=tmp_path / "c"))


@pytest.mark.parametrize(("values", "cause"), [
    ({"cache_variants": 0}, "cache_variants = 0: 1 or more without fresh_samples"),
    ({"fresh_samples": True, "latent_crop": 0}, "latent_crop = 0: fresh_samples need the size of a crop"),
    ({"fresh_samples": True, "cache_variants": 0, "overfit_batches": 1}, "or with overfit_batches"),
])  # fmt: skip
def test_options_that_leave_no_samples_are_rejected(values, cause):
    with pytest.raises(ConfigError, match=cause):
        TrainingOptions.parse(values)
