"""Resuming a training changes nothing, known latent voxels stay clean, and what is written can be read again."""

import csv
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.autoencoder.region_decoding import reconstruct
from ldm_lib.autoencoder.training import build_autoencoder, fit_autoencoder
from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.diffusion.fresh_samples import fresh_samples
from ldm_lib.diffusion.latent_cache import LatentCache
from ldm_lib.diffusion.latents import LatentSpec, collate, encode_case, input_channels
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.parameterisation import prediction_target
from ldm_lib.diffusion.unet import ADM
from ldm_lib.errors import ConfigError, InterruptionError, TrainingError, WeightsError
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.evaluation.reconstruction import upper_bound
from ldm_lib.experiment.presets import resolve
from ldm_lib.images.volume import normalise, read_volume
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.single_file import inpaint
from ldm_lib.model_io import load_model, save_model
from ldm_lib.training import batch_plan, checkpoints, validation
from ldm_lib.training import step as trainer
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples
from ldm_lib.training.initialise import new_model
from ldm_lib.training.objective import channel_weights, loss_by_noise_level, noise_loss, noisy_composite, training_loss
from ldm_lib.training.train import save_trained, train
from ldm_lib.training.validation import Validation

CPU = torch.device("cpu")
TIMED = {"samples_per_s"}  # what differs from run to run
TWO_LEVELS = {"multipliers": "1,2", "attention_rates": "2"}  # what halves and doubles, at twice the time
LEVELS = validation.LEVELS  # in earnest


def settings(**changes):
    small = {"base_width": 8, "multipliers": "1", "attention_rates": "1", "precision": "32", "device": "cpu",
             "max_epochs": 4, "val_every": 2, "num_inference_steps": 2, "save_samples_every": 0, "warmup_steps": 2,
             "latent_crop": 5, "ema_decay": 0.9, "batch_size": 2, "learning_rate": 1e-3,
             "checkpoint_every": 100}  # fmt: skip
    return resolve("smoke", small | changes)["04_training"]


class Study:
    """What a training needs: three encoded cases to train on and one to validate on."""

    def __init__(self, cases, folder, context="composite"):
        self.folder, self.spec = folder, LatentSpec(context=context)
        self.autoencoder = load_model(folder, Autoencoder)
        self.variants = {case.key: [self.encode(case)] for case in cases[:3]}
        self.validation = [load_case(cases[4])]
        self.validation_latents = [self.encode(cases[4])]

    def encode(self, case):
        on_grid = grid_case(load_case(case), self.autoencoder.factor)
        return encode_case(on_grid, self.autoencoder, self.spec, device=CPU, precision="32")

    def model(self, config):
        return new_model(self.folder, config, self.spec)

    def train(self, folder, config, variants=None):
        variants = self.variants if variants is None else variants
        return train(self.model(config), variants, self.validation, self.validation_latents, config, folder)


@pytest.fixture(scope="module", autouse=True)
def unseen():
    """Validations take longer than these trainings: no picture, one noise level of five; one test has all in earnest.

    And nothing here asks what a power cut leaves, so nothing waits for the disk.
    """
    draw = Validation._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "_draw", lambda self, data, filled, epoch: None)
        patch.setattr(validation, "LEVELS", 1)
        patch.setattr(os, "fsync", lambda stream: None)
        yield draw


@pytest.fixture(scope="module")
def study(cases, coarse):
    return Study(cases, coarse)


@pytest.fixture(scope="module")
def concat(cases, coarse):
    return Study(cases, coarse, "concat")


@pytest.fixture(scope="module")
def straight(study, tmp_path_factory):
    """The training of `settings()` that nothing disturbed, and its folder; how often it saves changes nothing."""
    folder = place(tmp_path_factory.mktemp("straight"))
    return study.train(folder, settings()), folder


def place(tmp_path, name="run"):
    """The folder of stage 04 of a run."""
    folder = tmp_path / name / "04_training"
    folder.mkdir(parents=True)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(stream)]


