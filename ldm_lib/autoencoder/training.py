"""Train the autoencoder on crops, and measure the statistics of its latents.

    crop (1 x y z) => posterior sample => reconstruction
    loss = L1 + kl_weight * KL

The data of a step are a function of (seed, step), so that a resumed training equals the uninterrupted one.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ldm_lib.autoencoder.crop_sampler import CropLoader
from ldm_lib.autoencoder.fitting import fit_linear_parts, latent_statistics
from ldm_lib.autoencoder.model import Autoencoder, kl_divergence
from ldm_lib.autoencoder.options import AutoencoderOptions, AutoencoderTrainingOptions
from ldm_lib.autoencoder.third_party import load_autoencoder
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.model_grid import require_spacing
from ldm_lib.devices import autocast, pick_device, pick_precision, require_trainable
from ldm_lib.errors import TrainingError
from ldm_lib.files import replacing
from ldm_lib.model_io import read_checkpoint
from ldm_lib.options import integers
from ldm_lib.progress import Progress

log = logging.getLogger("ldm_lib")

CHECKPOINT = "last.ckpt"
CHECKPOINT_EVERY_S = 120.0
PARTS = ("autoencoder", "ema", "optimiser", "schedule")  # of a checkpoint


class AutoencoderTraining:
    """Hold an autoencoder and its averaged weights, and take one step of AdamW with a one-cycle learning rate."""

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

    def step(self, step: int, volume: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Take the optimiser step of this number on crops (b 1 x y z) of these cases; return the terms of its loss."""
        volume = volume.to(self.device, memory_format=torch.channels_last_3d)
        with autocast(self.device, self.precision):
            mean, std = self.autoencoder.moments(volume)
            reconstruction = self.autoencoder.decode_raw(mean + std * self._noise(mean, step)).float()
            terms = {"l1": F.l1_loss(self._inside(reconstruction), self._inside(volume))}
            terms["kl"] = kl_divergence(mean.float(), std.float())
            loss = terms["l1"] + self.config.kl_weight * terms["kl"]
        if not math.isfinite(loss.item()):
            raise TrainingError(f"loss is {loss.item()} at step {step}, on crops of {', '.join(sorted(set(names)))}",
                                where="autoencoder", fix="lower its learning rate, or check these cases")  # fmt: skip
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.autoencoder.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.ema.update_parameters(self.autoencoder)
        return {name: value.item() for name, value in terms.items()}

    def _inside(self, crop: Tensor) -> Tensor:
        """Cut off the outer latent voxels of a crop: they lack neighbours that they have in a volume."""
        inner = slice(self.autoencoder.factor, -self.autoencoder.factor)
        return crop[..., inner, inner, inner]

    def _noise(self, mean: Tensor, step: int) -> Tensor:
        seed = int(np.random.default_rng([self.config.seed, step, 1 << 20]).integers(2**62))
        return torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def save(self, path: Path, history: Sequence[dict[str, float]]) -> None:
        """Write all that a resumed training needs, atomically."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in PARTS}
        with replacing(path) as partial:
            torch.save(state | {"history": history}, partial)

    def resume(self, path: Path) -> list[dict[str, float]]:
        """Load a checkpoint of `save` and return its history."""
        state = read_checkpoint(path)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        return state["history"]


def build_autoencoder(config: AutoencoderTrainingOptions, *, spacing_mm: float) -> Autoencoder:
    """Build the autoencoder that the options describe; its weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        own = {name: getattr(config, name) for name in AutoencoderOptions.model_fields if name != "channels"}
        return Autoencoder.of(channels=integers(config.channels), spacing_mm=spacing_mm, **own)


