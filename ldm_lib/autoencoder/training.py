"""Train the autoencoder on crops, and learn its latents' statistics.

    crop (1 x y z) => posterior sample => reconstruction
    loss = L1 + kl_weight * KL + adversarial_weight * (D(reconstruction) - 1)^2

Half of the inputs are voided images, because at inference it encodes both; the target is then the voided image. What
a step sees is a function of (seed, step), so that a resumed training is the uninterrupted one.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from ldm_lib.autoencoder.crop_sampler import CropLoader
from ldm_lib.autoencoder.fitting import fit_linear_parts, latent_statistics
from ldm_lib.autoencoder.losses import discriminator_loss, generator_loss, patch_discriminator
from ldm_lib.autoencoder.model import Autoencoder, kl_divergence
from ldm_lib.autoencoder.options import AutoencoderTrainingOptions
from ldm_lib.data.case import Case
from ldm_lib.devices import autocast
from ldm_lib.errors import TrainingError
from ldm_lib.files import replacing
from ldm_lib.model_io import read_checkpoint
from ldm_lib.options import integers

log = logging.getLogger("ldm_lib")

CHECKPOINT = "last.ckpt"
CHECKPOINT_EVERY_S = 120.0


class AutoencoderTraining:
    """An autoencoder, its averaged weights and its judges, one optimiser step at a time.

    Optimised by AdamW through one learning-rate cycle; the discriminator joins after a warm-up, by Adam as LSGAN does.
    """

    def __init__(
        self, autoencoder: Autoencoder, config: AutoencoderTrainingOptions, *, device: torch.device, precision: str
    ) -> None:
        self.config, self.device, self.precision = config, device, precision
        self.autoencoder = autoencoder.to(device).train()
        self.ema = AveragedModel(autoencoder, multi_avg_fn=moving_average(config.autoencoder_ema_decay))
        peak, steps = config.autoencoder_learning_rate, config.autoencoder_steps
        self.optimiser = torch.optim.AdamW([p for p in autoencoder.parameters() if p.requires_grad], lr=peak)
        rise = min(0.3, 100 / steps)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, peak, total_steps=steps, pct_start=rise)
        self.judge = self.judge_optimiser = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.judge = patch_discriminator().to(device, memory_format=torch.channels_last_3d)
            self.judge_optimiser = torch.optim.Adam(self.judge.parameters(), lr=peak, betas=(0.5, 0.999))

    def step(self, step: int, volume: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Learn from one batch; the figures of its loss.

        Raises:
            TrainingError: a loss that is not finite; names the step and the cases.
        """
        config, volume = self.config, volume.to(self.device, memory_format=torch.channels_last_3d)
        judged = self.judge is not None and step >= config.adversarial_start * config.autoencoder_steps
        with autocast(self.device, self.precision):
            mean, std = self.autoencoder.moments(volume)
            rebuilt = self.autoencoder.decode_raw(mean + std * self._noise(mean, step)).float()
            terms = {
                "l1": F.l1_loss(self._inside(rebuilt), self._inside(volume)),
                "kl": kl_divergence(mean.float(), std.float()),
            }
            loss = terms["l1"] + config.kl_weight * terms["kl"]
            if judged:
                terms["adversarial"] = generator_loss(self.judge, rebuilt)
                loss = loss + config.adversarial_weight * terms["adversarial"]
        if not math.isfinite(loss.item()):
            raise TrainingError(f"loss is {loss.item()} at step {step}, on crops of {', '.join(sorted(set(names)))}",
                                where="autoencoder", fix="lower its learning rate, or look at these cases")  # fmt: skip
        _descend(self.optimiser, loss, self.autoencoder)
        self.schedule.step()
        self.ema.update_parameters(self.autoencoder)
        if judged:
            with autocast(self.device, self.precision):
                terms["discriminator"] = discriminator_loss(self.judge, rebuilt.detach(), volume)
            _descend(self.judge_optimiser, terms["discriminator"], self.judge)
        return {name: value.item() for name, value in terms.items()}

    def _inside(self, crop: Tensor) -> Tensor:
        """A crop without its outer cells: what is rebuilt there lacks neighbours that it has in a volume."""
        cell = slice(self.autoencoder.factor, -self.autoencoder.factor)
        return crop[..., cell, cell, cell]

    def _noise(self, mean: Tensor, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(
            int(np.random.default_rng([self.config.seed, step, 1 << 20]).integers(2**62))
        )
        return torch.randn(mean.shape, generator=draw).to(self.device)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "autoencoder": self.autoencoder,
            "ema": self.ema,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
        }
        return parts | ({"judge": self.judge, "judge_optimiser": self.judge_optimiser} if self.judge else {})

    def save(self, path: Path, history: Sequence[dict[str, float]]) -> None:
        """Write everything a resumed training needs, whole or not at all."""
        with replacing(path) as partial:
            torch.save(
                {name: part.state_dict() for name, part in self._parts().items()} | {"history": history}, partial
            )

    def resume(self, path: Path) -> list[dict[str, float]]:
        """Take up a checkpoint of `save`; its history."""
        state = read_checkpoint(path)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        return state["history"]