def epochs(folder):
    return [row for row in rows(folder) if row.get("epoch")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a, b):
    """Nested states, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


def state(trainer):
    return trainer.state()


def interrupt(monkeypatch, step):
    """Stop the training when so many steps are done, as a killed process would: nothing is saved on the way out."""
    advance = trainer.Trainer.advance

    def interrupted(self, data):
        if self.step == step:
            raise SystemExit(9)
        advance(self, data)

    monkeypatch.setattr(trainer.Trainer, "advance", interrupted)


# ---- law 6: a resumed training equals the uninterrupted one


@pytest.mark.parametrize(("changes", "step"), [
    ({"checkpoint_every": 2}, 3),
    pytest.param({"checkpoint_every": 3}, 5, marks=pytest.mark.slow),
    ({"accumulate_grad_batches": 2, "latent_flip_probability": 0.5, "checkpoint_every": 1}, 3),
    ({"dropout": 0.3, "val_every": 1, "max_epochs": 3} | TWO_LEVELS, 3),
    ({"overfit_batches": 1, "log_every": 3, "max_epochs": 2, "checkpoint_every": 2}, 5),
    ({"prediction": "flow", "schedule": "flow", "outside_weight": 0.1, "checkpoint_every": 3}, 4),
], ids=["plain", "rarely saved", "accumulate", "dropout", "debug", "flow"])  # fmt: skip
def test_a_resumed_training_equals_the_uninterrupted_one(study, tmp_path, monkeypatch, changes, step):
    monkeypatch.setattr(batch_plan, "DEBUG_PAIRS", 4)
    config, whole, broken = settings(**changes), place(tmp_path, "whole"), place(tmp_path, "broken")
    torch.manual_seed(1)
    straight = study.train(whole, config)
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(SystemExit, match="9"):
            study.train(broken, config)
    torch.manual_seed(2)
    resumed = study.train(broken, config)
    assert equal(state(straight), state(resumed))  # both networks, raw and averaged, the optimiser, what is summed
    assert straight.step == resumed.step > 0
    assert rows(broken) == rows(whole)
    digests = [save_trained(each, study.folder, f / "model") for each, f in ((straight, whole), (resumed, broken))]
    assert digests[0] == digests[1]
    assert (whole / "model" / "config.json").read_bytes() == (broken / "model" / "config.json").read_bytes()


def test_an_epoch_whose_validation_was_cut_off_is_validated_on_resume(study, straight, tmp_path, monkeypatch):
    """Killed between the checkpoint at an epoch's end and its validation: nothing is left out, none twice."""
    config, broken, scores = settings(checkpoint_every=1), place(tmp_path, "broken"), Validation.scores
    whole, folder = straight
    for step in (4, 8):  # in the middle, and at the very end, where nothing is left to train

        def cut_off(self, *args, epoch, step=step, **rest):
            if epoch == step // 2:
                raise SystemExit(9)
            return scores(self, *args, epoch=epoch, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(Validation, "scores", cut_off)
            with pytest.raises(SystemExit):
                study.train(broken, config)
        assert checkpoints.resumable(broken / "checkpoints")[0].name == f"last-0000000{step}.ckpt"
    assert equal(state(whole), state(study.train(broken, config))) and rows(broken) == rows(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_in_hand_and_saves_it(study, straight, tmp_path, monkeypatch, number):
    config, broken, advance = settings(), place(tmp_path, "broken"), trainer.Trainer.advance
    whole, folder = straight

    def signalled(self, data):
        if self.step == 4:
            signal.raise_signal(number)
        advance(self, data)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "advance", signalled)
        with pytest.raises(InterruptionError, match=f"stopped by {number.name} after step 5 of 8, saved") as stopped:
            study.train(broken, config)
    assert stopped.value.status == 128 + number and signal.getsignal(number) is before
    assert checkpoints.resumable(broken / "checkpoints")[0].name == "last-00000005.ckpt"
    assert equal(state(whole), state(study.train(broken, config))) and rows(broken) == rows(folder)


def test_loader_processes_change_nothing_and_can_be_resumed(study, straight, tmp_path, monkeypatch):
    broken, config = place(tmp_path, "broken"), settings(num_workers=2, checkpoint_every=5)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(SystemExit, match="9"):
            study.train(broken, config)
    assert equal(state(straight[0]), state(study.train(broken, config)))


def test_samples_drawn_when_they_are_needed_resume_to_the_last_bit_in_any_number_of_processes(
    study, cases, tmp_path, monkeypatch
):
    sources = fresh_samples(cases[:2], study.autoencoder, study.spec, crop=5, seed=0)
    variants, config = {each.case.key: each for each in sources}, settings(latent_crop=5, batch_size=2)
    straight, broken = study.train(place(tmp_path, "whole"), config, variants), place(tmp_path, "broken")
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(SystemExit, match="9"):
            study.train(broken, settings(latent_crop=5, batch_size=2, checkpoint_every=1), variants)
    resumed = study.train(broken, settings(latent_crop=5, batch_size=2, checkpoint_every=1, num_workers=2), variants)
    assert equal(state(straight), state(resumed)) and straight.step > 1


def test_training_from_the_cache_is_training_from_memory(study, cases, tmp_path):
    cache = LatentCache(tmp_path / "latents", study.autoencoder, "w", study.spec, device=CPU, precision="32")
    cached = {entry.case.key: entry for entry in cache.encode(cases[:3], variants=2)}
    trained = [
        study.train(place(tmp_path, name), config, variants)
        for name, variants, config in (
            ("disk", cached, settings(max_epochs=2)),
            ("memory", {key: list(entry) for key, entry in cached.items()}, settings(max_epochs=2)),
        )
    ]
    assert equal(*map(state, trained))
    assert rows(tmp_path / "disk" / "04_training") == rows(tmp_path / "memory" / "04_training")


def test_the_table_has_a_row_per_epoch_and_per_interval(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(batch_size=1, log_every=1, warmup_steps=8))
    found, ends = rows(folder), epochs(folder)
    assert [int(row["step"]) for row in found] == list(range(1, 13)), "a step that ends an epoch has one row"
    assert [(int(row["step"]), int(row["epoch"])) for row in ends] == [(3, 1), (6, 2), (9, 3), (12, 4)]
    assert all(float(row["grad_norm"]) > 0 for row in found)
    steps = [float(row["step_loss"]) for row in found]
    for k, row in enumerate(ends):
        assert float(row["train_loss"]) == pytest.approx(np.mean(steps[3 * k : 3 * k + 3]), rel=1e-6)
    assert [float(row["learning_rate"]) for row in ends] == pytest.approx([4e-3 / 9, 7e-3 / 9, 1e-3, 1e-3])
    validated = ["val_loss", "val_noise_loss", "val_noise_loss_raw", "val_psnr", "val_ssim", "val_noise_loss_t500"]
    assert [all(row[name] for name in validated) for row in ends] == [False, True, False, True]
    assert not any(row[name] for row in ends[::2] for name in validated)


# ---- what does not fit


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_is_that_of_its_schedule(study, tmp_path, schedule):
    """Eight steps of two epochs, two of them warm-up; half a cosine falls to 0 where the training ends."""
    trained = study.train(
        place(tmp_path), settings(learning_rate_schedule=schedule, warmup_steps=2, learning_rate=0.01)
    )
    assert trained.step == trained.plan.steps
    for step in range(trained.step):
        trained.step = step
        factor = (1 + np.cos(np.pi * step / trained.plan.steps)) / 2 if schedule == "cosine" else 1
        assert trained.learning_rate == pytest.approx(0.01 * min(1, (step + 1) / 3) * factor)


def test_another_training_is_rejected_with_the_list_and_an_allowed_change_is_made(study, cases, tmp_path):
    folder, config = place(tmp_path), settings(max_epochs=1)
    study.train(folder, config)

    def rejected(message, model=None, config=config, variants=study.variants, validation=study.validation):
        with pytest.raises(TrainingError, match=rf"last-00000002\.ckpt: is of another training: .*{message}"):
            train(model or study.model(config), variants, validation, study.validation_latents, config, folder)

    for changes, message in (
        ({"base_width": 12}, "base_width was 8, now 12"),
        ({"learning_rate": 2e-3, "seed": 4}, r"seed was 0, now 4; learning_rate was 0\.001, now 0\.002"),
        ({"batch_size": 1}, "global batch was 2, now 1"),
        ({"batch_size": 1, "max_epochs": 2, "allow_change": "max_epochs"}, "global batch was 2, now 1"),
        ({"max_epochs": 2}, "max_epochs was 1, now 2"),
    ):
        rejected(message, config=settings(**{"max_epochs": 1} | changes))
    rejected("training cases was '3, .*', now '2, ", variants=dict(list(study.variants.items())[:2]))
    rejected("validation cases was ", validation=[load_case(cases[5])])
    rejected("mask_dilation was 1, now 2", new_model(study.folder, config, LatentSpec(mask_dilation=2)))
    model = study.model(config)
    model.autoencoder.folder_config = {"sha256": "another"}
    rejected("autoencoder was .*, now 'another'", model)
    assert study.train(folder, settings(max_epochs=2, allow_change="max_epochs")).step == 4
    smaller = settings(max_epochs=3, batch_size=1, allow_change="max_epochs, batch_size")
    assert study.train(folder, smaller).complete


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(study, tmp_path, caplog):
    config, folder = settings(checkpoint_every=1, max_epochs=2), place(tmp_path)
    whole = study.train(folder, config)
    newest = checkpoints.resumable(folder / "checkpoints")[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resumed = study.train(folder, config)
    assert f"{newest.name}: does not match its sha256" in caplog.text
    assert equal(state(whole), state(resumed)) and checkpoints.read_verified(newest)


def test_without_a_whole_checkpoint_no_training_is_begun(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=1))
    for path in checkpoints.resumable(folder / "checkpoints"):
        path.write_bytes(b"PK and no more")
    with pytest.raises(WeightsError, match=r"none of \d checkpoints matches its sha256.*remove this folder"):
        study.train(folder, settings(max_epochs=1))


def test_a_full_disk_is_rejected_before_the_first_step(study, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(TrainingError, match=r"disk full: need .* MB, have 0\.0 MB"):
        study.train(place(tmp_path), settings())


# ---- steps


def test_accumulated_batches_are_one_large_batch(study, tmp_path):
    """Two batches of one, or one batch of two: the same samples, the same weight each."""
    changes = {"max_epochs": 2, "val_every": 2, "latent_crop": 0}
    large = study.train(place(tmp_path, "large"), settings(batch_size=2, **changes))
    small = study.train(place(tmp_path, "small"), settings(batch_size=1, accumulate_grad_batches=2, **changes))
    assert large.step == small.step == 4
    untrained = study.model(settings()).denoiser.state_dict()
    for name, value in large.denoiser.state_dict().items():
        moved = (value - untrained[name]).abs().max()
        assert (value - small.denoiser.state_dict()[name]).abs().max() <= 0.02 * moved + 1e-6, name


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_averaged_weights_follow_their_recursion(study, tmp_path, monkeypatch):
    seen, advance = [], trainer.Trainer.advance

    def spied(self, data):
        if not seen:
            seen.append(flat(self.denoiser).clone())
        advance(self, data)
        seen.append(flat(self.denoiser).clone())

    monkeypatch.setattr(trainer.Trainer, "advance", spied)
    trained = study.train(place(tmp_path), settings(batch_size=1, ema_decay=0.5))
    average = seen[0].double()
    for n, weights in enumerate(seen[1:], 1):
        rate = min(0.5, n / (9 + n))
        average = rate * average + (1 - rate) * weights.double()
    found = flat(trained.model.denoiser)
    assert len(seen) == 13
    assert torch.allclose(found.double(), average, atol=1e-6) and not torch.allclose(found, seen[-1], atol=1e-5)


@pytest.mark.parametrize("every", [1, 4])
def test_a_loss_that_is_not_finite_names_its_step_and_cases_and_is_never_saved(study, tmp_path, monkeypatch, every):
    """The check comes every few steps only, since it waits for a GPU; what it says is exact all the same."""
    loss, bad = trainer.training_loss, 3

    def spoiled(network, batch, model, *weights):
        spoiled.calls += 1
        return loss(network, batch, model, *weights) * (math.nan if spoiled.calls == bad else 1)

    spoiled.calls = 0
    monkeypatch.setattr(trainer, "training_loss", spoiled)
    folder, config = place(tmp_path), settings(log_every=every, checkpoint_every=2, val_every=4)
    cases = sorted({list(study.variants)[case] for *_, case in BatchPlan(3, config).sample_indices(bad - 1)})
    message = f"not finite in step {bad}, cases {', '.join(cases)}; last finite checkpoint: last-00000002.ckpt"
    with pytest.raises(TrainingError, match=message):
        study.train(folder, config)
    kept = checkpoints.resumable(folder / "checkpoints")
    assert [path.name for path in kept] == ["last-00000002.ckpt"]
    assert all(value.isfinite().all() for value in checkpoints.read_verified(kept[0])["average"].values())


def test_a_gradient_that_is_not_finite_is_never_saved(study, tmp_path, monkeypatch):
    """The loss may be finite in the step that spoils the weights."""

    def spoiled(self, network, optimiser, **options):
        spoiled.calls += 1
        return torch.tensor(math.inf if spoiled.calls == 3 else 1.0)

    spoiled.calls = 0
    monkeypatch.setattr("lightning.fabric.Fabric.clip_gradients", spoiled)
    folder = place(tmp_path)
    with pytest.raises(TrainingError, match=r"not finite in step 3, .*last finite checkpoint: last-00000002.ckpt"):
        study.train(folder, settings(checkpoint_every=1, log_every=4))
    assert next(path.name for path in checkpoints.resumable(folder / "checkpoints")) == "last-00000002.ckpt"


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
     r"no memory left on the GPU after step 3 \(CUDA out of memory. Tried to allocate 2 GiB\); last checkpoint: "
     r"last-00000002.ckpt. Fix: lower batch_size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
     r"a loader process died after step 3 \(DataLoader worker \(pid 7\) .*Fix: set num_workers to 0"),
], ids=["memory", "loader"])  # fmt: skip
def test_exhausted_memory_is_reported_with_the_checkpoint_to_resume_from(study, tmp_path, monkeypatch, error, message):
    advance = trainer.Trainer.advance

    def fails(self, data):
        if self.step == 3:
            raise error
        advance(self, data)

    monkeypatch.setattr(trainer.Trainer, "advance", fails)
    with pytest.raises(TrainingError, match=message):
        study.train(place(tmp_path), settings(checkpoint_every=2))


