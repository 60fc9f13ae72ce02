"""Train the denoiser on cached latents; the only module that knows Lightning's trainer.

    z_t = add_noise(z_target, noise, t);  loss = mean over samples of mean over a sample's generated cells of
    (ADM(composite, conditioning, mask, t) - noise)^2        (Ho et al. 2020, eq. 14, on the hole alone)

What a sample is made of is a function of (seed, epoch, position in the epoch), see `batches`; so a resumed training is
the uninterrupted one.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from ldm_lib.adm import ADM
from ldm_lib.autoencoding import moving_average
from ldm_lib.batches import EpochOrder, TrainingSamples, masked_loss
from ldm_lib.cases import CaseData
from ldm_lib.config import TrainingConfig, integers
from ldm_lib.devices import pick_device, pick_precision
from ldm_lib.errors import ConfigError, TrainingError
from ldm_lib.inpainter import AUTOENCODER_FOLDER, DEFAULT_SAMPLER, Inpainter, box_margin, sample_name
from ldm_lib.latents import (
    CellSettings,
    Latents,
    collate,
    conditioning_channels,
    denoiser_input,
    input_channels,
    keep_known,
)
from ldm_lib.metrics import brats_scores
from ldm_lib.schedule import linear_schedule
from ldm_lib.tracking import EpochLog, Patience, WholeCheckpoints, trackers
from ldm_lib.volumes import normalise, write_like, write_map
from ldm_lib.weights import load_model, read_checkpoint, save_model


class DiffusionTraining(L.LightningModule):
    """The denoiser, its averaged weights, and the validation that samples in image space.

    Args:
        inpainter: holds the frozen autoencoder, the denoiser to train, schedule and settings.
        validation: loaded cases with a target.
        validation_latents: their encodings, in the same order.
        samples_folder: where sample volumes go.
    """

    def __init__(
        self,
        inpainter: Inpainter,
        config: TrainingConfig,
        validation: Sequence[CaseData],
        validation_latents: Sequence[Latents],
        samples_folder: Path,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(config.model_dump())
        self.denoiser = inpainter.denoiser
        self.ema = AveragedModel(self.denoiser, multi_avg_fn=moving_average(config.ema_decay))
        self.config, self.samples_folder = config, samples_folder
        self._validation, self._latents = list(validation), list(validation_latents)
        self._inpainter = [inpainter]  # in a list: its autoencoder is not part of this module's weights

    @property
    def inpainter(self) -> Inpainter:
        """The frozen parts with the averaged denoiser."""
        return replace(self._inpainter[0], denoiser=self.ema.module)

    def training_loss(self, batch: Latents) -> Tensor:
        """The masked error of what the denoiser predicts: noise, or velocity (Salimans & Ho 2022)."""
        given = self._inpainter[0]
        _, output = self._denoised(self.denoiser, batch)
        wanted = batch["noise"]
        if given.prediction == "velocity":
            wanted = given.schedule.velocity(batch["target"], batch["noise"], batch["t"])
        return masked_loss(output, wanted, batch["loss"])

    def noise_loss(self, denoiser: torch.nn.Module, batch: Latents) -> Tensor:
        """The masked error of the noise, whatever the denoiser predicts."""
        noisy, output = self._denoised(denoiser, batch)
        return masked_loss(self._inpainter[0].as_noise(output, noisy, batch["t"]), batch["noise"], batch["loss"])

    def _denoised(self, denoiser: torch.nn.Module, batch: Latents) -> tuple[Tensor, Tensor]:
        given = self._inpainter[0]
        noisy = given.schedule.add_noise(batch["target"], batch["noise"], batch["t"])
        return noisy, denoiser(denoiser_input(noisy, batch, given.settings), batch["t"], batch.get("told")).float()

    def training_step(self, batch: Latents, batch_idx: int) -> Tensor:
        if self.config.dropout:  # drawn from torch's own stream, which no checkpoint keeps
            place = np.random.SeedSequence([self.config.seed, self.current_epoch, batch_idx])
            torch.manual_seed(int(place.generate_state(1)[0]))
        loss = self.training_loss(batch)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"loss is {loss.item()} in epoch {self.current_epoch}, batch {batch_idx}",
                                where="training", fix="lower learning_rate, or use precision 32")  # fmt: skip
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch["t"]))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.denoiser)

    def on_train_epoch_end(self) -> None:
        self.log("learning_rate", self.lr_schedulers().get_last_lr()[0])

    def validation_step(self, batch: Tensor, _: int) -> None:
        for k in batch.tolist():
            data, latents = self._validation[k], self._latents[k]
            figures = self._score(data, latents) | {"val_noise_loss": self._fixed_noise_loss(latents)}
            self.log_dict(figures, on_epoch=True, batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        optimiser = torch.optim.AdamW(self.denoiser.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
        warmup = self.config.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _score(self, data: CaseData, latents: Latents) -> dict[str, float]:
        name, steps = sample_name(data.case, 0), self.config.num_inference_steps
        drawn = self.inpainter.sample([latents], [name], seed=self.config.seed, sampler=DEFAULT_SAMPLER, steps=steps)
        filled = self.inpainter.decode(drawn[0], data)
        error = normalise(filled, data.scale) - normalise(data.target, data.scale)
        scores = brats_scores(filled, data.target, data.voided, data.scored, where=data.case.key)
        self._save_sample(data, filled)
        return {"val_loss": float(np.mean(error**2)), "val_psnr": scores["psnr_01"], "val_ssim": scores["ssim"]}

    def _fixed_noise_loss(self, latents: Latents) -> Tensor:
        t = torch.tensor([int(share * (self.inpainter.schedule.steps - 1)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)])
        noise = torch.randn(latents["target"].shape, generator=torch.Generator().manual_seed(0))
        samples = collate([latents | {"t": t_k, "noise": noise} for t_k in t])
        batch = {key: value.to(self.device) for key, value in samples.items()}
        return self.noise_loss(self.ema.module, batch)

    def _save_sample(self, data: CaseData, filled: np.ndarray) -> None:
        every, epoch = self.config.save_samples_every, self.current_epoch + 1
        if self.trainer.sanity_checking or not every or epoch % every >= self.config.val_every:
            return
        folder = self.samples_folder / f"epoch_{epoch:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{data.case.id}_{data.case.index or 'mask'}"
        write_like(folder / f"{stem}_inpainted.nii.gz", data.source, filled, data.mask)
        write_map(folder / f"{stem}_target.nii.gz", data.target, data.source.affine)


def noisy_composite(batch: Latents, inpainter: Inpainter, *, t: int, seed: int) -> Tensor:
    """Known cells clean, the others at noise level t: the first channels of what the denoiser sees (b c x y z)."""
    noise = torch.randn(batch["target"].shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(noise),), t)
    return keep_known(inpainter.schedule.add_noise(batch["target"], noise, times), batch)


def loss_by_noise_level(
    module: DiffusionTraining, latents: Sequence[Latents], *, seed: int, levels: int = 10
) -> list[dict[str, float]]:
    """The noise loss of the averaged and of the raw weights at evenly spaced t: rows of {"t", "ema", "raw"}."""
    rows = []
    for t in torch.linspace(0, module.inpainter.schedule.steps - 1, levels).round().long():
        noise = [torch.randn(x["target"].shape, generator=torch.Generator().manual_seed(seed)) for x in latents]
        batch = collate([x | {"t": t, "noise": n} for x, n in zip(latents, noise, strict=True)])
        batch = {name: value.to(module.inpainter.device) for name, value in batch.items()}
        with torch.inference_mode():
            losses = {
                name: float(module.noise_loss(net, batch))
                for name, net in (("ema", module.ema.module), ("raw", module.denoiser))
            }
        rows.append({"t": int(t), **losses})
    return rows


def build_denoiser(config: TrainingConfig, *, in_channels: int, out_channels: int) -> ADM:
    """The ADM that a training's parameters describe, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ADM(
            in_channels=in_channels,
            out_channels=out_channels,
            base_width=config.base_width,
            multipliers=integers(config.multipliers),
            blocks_per_level=config.blocks_per_level,
            attention_rates=integers(config.attention_rates),
            dropout=config.dropout,
            conditioning=conditioning_channels(out_channels) if config.conditioning_dropout else (),
        )


