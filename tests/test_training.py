"""Laws of the training: resuming changes nothing, known cells stay clean, and what is written can be read again."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_lib import batches, training
from ldm_lib.autoencoder import Autoencoder
from ldm_lib.autoencoding import build_autoencoder, train_autoencoder
from ldm_lib.batches import EpochOrder, TrainingSamples
from ldm_lib.cache import LatentCache
from ldm_lib.cases import load_case
from ldm_lib.conditioning import model_case
from ldm_lib.errors import ConfigError, TrainingError, WeightsError
from ldm_lib.fitting import latent_statistics
from ldm_lib.inpainter import Inpainter
from ldm_lib.inpainting import inpaint
from ldm_lib.latents import CellSettings, collate, encode_case, input_channels
from ldm_lib.metrics import brats_scores
from ldm_lib.presets import resolve
from ldm_lib.reconstruction import ceiling, code
from ldm_lib.tracking import WholeCheckpoints
from ldm_lib.training import DiffusionTraining, loss_by_noise_level, new_inpainter, noisy_composite, save_trained, train
from ldm_lib.volumes import normalise, read_volume
from ldm_lib.weights import load_model, read_checkpoint, save_model

CPU = torch.device("cpu")


def settings(**changes):
    small = {"base_width": 8, "multipliers": "1,2", "attention_rates": "2", "precision": "32", "device": "cpu",
             "max_epochs": 4, "val_every": 2, "num_inference_steps": 2, "save_samples_every": 0, "warmup_steps": 2,
             "latent_crop": 5, "ema_decay": 0.9, "batch_size": 2, "learning_rate": 1e-3}  # fmt: skip
    return resolve("smoke", small | changes)["04_training"]


class Study:
    """What a training needs: three encoded cases to train on and one to watch."""

    def __init__(self, cases, folder, context="composite"):
        self.folder, self.cells = folder, CellSettings(context=context)
        self.autoencoder = load_model(folder, "autoencoder")
        self.variants = [[self.encode(case)] for case in cases[:3]]
        self.watched = [load_case(cases[4])]
        self.watched_latents = [self.encode(cases[4])]

    def encode(self, case):
        on_grid = model_case(load_case(case), self.autoencoder.factor)
        return encode_case(on_grid, self.autoencoder, self.cells, device=CPU, precision="32")

    def inpainter(self, config):
        return new_inpainter(self.folder, config, self.cells)

    def module(self, config):
        return DiffusionTraining(self.inpainter(config), config, self.watched, self.watched_latents, Path("unused"))

    def train(self, folder, config):
        return train(self.inpainter(config), self.variants, self.watched, self.watched_latents, config, folder)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory, cases):
    """An untrained autoencoder of four voxels per cell: latents of 8 8 5 cells."""
    torch.manual_seed(1)
    build = {"channels": (4, 4, 4), "latent_channels": 3, "blocks": 1, "spacing_mm": 8.0, "linear_start": False}
    autoencoder = Autoencoder.of(**build).freeze()
    autoencoder.standardise(*latent_statistics(autoencoder, cases[:4], device=CPU, precision="32"))
    folder = tmp_path_factory.mktemp("coarse")
    save_model(folder, autoencoder)
    return folder


@pytest.fixture(scope="module")
def study(cases, coarse):
    return Study(cases, coarse)


@pytest.fixture(scope="module")
def concat(cases, coarse):
    return Study(cases, coarse, "concat")


def place(tmp_path, name="run"):
    """The folder of stage 04 of a run."""
    folder = tmp_path / name / "04_training"
    folder.mkdir(parents=True)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupt(monkeypatch, epoch, batch=1):
    """Stop the training in the middle of an epoch, as a killed process would."""
    step = DiffusionTraining.training_step

    def interrupted(self, data, batch_idx):
        if self.current_epoch == epoch and batch_idx == batch:
            raise SystemExit(9)
        return step(self, data, batch_idx)

    monkeypatch.setattr(DiffusionTraining, "training_step", interrupted)


# ---- law 6: a resumed training equals the uninterrupted one


@pytest.mark.parametrize("changes", [
    {},
    {"accumulate_grad_batches": 2, "latent_flip_probability": 0.5, "latent_noise": 0.1},
    {"dropout": 0.3, "val_every": 1},
    {"overfit_batches": 1},
], ids=["plain", "accumulate", "dropout", "debug"])  # fmt: skip
def test_a_resumed_training_equals_the_uninterrupted_one(study, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(batches, "DEBUG_PAIRS", 4)
    config, whole, broken = settings(**changes), place(tmp_path, "whole"), place(tmp_path, "broken")
    torch.manual_seed(1)
    straight = study.train(whole, config)
    with monkeypatch.context() as patch:
        interrupt(patch, epoch=2)
        with pytest.raises(SystemExit, match="9"):
            study.train(broken, config)
    assert {row["epoch"] for row in rows(broken)} == {"0", "1"}
    torch.manual_seed(2)
    resumed = study.train(broken, config)
    assert same(straight.state_dict(), resumed.state_dict())  # both networks, raw and averaged
    assert straight.trainer.global_step == resumed.trainer.global_step > 0
    assert rows(broken) == rows(whole)
    ends = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, broken)]
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    assert all(same({k: torch.as_tensor(v) for k, v in moments[0][i].items()}, moments[1][i]) for i in moments[0])


@pytest.mark.slow
def test_loader_processes_change_nothing_and_can_be_resumed(study, tmp_path, monkeypatch):
    straight = study.train(place(tmp_path, "whole"), settings())
    broken, config = place(tmp_path, "broken"), settings(num_workers=2)
    with monkeypatch.context() as patch:
        interrupt(patch, epoch=2)
        with pytest.raises(SystemExit, match="9"):
            study.train(broken, config)
    assert same(straight.state_dict(), study.train(broken, config).state_dict())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_from_the_cache_is_training_from_memory(study, cases, tmp_path, workers):
    cache = LatentCache(tmp_path / "latents", study.autoencoder, "w", study.cells, device=CPU, precision="32")
    cached = cache.fill(cases[:3], variants=2)
    trained = [
        train(study.inpainter(config), variants, study.watched, study.watched_latents, config, place(tmp_path, name))
        for name, variants, config in (
            ("disk", cached, settings(num_workers=workers)),
            ("memory", [list(case) for case in cached], settings()),
        )
    ]
    assert same(*(module.state_dict() for module in trained))
    assert rows(tmp_path / "disk" / "04_training") == rows(tmp_path / "memory" / "04_training")


def test_a_finished_training_is_not_continued(study, tmp_path):
    folder, config = place(tmp_path), settings(max_epochs=2)
    first = study.train(folder, config)
    before = rows(folder)
    again = study.train(folder, config)
    assert same(first.state_dict(), again.state_dict()) and rows(folder) == before
    assert again.trainer.current_epoch == 2 and again.trainer.global_step == first.trainer.global_step


def test_the_table_has_one_row_per_epoch(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(batch_size=1))
    found = rows(folder)
    assert [int(row["epoch"]) for row in found] == [0, 1, 2, 3] and [int(row["step"]) for row in found] == [2, 5, 8, 11]
    assert all(float(row["train_loss"]) > 0 and row["learning_rate"] for row in found)
    validated = ["val_loss", "val_noise_loss", "val_psnr", "val_ssim"]
    assert [all(row[name] for name in validated) for row in found] == [False, True, False, True]
    assert not any(row[name] for row in found[::2] for name in validated)


@pytest.mark.parametrize("content", ["damaged", "other"])
def test_a_checkpoint_that_does_not_fit_is_refused(study, tmp_path, content):
    folder = place(tmp_path)
    (folder / "checkpoints").mkdir()
    if content == "damaged":
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(WeightsError, match=r"last\.ckpt: (damaged|unsafe checkpoint), "):
            study.train(folder, settings())
    else:
        study.train(folder, settings(max_epochs=1))
        with pytest.raises(TrainingError, match=r"last\.ckpt: is of another network"):
            study.train(folder, settings(base_width=12))


# ---- steps


def test_accumulated_batches_are_one_large_batch(study, tmp_path):
    """Two batches of one, or one batch of two: the same samples, the same weight each."""
    changes = {"max_epochs": 2, "val_every": 2, "latent_crop": 0}
    large = study.train(place(tmp_path, "large"), settings(batch_size=2, **changes))
    small = study.train(place(tmp_path, "small"), settings(batch_size=1, accumulate_grad_batches=2, **changes))
    assert large.trainer.global_step == small.trainer.global_step == 4
    untrained = study.module(settings()).denoiser.state_dict()
    for name, value in large.denoiser.state_dict().items():
        moved = (value - untrained[name]).abs().max()
        assert (value - small.denoiser.state_dict()[name]).abs().max() <= 0.02 * moved + 1e-6, name


def test_the_averaged_weights_follow_their_recursion(study, tmp_path):
    seen = []

    class Spy(DiffusionTraining):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            seen.append(torch.cat([p.detach().flatten() for p in self.denoiser.parameters()]))

    config = settings(batch_size=1, ema_decay=0.5)
    module = study.module(config)
    module.__class__ = Spy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "DiffusionTraining", lambda *args: module)
        study.train(place(tmp_path), config)
    average = seen[0].double()
    for n, weights in enumerate(seen[1:], 1):
        rate = min(0.5, (1 + n) / (10 + n))
        average = rate * average + (1 - rate) * weights.double()
    found = torch.cat([p.detach().flatten() for p in module.ema.module.parameters()])
    assert len(seen) == 12 and int(module.ema.n_averaged) == 12
    assert torch.allclose(found.double(), average, atol=1e-6) and not torch.allclose(found, seen[-1], atol=1e-5)


def test_averaged_weights_are_used_without_dropout(study, tmp_path):
    module = study.train(place(tmp_path), settings(max_epochs=1, dropout=0.5))
    draws = [module.inpainter.fill(study.watched[0], steps=2).mean for _ in range(2)]
    assert np.array_equal(*draws)
    assert not any(part.training for part in module.modules())


def test_a_loss_that_is_not_finite_names_its_epoch(study, tmp_path, monkeypatch):
    loss = DiffusionTraining.training_loss

    def spoiled(self, batch):
        return loss(self, batch) * (float("nan") if self.current_epoch == 1 else 1)

    monkeypatch.setattr(DiffusionTraining, "training_loss", spoiled)
    folder = place(tmp_path)
    with pytest.raises(TrainingError, match="loss is nan in epoch 1, batch 0"):
        study.train(folder, settings())
    assert [row["epoch"] for row in rows(folder)] == ["0"]  # what was found before is kept


def test_several_devices_are_refused(study, tmp_path):
    config = settings().model_copy(update={"devices": 2})
    with pytest.raises(ConfigError, match="devices = 2"):
        study.train(place(tmp_path), config)


@pytest.mark.parametrize("which", ["study", "concat"])
def test_known_cells_are_clean_in_every_training_step(which, request, tmp_path):
    study, seen = request.getfixturevalue(which), []
    config = settings(max_epochs=1, latent_crop=0, batch_size=1, patience=5)
    inpainter = study.inpainter(config)
    inpainter.denoiser.register_forward_pre_hook(lambda net, given: seen.append((given[0].clone(), given[1])))
    train(inpainter, study.variants, study.watched, study.watched_latents, config, place(tmp_path))
    seen = seen[:3]  # the averaged network has the hook too, in the validation that follows
    assert len({int(t) for _, t in seen}) == 3
    for (x, t), where in zip(seen, EpochOrder(3, config), strict=True):
        sample = TrainingSamples(study.variants, config, 1000)[where]
        known = (sample["hole"] == 0).expand_as(sample["voided"])
        assert x.shape[1] == input_channels(3, study.cells) == (8 if which == "study" else 12)
        assert int(t) == int(sample["t"])
        assert torch.equal(x[0, :3][known], sample["voided"][known])
        alpha_bar = inpainter.schedule.alpha_bar[sample["t"]]
        noisy = alpha_bar.sqrt() * sample["target"] + (1 - alpha_bar).sqrt() * sample["noise"]
        assert torch.allclose(x[0, :3][~known], noisy.float()[~known], atol=1e-5)
        assert torch.equal(x[0, 3:7], sample["conditioning"]) and torch.equal(x[0, 7:8], sample["hole"])
        if which == "concat":
            assert torch.equal(x[0, 8:11], sample["voided"]) and torch.equal(x[0, 11:], sample["share"])


def test_concat_is_trained_saved_and_sampled(concat, cases, tmp_path):
    config, folder = settings(max_epochs=1, val_every=1), place(tmp_path)
    module = concat.train(folder, config)
    extra = module.denoiser.stem.weight[:, 8:] - concat.module(config).denoiser.stem.weight[:, 8:]
    assert extra.abs().max() > 0  # what concat adds is learnt from
    save(module, concat, folder)
    loaded = Inpainter.load(folder / "model", device="cpu", precision="32")
    assert loaded.settings.context == "concat"
    ours = module.inpainter.fill(concat.watched[0], steps=2)
    assert np.array_equal(ours.mean, loaded.fill(concat.watched[0], steps=2).mean)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_the_loss_is_that_of_what_is_predicted(study, prediction):
    """Closed form: an untrained denoiser is silent, so its loss is the mean square of what it should have said."""
    module = study.module(settings(prediction=prediction))
    (sample,) = study.variants[0]
    t, noise = torch.tensor(600), torch.randn(sample["target"].shape)
    batch = collate([sample | {"t": t, "noise": noise}])
    alpha_bar = module.inpainter.schedule.alpha_bar[600]
    wanted = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * sample["target"] if prediction == "velocity" else noise
    cells = sample["loss"].expand_as(noise) > 0
    assert module.training_loss(batch).item() == pytest.approx(wanted[cells].square().mean().item(), rel=1e-5)
    noisy = module.inpainter.schedule.add_noise(batch["target"], batch["noise"], batch["t"])[0]
    heard = (1 - alpha_bar).sqrt() * noisy if prediction == "velocity" else 0 * noisy  # as noise
    found = module.noise_loss(module.denoiser, batch).item()
    assert found == pytest.approx((heard - noise)[cells].square().mean().item(), rel=1e-5)


# ---- validation, early stopping, checkpoints and samples


def test_validation_scores_the_averaged_weights_in_image_space(study, tmp_path):
    folder, config = place(tmp_path), settings(max_epochs=2, seed=3)
    module = study.train(folder, config)
    data, found = study.watched[0], rows(folder)[-1]
    filled = module.inpainter.fill(data, seed=3, steps=config.num_inference_steps).mean
    error = normalise(filled, data.scale) - normalise(data.target, data.scale)
    scores = brats_scores(filled, data.target, data.voided, data.healthy)
    assert float(found["val_loss"]) == pytest.approx(float(np.mean(error**2)), rel=1e-4)
    assert float(found["val_psnr"]) == pytest.approx(scores["psnr_01"], abs=1e-3)
    assert float(found["val_ssim"]) == pytest.approx(scores["ssim"], abs=1e-4)
    levels = loss_by_noise_level(module, study.watched_latents, seed=0, levels=3)
    assert [row["t"] for row in levels] == [0, 500, 999] and all(row["ema"] != row["raw"] for row in levels)


class Unlucky(DiffusionTraining):
    """Its validation never improves after the first."""

    def _score(self, data, latents):
        self.validations = getattr(self, "validations", 0) + 1
        return {"val_loss": 1.0 + self.validations, "val_psnr": 0.0, "val_ssim": 0.0}


@pytest.mark.parametrize(("patience", "val_every", "epochs"), [(4, 2, 6), (3, 2, 6), (2, 1, 3), (1, 3, 6)])
def test_early_stopping_counts_validations(study, tmp_path, monkeypatch, patience, val_every, epochs):
    monkeypatch.setattr(training, "DiffusionTraining", Unlucky)
    config = settings(max_epochs=20, patience=patience, val_every=val_every)
    assert study.train(place(tmp_path), config).trainer.current_epoch == epochs


def test_what_stopped_early_stays_stopped(study, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DiffusionTraining", Unlucky)
    folder, config = place(tmp_path), settings(max_epochs=20, patience=2, val_every=1)
    first = study.train(folder, config)
    again = study.train(folder, config)
    assert again.trainer.current_epoch == first.trainer.current_epoch == 3
    assert same(first.state_dict(), again.state_dict()) and len(rows(folder)) == 3


def test_debug_mode_never_stops_early(study, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DiffusionTraining", Unlucky)
    config = settings(max_epochs=3, patience=1, val_every=1, overfit_batches=1, batch_size=1)
    module = study.train(place(tmp_path), config)
    assert module.trainer.current_epoch == 3 and module.trainer.global_step == 3 * 16


def test_checkpoints_are_named_plain_and_whole(study, tmp_path):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=3, val_every=1))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 3 and names[-1] == "last.ckpt"  # the two best and the last
    losses = {int(row["epoch"]): float(row["val_loss"]) for row in rows(folder)}
    for epoch in sorted(losses, key=losses.get)[:2]:
        assert f"brain_mri_inpainting-epoch={epoch}-val_loss={losses[epoch]:.6f}.ckpt" in names
    for name in names:
        content = torch.load(folder / "checkpoints" / name, weights_only=True)
        assert not [key for key in content["state_dict"] if "autoencoder" in key]
        assert content["hyper_parameters"]["base_width"] == 8
    assert not [name for name in content["state_dict"] if name.startswith("_inpainter")]


def test_a_checkpoint_that_fails_to_write_leaves_the_old_one(tmp_path):
    path, checkpoints = tmp_path / "folder" / "last.ckpt", WholeCheckpoints()
    checkpoints.save_checkpoint({"state_dict": {"w": torch.ones(1)}}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save_checkpoint({"state_dict": {"w": torch.zeros(1), "f": lambda: 0}}, path)
    assert read_checkpoint(path)["state_dict"]["w"] == 1 and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_samples_are_written_as_volumes(study, tmp_path, cases):
    folder = place(tmp_path)
    module = study.train(folder, settings(max_epochs=4, val_every=1, save_samples_every=2))
    data = study.watched[0]
    found = sorted(path.relative_to(folder).as_posix() for path in (folder / "samples").rglob("*.nii.gz"))
    assert found == [f"samples/epoch_{e:03d}/{cases[4].id}_0000_{what}.nii.gz"
                     for e in (2, 4) for what in ("inpainted", "target")]  # fmt: skip
    last, source = read_volume(folder / found[2]), data.source
    filled = module.inpainter.fill(data, steps=2).mean
    assert last.preamble == source.preamble and np.array_equal(last.raw[~data.mask], source.raw[~data.mask])
    assert np.array_equal(last.raw[data.mask], np.clip(np.rint(filled[data.mask]), -32768, 32767))
    assert np.array_equal(read_volume(folder / found[3]).raw, data.target)


@pytest.mark.parametrize(("every", "val_every", "epochs"), [(0, 3, []), (3, 2, [4, 6])])
def test_samples_are_written_at_the_first_validation_that_is_due(study, tmp_path, every, val_every, epochs):
    folder = place(tmp_path)
    study.train(folder, settings(max_epochs=6, val_every=val_every, save_samples_every=every))
    assert sorted(p.name for p in folder.glob("samples/*")) == [f"epoch_{e:03d}" for e in epochs]


def save(module, study, folder):
    return save_trained(module, study.folder, folder / "model", schedule={"steps": 1000},
                        settings=study.cells.__dict__)  # fmt: skip


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_weights_that_are_kept(study, tmp_path, monkeypatch, keep):
    """Every validation is worse than the one before, so the best weights are the first epoch's."""
    monkeypatch.setattr(training, "DiffusionTraining", Unlucky)
    folder = place(tmp_path)
    module = study.train(folder, settings(max_epochs=3, val_every=1, keep_weights=keep))
    save(module, study, folder)
    name = "last.ckpt" if keep == "last" else "brain_mri_inpainting-epoch=0-val_loss=2.000000.ckpt"
    state = read_checkpoint(folder / "checkpoints" / name)["state_dict"]
    kept = load_model(folder / "model", "adm").state_dict()
    assert all(torch.equal(kept[name], state[f"ema.module.{name}"]) for name in kept)