def test_more_devices_than_processes_are_rejected_while_there_is_something_to_train(study, tmp_path):
    folder = place(tmp_path)
    with pytest.raises(
        ConfigError, match=r"devices = 2: 1 here, after step 0 of 8.*ldm run 04 --run run --set devices=2"
    ):
        study.train(folder, settings(devices=2, batch_size=1))
    done = study.train(folder, settings())
    assert done.complete  # two devices with a batch of one each, or one with two: the same global batch
    again = study.train(folder, settings(devices=2, batch_size=1))
    assert equal(state(done)["average"], state(again)["average"])


@pytest.mark.parametrize("which", ["study", "concat"])
def test_known_latent_voxels_are_clean_in_every_training_step(which, request, tmp_path):
    study, seen = request.getfixturevalue(which), []
    config = settings(max_epochs=1, latent_crop=0, batch_size=1, patience=5)
    model = study.model(config)
    model.denoiser.register_forward_pre_hook(lambda net, given: seen.append((given[0].clone(), given[1])))
    train(model, study.variants, study.validation, study.validation_latents, config, place(tmp_path))
    seen = seen[:3]  # the averaged network has the hook too, in the validation that follows
    assert len({int(t) for _, t in seen}) == 3
    places = [BatchPlan(3, config).sample_indices(step)[0] for step in range(3)]
    for (x, t), where in zip(seen, places, strict=True):
        sample = TrainingSamples(list(study.variants.values()), config, 1000, global_batch=1)[where]
        known = (sample["mask"] == 0).expand_as(sample["voided"])
        assert x.shape[1] == input_channels(3, study.spec) == (8 if which == "study" else 12)
        assert int(t) == int(sample["t"])
        assert torch.equal(x[0, :3][known], sample["voided"][known])
        alpha_bar = (model.schedule.alpha**2)[sample["t"]]
        noisy = alpha_bar.sqrt() * sample["target"] + (1 - alpha_bar).sqrt() * sample["noise"]
        assert torch.allclose(x[0, :3][~known], noisy.float()[~known], atol=1e-5)
        assert torch.equal(x[0, 3:7], sample["conditioning"]) and torch.equal(x[0, 7:8], sample["mask"])
        if which == "concat":
            assert torch.equal(x[0, 8:11], sample["voided"]) and torch.equal(x[0, 11:], sample["mask_fraction"])