def train_autoencoder(
    cases: Sequence[Case],
    options: AutoencoderTrainingOptions | None = None,
    *,
    folder: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Autoencoder:
    """Build and train an autoencoder, frozen and with standardised latents.

    Args:
        cases: training cases, all of one voxel size.
        options: architecture and training, see `help(ldm.AutoencoderTrainingOptions)`; the defaults suit a first trial.
        folder: takes the checkpoint, from which an interrupted training resumes; None writes nothing.
        device: "auto", "cpu" or "cuda".
        precision: "auto", "32", "bf16" or "16".

    Returns:
        The autoencoder; its `history` has one row per step.

    Raises:
        TrainingError: a loss that is not finite, or cases without a brain.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.cohort import find_cases
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> options = AutoencoderTrainingOptions(autoencoder_steps=2, crop=8, final_crop=8)
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 2, spacing_mm=8, masks=1)
        ...     autoencoder = train_autoencoder(find_cases(f"{folder}/data"), options)
        >>> autoencoder.factor, autoencoder.latent_channels, len(autoencoder.history)
        (2, 6, 2)
    """
    if not cases:
        raise TrainingError("no cases", where="train_autoencoder", fix="name a folder with cases to find_cases")
    options = options or AutoencoderTrainingOptions()
    autoencoder = build_autoencoder(options, spacing_mm=load_case(cases[0]).source.spacing_mm[0])
    place = pick_device(device)
    precision = pick_precision(precision, place)
    fit_autoencoder(autoencoder, cases, options, folder=folder, device=place, precision=precision)
    return autoencoder


def load_or_train(
    weights: str | Path,
    cases: Sequence[Case],
    options: AutoencoderTrainingOptions,
    *,
    folder: str | Path,
    device: torch.device,
    precision: str,
) -> tuple[Autoencoder, str]:
    """Load weights of this project, MONAI, monai-generative or MAISI, or train; return also where they come from.

    Args:
        weights: model folder or file; empty trains on the cases.
        cases: training cases, by which latents of other projects' weights are standardised.

    Raises:
        InputError: weights of this project for another voxel size than that of the cases.
    """
    if not weights:
        trained = train_autoencoder(cases, options, folder=folder, device=device.type, precision=precision)
        return trained, "trained here"
    data = load_case(cases[0])
    imported = load_autoencoder(weights, spacing_mm=data.source.spacing_mm[0])
    autoencoder = imported.autoencoder.to(device)
    require_spacing(data, autoencoder.spacing_mm)
    if not imported.standardised:
        autoencoder.standardise(*latent_statistics(autoencoder, cases, device=device, precision=precision))
    return autoencoder, imported.description


def fit_autoencoder(
    autoencoder: Autoencoder,
    cases: Sequence[Case],
    config: AutoencoderTrainingOptions,
    *,
    folder: str | Path | None,
    device: torch.device,
    precision: str,
) -> list[dict[str, float]]:
    """Train an autoencoder in place, keep its averaged weights and standardise its latents; see `train_autoencoder`.

    Returns:
        One row per step: step, learning_rate, seconds, l1 and kl, also kept as its `history`; empty where there is no
        network to train.
    """
    checkpoint = Path(folder) / CHECKPOINT if folder else None
    if not (checkpoint and checkpoint.exists()):
        fit_linear_parts(autoencoder, cases)
    if autoencoder.to(device).network is not None:
        require_trainable(precision, device)
        training = AutoencoderTraining(autoencoder, config, device=device, precision=precision)
        autoencoder.history = _take_steps(training, cases, checkpoint)
    autoencoder.freeze()
    autoencoder.standardise(*latent_statistics(autoencoder, cases, device=device, precision=precision))
    return autoencoder.history


def _take_steps(
    training: AutoencoderTraining, cases: Sequence[Case], checkpoint: Path | None
) -> list[dict[str, float]]:
    """Take all steps that the checkpoint does not contain yet, one row each; leave the averaged weights."""
    history, steps = [], training.config.autoencoder_steps
    if checkpoint and checkpoint.exists():
        history = training.resume(checkpoint)
        log.info("autoencoder training resumed after step %d", len(history))
    loader, saved = CropLoader(cases, training.config, training.autoencoder.factor), time.monotonic()
    progress = Progress(steps, done=len(history), name="autoencoder step")
    for step in range(len(history), steps):
        started, rate = time.monotonic(), training.schedule.get_last_lr()[0]
        terms = training.step(step, *loader.batch(step))
        seconds = time.monotonic() - started
        history.append({"step": step, "learning_rate": rate, "seconds": seconds, **terms})
        progress.update(step + 1, f"L1 {terms['l1']:.4f}")
        if checkpoint and (time.monotonic() - saved > CHECKPOINT_EVERY_S or step + 1 == steps):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            training.save(checkpoint, history)
            saved = time.monotonic()
    training.autoencoder.load_state_dict(training.ema.module.state_dict())
    return history


def moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """Return an update of exponential moving averages of weights whose decay rises, so that the start is forgotten.

    The n-th update (from 0) has the decay min(decay, (1 + n) / (10 + n)).
    """

    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        rate = min(decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(rate)(averaged, current, updates)

    return update