def build_autoencoder(config: AutoencoderTrainingOptions, *, spacing_mm: float) -> Autoencoder:
    """The autoencoder that a stage's parameters describe, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Autoencoder.of(
            channels=integers(config.channels),
            latent_channels=config.latent_channels,
            blocks=config.blocks,
            spacing_mm=spacing_mm,
            input_transform=config.input_transform,
            linear_start=config.linear_start,
            learned=config.learned,
        )


def train_autoencoder(
    autoencoder: Autoencoder,
    cases: Sequence[Case],
    config: AutoencoderTrainingOptions,
    *,
    folder: Path,
    device: torch.device,
    precision: str,
) -> list[dict[str, float]]:
    """Train in place, leave the averaged weights, and set the latents' shift and scale.

    Args:
        folder: where the checkpoint goes; a training that was killed there is taken up again.

    Returns:
        one row of figures a step: step, learning_rate, seconds, l1, kl and what else the loss has; none where there is
        no network to train.

    Raises:
        TrainingError: a loss that is not finite.
    """
    if not (checkpoint := folder / CHECKPOINT).exists():
        fit_linear_parts(autoencoder, cases)
    history = []
    if autoencoder.to(device).network is not None:
        training = AutoencoderTraining(autoencoder, config, device=device, precision=precision)
        history = _take_steps(training, cases, checkpoint)
    autoencoder.freeze()
    autoencoder.standardise(*latent_statistics(autoencoder, cases, device=device, precision=precision))
    return history


def _take_steps(training: AutoencoderTraining, cases: Sequence[Case], checkpoint: Path) -> list[dict[str, float]]:
    """Every step of a training that a checkpoint does not hold yet, one row each; leaves the averaged weights."""
    history, steps = training.resume(checkpoint) if checkpoint.exists() else [], training.config.autoencoder_steps
    if history:
        log.info("autoencoder taken up again after step %d", len(history))
    loader, saved = CropLoader(cases, training.config, training.autoencoder.factor), time.monotonic()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for step in range(len(history), steps):
        started, rate = time.monotonic(), training.schedule.get_last_lr()[0]
        figures = training.step(step, *loader.batch(step))
        seconds = time.monotonic() - started
        history.append({"step": step, "learning_rate": rate, "seconds": seconds, **figures})
        if time.monotonic() - saved > CHECKPOINT_EVERY_S or step + 1 == steps:
            training.save(checkpoint, history)
            saved = time.monotonic()
            left = (steps - step - 1) * float(np.median([row["seconds"] for row in history[-50:]]))
            log.info("autoencoder step %d/%d: L1 %.4f; %.0f min left", step + 1, steps, figures["l1"], left / 60)
    training.autoencoder.load_state_dict(training.ema.module.state_dict())
    return history


def moving_average(decay: float) -> Any:
    """Exponential moving average whose decay rises with the number of updates, so that the start is forgotten."""

    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        rate = min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averaged, current, 1 - rate)

    return update


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, network: torch.nn.Module) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