def test_concat_is_trained_saved_and_sampled(concat, cases, tmp_path):
    config, folder = settings(max_epochs=1, val_every=1), place(tmp_path)
    trained = concat.train(folder, config)
    extra = trained.denoiser.stem.weight[:, 8:] - concat.model(config).denoiser.stem.weight[:, 8:]
    assert extra.abs().max() > 0  # what concat adds is learnt from
    save(trained, concat, folder)
    loaded = LatentDiffusion.load(folder / "model", device="cpu", precision="32")
    assert loaded.spec.context == "concat"
    ours = Inpainter(trained.model)(concat.validation[0], num_inference_steps=2)
    assert np.array_equal(ours.mean, Inpainter(loaded)(concat.validation[0], num_inference_steps=2).mean)


FLOW = {"prediction": "flow", "schedule": "flow"}
OBJECTIVES = [{"prediction": "noise"}, {"prediction": "velocity"}, {"prediction": "x0"}, FLOW]
TRAINED = [pytest.param(o, marks=[pytest.mark.slow] * (o["prediction"] in ("noise", "x0"))) for o in OBJECTIVES]


def batch_at(study, t):
    (sample,) = next(iter(study.variants.values()))
    noise = torch.randn(sample["target"].shape, generator=torch.Generator().manual_seed(4))
    return collate([sample | {"t": torch.tensor(t), "noise": noise, "outside": 1 - sample["mask"]}])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["prediction"])