def test_what_was_trained_fills_files(study, cases, tmp_path):
    folder = place(tmp_path)
    module = study.train(folder, settings(max_epochs=1))
    digest = save(module, study, folder)
    loaded = Inpainter.load(folder / "model", device="cpu", precision="32")
    assert loaded.denoiser.folder_config["sha256"] == digest
    assert loaded.denoiser.folder_config["optimiser_steps"] == module.trainer.global_step
    ours = module.inpainter.fill(study.watched[0], steps=2)
    assert np.array_equal(ours.mean, loaded.fill(study.watched[0], steps=2).mean)
    inpaint(cases[4].t1n_voided, cases[4].mask, tmp_path / "o.nii.gz", model=folder / "model", steps=2, device="cpu")
    assert read_volume(tmp_path / "o.nii.gz").shape == study.watched[0].source.shape


def test_the_first_weights_are_a_function_of_the_seed(study):
    one, same_seed, other = (study.inpainter(settings(seed=seed)).denoiser.state_dict() for seed in (0, 0, 1))
    assert same(one, same_seed) and not same(one, other)


def test_the_composite_that_is_shown_is_the_one_that_is_trained_on(study):
    batch = collate([study.variants[0][0]])
    inpainter = study.inpainter(settings())
    clean, noisy = (noisy_composite(batch, inpainter, t=t, seed=0) for t in (0, 999))
    hole = batch["hole"].expand_as(clean) > 0
    assert torch.equal(clean[~hole], batch["voided"][~hole]) and torch.equal(noisy[~hole], batch["voided"][~hole])
    assert torch.allclose(clean[hole], batch["target"][hole], atol=0.1) and abs(noisy[hole].std() - 1) < 0.1