def new_inpainter(autoencoder_folder: Path, config: TrainingConfig, settings: CellSettings) -> Inpainter:
    """The frozen autoencoder of a folder beside an untrained denoiser."""
    device = pick_device(config.device)
    autoencoder = load_model(autoencoder_folder, "autoencoder")
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, settings), out_channels=channels)
    schedule = linear_schedule(config.diffusion_steps, config.beta_start, config.beta_end)
    how = device, pick_precision(config.precision, device), config.prediction, box_margin(autoencoder)
    return Inpainter(autoencoder.to(device), denoiser.to(device), schedule, settings, *how)


def train(
    inpainter: Inpainter,
    variants: Sequence[Sequence[Latents]],
    validation: Sequence[CaseData],
    validation_latents: Sequence[Latents],
    config: TrainingConfig,
    folder: Path,
) -> DiffusionTraining:
    """Train, or resume from checkpoints/last.ckpt, and return the module in evaluation mode.

    Args:
        variants: per training case, its encodings, in memory or read when asked for (`cache.CachedCase`).
        folder: of the stage; takes checkpoints/, samples/, metrics.csv and the trackers' files.

    Raises:
        ConfigError: more than one device.
        TrainingError: a loss that is not finite, or a checkpoint that does not fit.
    """
    if config.devices > 1:
        raise ConfigError(f"devices = {config.devices}: training uses one device", fix="set devices to 1")
    if config.overfit_batches:
        variants = [[encodings[0]] for encodings in variants[: config.overfit_batches * config.batch_size]]
    module = DiffusionTraining(inpainter, config, validation, validation_latents, folder / "samples")
    samples = TrainingSamples(variants, config, inpainter.schedule.steps)
    order, last = EpochOrder(len(variants), config), folder / "checkpoints" / "last.ckpt"
    if last.exists():
        order.set_epoch(_epochs_of(last, module))  # loader processes start before Lightning says which epoch it is
    loader = DataLoader(samples, config.batch_size, sampler=order, collate_fn=collate, num_workers=config.num_workers)
    watched, checkpoint = DataLoader(torch.arange(len(validation)), 1), last if last.exists() else None
    trainer = _trainer(config, inpainter, folder)
    trainer.fit(module, loader, watched, ckpt_path=checkpoint, weights_only=True)
    return module.eval()