def test_the_loss_is_that_of_what_is_predicted(study, objective):
    """Closed form: an untrained denoiser is silent, so its loss is the mean square of its target."""
    config = settings(**objective)
    model, batch = study.model(config), batch_at(study, 600)
    target = prediction_target(config.prediction, model.schedule, batch["target"], batch["noise"], batch["t"])
    mask = batch["loss"].expand_as(target) > 0
    found = training_loss(model.denoiser, batch, model)
    assert found.item() == pytest.approx(target[mask].square().mean().item(), rel=1e-5)
    silent = {"noise": 0.0, "x0": None, "velocity": model.schedule.sigma[600], "flow": 1.0}[config.prediction]
    noisy = model.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
    as_noise = noisy / model.schedule.sigma[600] if silent is None else silent * noisy
    error = (as_noise - batch["noise"])[mask].square().mean().item()
    assert noise_loss(model.denoiser, batch, model).item() == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["prediction"])
def test_known_latent_voxels_have_the_target_of_clean_latents_without_noise(study, objective):
    config = settings(**objective)
    model, batch = study.model(config), batch_at(study, 600)
    alone = training_loss(model.denoiser, batch, model)
    factor = {"noise": 0.0, "x0": 1.0, "velocity": float(model.schedule.sigma[600]), "flow": 1.0}[config.prediction]
    outside = batch["outside"].expand_as(batch["voided"]) > 0
    added = 0.25 * (factor * batch["voided"][outside]).square().mean()
    found = training_loss(model.denoiser, batch, model, outside_weight=0.25)
    assert found.item() == pytest.approx(float(alone + added), rel=1e-5)