# ---- the overfitting test


@pytest.mark.slow
def test_one_case_can_be_learnt_by_heart(cases, tmp_path):
    """Sixteen fixed pairs of one case: the loss falls below a tenth, and its hole comes back from fresh noise."""
    torch.manual_seed(0)
    changes = {"overfit_batches": 1, "batch_size": 4, "max_epochs": 80, "learning_rate": 2e-3, "val_every": 80,
               "autoencoder_steps": 100, "device": "cpu", "precision": "32"}  # fmt: skip
    stages = resolve("smoke", changes)
    build, config = stages["02_autoencoder_check"], stages["04_training"]
    autoencoder, how = build_autoencoder(build, spacing_mm=8.0), {"device": CPU, "precision": "32"}
    train_autoencoder(autoencoder, cases[2:], build, folder=tmp_path / "checkpoints", **how)  # of other patients
    save_model(tmp_path / "autoencoder", autoencoder)
    study, data = Study(cases, tmp_path / "autoencoder"), load_case(cases[0])
    study.variants, study.watched, study.watched_latents = study.variants[:1], [data], study.variants[0]
    folder = place(tmp_path)
    module = study.train(folder, config)
    losses = [float(row["train_loss"]) for row in rows(folder)]
    assert np.mean(losses[-3:]) < 0.1 * losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}"
    filled = module.inpainter.fill(data, samples=8, steps=config.num_inference_steps).mean
    ours = brats_scores(filled, data.target, data.voided, data.healthy)["psnr_01"]
    rebuilt = code(autoencoder, model_case(data, autoencoder.factor).target, **how).rebuilt
    _, best = ceiling(data, rebuilt, autoencoder.factor)
    assert ours > best["psnr_01"] - 3, f"{ours:.2f} dB, ceiling {best['psnr_01']:.2f} dB"
