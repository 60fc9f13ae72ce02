"""Laws of the autoencoder's training: where it starts, what it sees, and that it can be taken up again."""

import doctest

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder import crop_sampler, fitting
from ldm_lib.autoencoder import training as autoencoder_training
from ldm_lib.autoencoder.fitting import latent_statistics
from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.options import AutoencoderTrainingOptions
from ldm_lib.autoencoder.region_decoding import reconstruct
from ldm_lib.autoencoder.training import AutoencoderTraining, build_autoencoder, fit_autoencoder, train_autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.errors import ConfigError, TrainingError
from ldm_lib.experiment.presets import resolve

CPU = torch.device("cpu")
HOW = {"device": CPU, "precision": "32"}


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    small = {"channels": (4, 8), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    return Autoencoder.of(**small | options)


def settings(**changes):
    small = {"channels": "4,8", "autoencoder_steps": 30, "autoencoder_batch_size": 2, "crop": 8, "final_crop": 8,
             "precision": "32", "autoencoder_learning_rate": 1e-3}  # fmt: skip
    return resolve("smoke", small | changes)["02_autoencoder_check"]


@pytest.fixture
def train(tmp_path):
    """Trains in a new folder; the rows that the training returns."""

    def run(autoencoder, cases, *, folder=None, **changes):
        folder = folder or tmp_path / str(len(list(tmp_path.iterdir())))
        return fit_autoencoder(autoencoder, cases, settings(**changes), folder=folder, **HOW)

    return run


def weights(autoencoder):
    return torch.cat([value.flatten().float() for value in autoencoder.state_dict().values()])


def test_training_lowers_the_loss_and_standardises(cases, train):
    autoencoder = fresh(norm="group")
    rows = train(autoencoder, cases[:4], autoencoder_steps=60)
    start, end = (np.mean([row["l1"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert [row["step"] for row in rows] == list(range(60))
    assert end < 0.6 * start
    assert max(row["learning_rate"] for row in rows) == pytest.approx(1e-3, rel=0.05)
    assert not autoencoder.training and not any(p.requires_grad for p in autoencoder.parameters())
    mean, std = latent_statistics(autoencoder, [cases[1], cases[3]], **HOW)
    assert torch.allclose(autoencoder.latent_mean, mean) and torch.allclose(autoencoder.scale_factor, 1 / std)


def test_the_rim_of_a_crop_which_lacks_neighbours_leaves_the_loss():
    config = settings(crop=12, final_crop=12, autoencoder_steps=1)
    training = AutoencoderTraining(fresh(), config, **HOW)
    volume = torch.rand(2, 1, 12, 12, 12)
    with torch.no_grad():
        mean, std = training.autoencoder.moments(volume)
        wrong = (training.autoencoder.decode_raw(mean + std * training._noise(mean, 0)) - volume).abs()
    found = training.step(0, volume, ["case"])["l1"]
    assert found == pytest.approx(wrong[..., 2:-2, 2:-2, 2:-2].mean().item(), rel=1e-5)
    assert found != pytest.approx(wrong.mean().item(), rel=1e-3)


def test_training_is_a_function_of_the_seed(cases, train):
    one, same, other = fresh(), fresh(), fresh()
    for autoencoder, seed in ((one, 0), (same, 0), (other, 1)):
        torch.manual_seed(np.random.randint(1000))  # what was drawn before does not matter
        train(autoencoder, cases[:2], seed=seed, autoencoder_steps=3)
    assert torch.equal(weights(one), weights(same)) and not torch.equal(weights(one), weights(other))


def test_a_linear_start_is_no_worse_after_training(cases, train):
    def error(codec):
        images = [grid_case(load_case(case), 2).target for case in (cases[0], cases[2])]
        return np.mean([np.abs(reconstruct(codec, image, **HOW).volume - image)[image > 0].mean() for image in images])

    trained = fresh(linear_start=True)
    train(trained, cases[:4], autoencoder_steps=30)
    assert error(trained) < 1.05 * error(trained.linear)


def test_training_never_opens_another_patient(cases, monkeypatch, train):
    opened = []
    for module in (fitting, crop_sampler):
        monkeypatch.setattr(module, "load_case", lambda case: opened.append(case.patient) or load_case(case))
    train(fresh(), cases[:4], autoencoder_steps=5)
    assert set(opened) == {cases[0].patient, cases[2].patient}


def test_a_loss_that_is_not_finite_stops_and_names_step_and_case(cases, monkeypatch, train):
    batch = crop_sampler.CropLoader.batch

    def spoilt(self, step):
        volume, names = batch(self, step)
        return (volume * np.nan if step == 3 else volume), names

    monkeypatch.setattr(crop_sampler.CropLoader, "batch", spoilt)
    with pytest.raises(TrainingError, match=rf"loss is nan at step 3, on crops of {cases[0].key}\."):
        train(fresh(), cases[:1])


def test_a_resumed_training_is_the_uninterrupted_one(cases, monkeypatch, train, tmp_path):
    """Weight for weight, and row for row but for the seconds."""
    options = {"autoencoder_steps": 10, "crop": 12, "final_crop": 12}
    whole, torn = fresh(linear_start=True), fresh(linear_start=True)
    rows = train(whole, cases[:4], **options)
    step = AutoencoderTraining.step

    def killed(self, number, *batch):
        if number == 6:
            raise KeyboardInterrupt
        return step(self, number, *batch)

    monkeypatch.setattr(AutoencoderTraining, "step", killed)
    monkeypatch.setattr(autoencoder_training, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(torn, cases[:4], folder=tmp_path / "torn", **options)
    monkeypatch.setattr(AutoencoderTraining, "step", step)
    again = fresh(seed=5, linear_start=True)
    resumed = train(again, cases[:4], folder=tmp_path / "torn", **options)
    assert torch.equal(weights(whole), weights(again))
    for row in rows + resumed:
        row.pop("seconds")
    assert resumed == rows


def test_the_weights_that_are_kept_are_the_average(cases, train, monkeypatch):
    """Against the average by its recurrence, from the weights after each step."""
    seen, step = [], AutoencoderTraining.step

    def watched(self, *batch):
        figures = step(self, *batch)
        seen.append(torch.cat([p.detach().flatten() for p in self.autoencoder.parameters()]).clone())
        return figures

    monkeypatch.setattr(AutoencoderTraining, "step", watched)
    autoencoder = fresh()
    train(autoencoder, cases[:1], autoencoder_steps=12, autoencoder_ema_decay=0.6)
    average = seen[0]
    for k, now in enumerate(seen[1:], start=1):
        rate = min(0.6, (1 + k) / (10 + k))
        average = rate * average + (1 - rate) * now
    kept = torch.cat([p.flatten() for p in autoencoder.parameters()])
    assert torch.allclose(kept, average, atol=1e-6) and not torch.allclose(kept, seen[-1], atol=1e-6)


def test_without_a_network_nothing_is_trained_and_latents_are_standardised(cases, train, tmp_path):
    autoencoder = fresh(linear_start=True, learned="none")
    assert train(autoencoder, cases[:4], folder=tmp_path / "none") == []
    mean, std = latent_statistics(autoencoder, cases[:4], **HOW)
    mean[autoencoder.mirror < 0] = 0  # of what a mirror image turns the sign of
    assert torch.equal(autoencoder.latent_mean, mean) and torch.allclose(autoencoder.scale_factor, 1 / std)
    assert not (tmp_path / "none").exists()


def test_an_autoencoder_is_what_its_parameters_say():
    config = settings(input_transform="haar", latent_channels=5, blocks=2, crop=32, final_crop=32)
    one, same = (build_autoencoder(config, spacing_mm=2.0) for _ in range(2))
    assert one.factor == 8 and one.latent_channels == 5 and one.spacing_mm == 2.0
    assert one.config["norm"] == "local" and one.config["network"]["num_res_blocks"] == [2, 2]
    assert torch.equal(weights(one), weights(same))


def test_the_example_is_right_and_no_cases_are_rejected():
    found = doctest.testmod(autoencoder_training)
    assert found.attempted and not found.failed
    with pytest.raises(TrainingError, match="no cases"):
        train_autoencoder([])


@pytest.mark.parametrize("steps", [1, 2])
def test_even_one_step_is_a_training(cases, steps, train):
    assert len(train(fresh(), cases[:1], autoencoder_steps=steps)) == steps


def test_an_autoencoder_is_trained_from_cases_and_options_alone(cases, tmp_path):
    options = {"channels": "4,8", "autoencoder_steps": 3, "autoencoder_batch_size": 2, "crop": 8, "final_crop": 8}
    options = AutoencoderTrainingOptions(**options)
    alone = train_autoencoder(cases[:2], options, device="cpu", precision="32")
    kept = train_autoencoder(cases[:2], options, folder=tmp_path / "kept", device="cpu", precision="32")
    assert torch.equal(weights(alone), weights(kept)) and alone.spacing_mm == 8.0
    assert [row["step"] for row in alone.history] == [0, 1, 2] and (tmp_path / "kept" / "last.ckpt").exists()
    with pytest.raises(ConfigError, match="precision = 'fp16': allowed: auto, 32, bf16, 16"):
        train_autoencoder(cases[:2], options, device="cpu", precision="fp16")
    with pytest.raises(TrainingError, match="no cases"):
        train_autoencoder([])