@pytest.mark.parametrize(("t", "weighted"), [(949, False), (950, True), (999, True)])
def test_channels_are_weighted_in_the_noisiest_twentieth_alone(study, t, weighted):
    """Closed form: an untrained denoiser is silent, so its loss is the weighted mean square of its target."""
    model, batch, weights = study.model(settings()), batch_at(study, t), torch.tensor([2.0, 0.75, 0.25])
    target = prediction_target(model.prediction, model.schedule, batch["target"], batch["noise"], batch["t"])
    by_channel = target[:, :, batch["loss"][0, 0] > 0].square().mean(dim=(0, 2))
    expected = (by_channel * (weights if weighted else 1)).mean()
    found = training_loss(model.denoiser, batch, model, noisiest_weights=weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("steps", [2, 10, 30, 999, 1000])
def test_the_weighted_timesteps_are_those_that_are_drawn_for_the_estimate(steps):
    drawn = {steps - 1 - t // batch_plan.NOISIEST for t in range(steps)}
    assert min(drawn) == batch_plan.first_noisiest(steps) and max(drawn) == steps - 1


def test_channel_weights_are_those_of_the_residual_in_the_image(study):
    """The mean squared change of the image is that of the latents under the weights, for independent changes."""
    codec = Autoencoder.of(channels=(8, 8), latent_channels=4, blocks=1, learned="none", spacing_mm=8.0).eval()
    mean, root = torch.zeros(8).double(), torch.diag(torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1])).double()
    codec.linear.fit(mean, root @ root)
    std = (0.5, 1.0, 2.0, 0.1)
    spec = LatentSpec(context="initial_estimate", residual_std=std)
    found = channel_weights(replace(study.model(settings()), autoencoder=codec, spec=spec))
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 9, 9, 9, generator=draw)
    energies = []
    for channel, scale in enumerate(std):
        alone = torch.zeros_like(latents)
        alone[:, channel] = scale * latents[:, channel]
        change = codec.decode(alone) - codec.decode(torch.zeros_like(latents))
        energies.append(change.square().mean() / latents[:, channel].square().mean())
    energies = torch.stack(energies)
    torch.testing.assert_close(found, energies / energies.mean(), rtol=0.05, atol=0.02)
    assert found.mean().item() == pytest.approx(1) and found.max() > 2 * found.min()


# ---- validation, early stopping, checkpoints and samples


def test_validation_scores_the_averaged_weights_in_image_space(study, tmp_path, monkeypatch, unseen):
    monkeypatch.setattr(Validation, "_draw", unseen)
    monkeypatch.setattr(validation, "LEVELS", LEVELS)
    folder, config = place(tmp_path), settings(max_epochs=2, seed=3)
    trained = study.train(folder, config)
    data, found = study.validation[0], rows(folder)[-1]
    filled = Inpainter(trained.model)(data, seed=3, num_inference_steps=config.num_inference_steps).mean
    error = normalise(filled, data.scale) - normalise(data.target, data.scale)
    scores = brats_scores(filled, data.target, data.voided, data.healthy)
    assert float(found["val_loss"]) == pytest.approx(float(np.mean(error**2)), rel=1e-4)
    assert float(found["val_psnr"]) == pytest.approx(scores["psnr_01"], abs=1e-3)
    assert float(found["val_ssim"]) == pytest.approx(scores["ssim"], abs=1e-4)
    networks = {"ema": trained.model.denoiser, "raw": trained.denoiser}
    levels = loss_by_noise_level(networks, study.validation_latents, trained.model, seed=0, levels=3)
    assert [row["t"] for row in levels] == [0, 500, 999] and all(row["ema"] != row["raw"] for row in levels)
    assert float(found["val_noise_loss_t500"]) == pytest.approx(levels[1]["ema"], rel=1e-5)
    assert (folder / "panels" / "epoch_002.png").read_bytes().startswith(b"\x89PNG")