def save_trained(
    module: DiffusionTraining,
    autoencoder_folder: Path,
    folder: Path,
    *,
    schedule: dict[str, Any],
    settings: dict[str, Any],
) -> str:
    """Write the averaged denoiser and the autoencoder it belongs to as one model folder; return its sha256."""
    if module.config.keep_weights == "best" and (best := module.trainer.checkpoint_callbacks[0].best_model_path):
        module.load_state_dict(read_checkpoint(best)["state_dict"])
    shutil.copytree(autoencoder_folder, folder / AUTOENCODER_FOLDER, dirs_exist_ok=True)
    autoencoder = module.inpainter.autoencoder.folder_config["sha256"]
    steps = module.trainer.global_step
    return save_model(folder, module.ema.module, schedule=schedule, settings=settings,
                      prediction=module.config.prediction, autoencoder_sha256=autoencoder,
                      optimiser_steps=steps)  # fmt: skip


def _epochs_of(path: Path, module: DiffusionTraining) -> int:
    """The epochs that a checkpoint has behind it; refused if it is damaged or another network's."""
    checkpoint = read_checkpoint(path)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise TrainingError("is of another network", where=path, fix="set overwrite to train anew") from error
    return checkpoint["epoch"] + 1


def _trainer(config: TrainingConfig, inpainter: Inpainter, folder: Path) -> L.Trainer:
    checkpoints = folder / "checkpoints"
    best = ModelCheckpoint(checkpoints, "brain_mri_inpainting-{epoch}-{val_loss:.6f}", monitor="val_loss",
                           save_top_k=2, save_on_train_epoch_end=False)  # fmt: skip
    last = ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    stop = Patience("val_loss", patience=max(1, math.ceil(config.patience / config.val_every)),
                    check_on_train_epoch_end=False)  # fmt: skip
    return L.Trainer(
        default_root_dir=folder,
        accelerator="gpu" if inpainter.device.type == "cuda" else "cpu",
        devices=1,
        precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[inpainter.precision],
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.gradient_clip,
        check_val_every_n_epoch=min(config.val_every, config.max_epochs),
        num_sanity_val_steps=0,
        logger=trackers(config, folder),
        plugins=[WholeCheckpoints()],
        callbacks=[best, last, EpochLog()] + ([] if config.overfit_batches else [stop]),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