def unlucky(monkeypatch, losses=None):
    """Validations whose loss grows, or is what is listed."""
    counter = iter(losses or (1.0 + k for k in range(1, 1000)))
    scores = {"val_psnr": 0.0, "val_ssim": 0.0}
    monkeypatch.setattr(Validation, "_score", lambda *args: {"val_loss": next(counter), **scores})


@pytest.mark.parametrize(("patience", "val_every", "epochs"), [(3, 2, 6), (2, 1, 3), (1, 3, 6)])
def test_early_stopping_counts_validations(study, tmp_path, monkeypatch, patience, val_every, epochs):
    unlucky(monkeypatch)
    config, folder = settings(max_epochs=20, patience=patience, val_every=val_every, batch_size=3), place(tmp_path)
    first, before = study.train(folder, config), rows(folder)
    again = study.train(folder, config)
    assert first.epoch == epochs and equal(state(first), state(again)) and rows(folder) == before, "it stays stopped"


def test_a_better_validation_restarts_the_count(study, tmp_path, monkeypatch):
    unlucky(monkeypatch, [5.0, 6.0, 4.0, 4.0, 7.0, 1.0])
    assert study.train(place(tmp_path), settings(max_epochs=20, patience=2, val_every=1, batch_size=3)).epoch == 5


def test_debug_mode_never_stops_early(study, tmp_path, monkeypatch):
    unlucky(monkeypatch)
    monkeypatch.setattr(batch_plan, "DEBUG_PAIRS", 2)
    config = settings(max_epochs=3, patience=1, val_every=1, overfit_batches=1, batch_size=1)
    trained = study.train(place(tmp_path), config)
    assert trained.epoch == 3 and trained.step == 3 * 2


def test_checkpoints_are_named_plain_and_whole(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=3, val_every=1))
    kept = sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))
    losses = {int(row["epoch"]): float(row["val_loss"]) for row in epochs(folder)}
    best = sorted(losses, key=losses.get)[:2]
    names = {f"brain_mri_inpainting-epoch={epoch}-val_loss={losses[epoch]:.6f}.ckpt" for epoch in best}
    assert set(kept) == names | {"last-00000004.ckpt", "last-00000006.ckpt"}
    for name in kept:
        content = checkpoints.read_verified(folder / "checkpoints" / name)
        assert not [key for key in content["average"] if "autoencoder" in key]
    assert not list((folder / "checkpoints").glob(".*"))


def test_samples_are_written_as_volumes(study, tmp_path, cases):
    folder = place(tmp_path)
    trained = study.train(folder, settings(max_epochs=4, val_every=1, save_samples_every=2, batch_size=3))
    data = study.validation[0]
    found = sorted(path.relative_to(folder).as_posix() for path in (folder / "samples").rglob("*.nii.gz"))
    assert found == [f"samples/epoch_{e:03d}/{cases[4].id}_0000_{what}.nii.gz"
                     for e in (2, 4) for what in ("inpainted", "target")]  # fmt: skip
    last, source = read_volume(folder / found[2]), data.source
    filled = Inpainter(trained.model)(data, num_inference_steps=2).mean
    assert last.preamble == source.preamble and np.array_equal(last.raw[~data.mask], source.raw[~data.mask])
    assert np.array_equal(last.raw[data.mask], np.clip(np.rint(filled[data.mask]), -32768, 32767))
    assert np.array_equal(read_volume(folder / found[3]).raw, data.target)


@pytest.mark.parametrize(("every", "val_every", "epochs"), [(0, 3, []), (3, 2, [4, 6])])
def test_samples_are_written_at_the_first_validation_that_is_due(study, tmp_path, every, val_every, epochs):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=6, val_every=val_every, save_samples_every=every, batch_size=3))
    assert sorted(p.name for p in folder.glob("samples/*")) == [f"epoch_{e:03d}" for e in epochs]


def save(trained, study, folder):
    return save_trained(trained, study.folder, folder / "model")


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_weights_that_are_kept(study, tmp_path, monkeypatch, keep):
    """Every validation is worse than the one before, so the best weights are the first epoch's."""
    unlucky(monkeypatch)
    folder = place(tmp_path)
    save(study.train(folder, settings(max_epochs=3, val_every=1, keep_weights=keep)), study, folder)
    name = "last-00000006.ckpt" if keep == "last" else "brain_mri_inpainting-epoch=1-val_loss=2.000000.ckpt"
    state = checkpoints.read_verified(folder / "checkpoints" / name)["average"]
    assert same(load_model(folder / "model", ADM).state_dict(), state)


@pytest.mark.parametrize("objective", TRAINED, ids=lambda o: o["prediction"])
def test_a_trained_model_inpaints_files(study, cases, tmp_path, objective):
    folder = place(tmp_path)
    trained = study.train(folder, settings(max_epochs=1, **TWO_LEVELS, **objective))
    digest = save(trained, study, folder)
    loaded = LatentDiffusion.load(folder / "model", device="cpu", precision="32")
    assert loaded.denoiser.folder_config["sha256"] == digest and loaded.prediction == objective["prediction"]
    assert torch.equal(loaded.schedule.alpha, trained.model.schedule.alpha)
    assert loaded.denoiser.folder_config["optimiser_steps"] == trained.step
    ours = Inpainter(trained.model)(study.validation[0], num_inference_steps=2)
    assert np.array_equal(ours.mean, Inpainter(loaded)(study.validation[0], num_inference_steps=2).mean)
    inpaint(
        cases[4].t1n_voided,
        cases[4].mask,
        tmp_path / "o.nii.gz",
        model=folder / "model",
        num_inference_steps=2,
        device="cpu",
    )
    assert read_volume(tmp_path / "o.nii.gz").shape == study.validation[0].source.shape


def test_the_first_weights_are_a_function_of_the_seed(study):
    one, same_seed, other = (study.model(settings(seed=seed)).denoiser.state_dict() for seed in (0, 0, 1))
    assert same(one, same_seed) and not same(one, other)


def test_the_composite_that_is_shown_is_the_one_that_is_trained_on(study):
    batch = collate([next(iter(study.variants.values()))[0]])
    model = study.model(settings())
    clean, noisy = (noisy_composite(batch, model, t=t, seed=0) for t in (0, 999))
    mask = batch["mask"].expand_as(clean) > 0
    assert torch.equal(clean[~mask], batch["voided"][~mask]) and torch.equal(noisy[~mask], batch["voided"][~mask])
    assert torch.allclose(clean[mask], batch["target"][mask], atol=0.1) and abs(noisy[mask].std() - 1) < 0.1


# ---- the overfitting test


@pytest.mark.slow
def test_one_case_can_be_overfitted(cases, tmp_path):
    """Sixteen fixed pairs of one case: the loss falls below a tenth, and its mask is recovered from fresh noise."""
    torch.manual_seed(0)
    changes = {"overfit_batches": 1, "batch_size": 4, "max_epochs": 80, "learning_rate": 2e-3, "val_every": 80,
               "autoencoder_steps": 100, "device": "cpu", "precision": "32"}  # fmt: skip
    stages = resolve("smoke", changes)
    build, config = stages["02_autoencoder_check"], stages["04_training"]
    autoencoder, how = build_autoencoder(build, spacing_mm=8.0), {"device": CPU, "precision": "32"}
    fit_autoencoder(autoencoder, cases[2:], build, folder=tmp_path / "checkpoints", **how)  # of other patients
    save_model(tmp_path / "autoencoder", autoencoder)
    study, data = Study(cases, tmp_path / "autoencoder"), load_case(cases[0])
    study.variants = dict(list(study.variants.items())[:1])
    study.validation, study.validation_latents = [data], next(iter(study.variants.values()))
    folder = place(tmp_path)
    trained = study.train(folder, config)
    losses = [float(row["train_loss"]) for row in epochs(folder)]
    assert np.mean(losses[-3:]) < 0.1 * losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}"
    filled = Inpainter(trained.model)(data, n_samples=8, num_inference_steps=config.num_inference_steps).mean
    ours = brats_scores(filled, data.target, data.voided, data.healthy)["psnr_01"]
    rebuilt = reconstruct(autoencoder, grid_case(data, autoencoder.factor).target, **how).volume
    _, best = upper_bound(data, rebuilt, autoencoder.factor)
    assert ours > best["psnr_01"] - 3, f"{ours:.2f} dB, upper bound {best['psnr_01']:.2f} dB"


# ---- more laws


def test_a_finished_training_is_not_continued(study, tmp_path):
    folder, config = place(tmp_path), settings(max_epochs=2)
    first = study.train(folder, config)
    before = rows(folder)
    again = study.train(folder, config)
    assert equal(state(first), state(again)) and rows(folder) == before
    assert again.epoch == 2 and again.step == first.step


def test_averaged_weights_are_used_without_dropout(study, tmp_path):
    trained = study.train(place(tmp_path), settings(max_epochs=1, dropout=0.5))
    draws = [Inpainter(trained.model)(study.validation[0], num_inference_steps=2).mean for _ in range(2)]
    assert np.array_equal(*draws)


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=1))
    orphan = folder / "checkpoints" / ".last-00000003.ckpt.4711.part"
    orphan.write_bytes(b"half")
    assert study.train(folder, settings(max_epochs=1)).complete and not orphan.exists()
