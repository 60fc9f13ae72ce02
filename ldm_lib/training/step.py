"""Train the denoiser by one optimiser step, and hold the state that the next step depends on.

A step is a function of (weights, optimiser, seed, step), so that a training resumes without any difference.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lib.autoencoder.training import moving_average
from ldm_lib.diffusion.latents import Latents
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.training.batch_plan import BatchPlan
from ldm_lib.training.distributed import Processes
from ldm_lib.training.objective import channel_weights, training_loss
from ldm_lib.training.options import TrainingOptions

NEVER = 2**62  # the step of the first loss that was not finite, while all were
EPOCH, INTERVAL, NORM = range(3)  # sums since the epoch began, and since metrics were last logged


class Trainer:
    """Hold a denoiser, its moving average and its optimiser: what a checkpoint keeps and one step changes.

    Attributes:
        step, closed: optimiser steps done, and the step whose epoch was validated and logged last.
        best, waited: [val_loss, file name] of the best validations, the best first; validations since the best.
    """

    def __init__(self, model: LatentDiffusion, config: TrainingOptions, plan: BatchPlan, processes: Processes) -> None:
        self.config, self.plan, self.processes, self._initial = config, plan, processes, model
        layout = torch.channels_last_3d if model.precision != "32" else torch.contiguous_format
        self.denoiser = model.denoiser.to(memory_format=layout)
        self.average = deepcopy(self.denoiser).requires_grad_(False).eval().to(processes.device)
        self._update_average = moving_average(config.ema_decay)
        self.network = processes.fabric.setup(torch.compile(self.denoiser) if config.compile else self.denoiser)
        # An optimiser that steps in one kernel unscales too, and so leaves a 16-bit gradient unclipped.
        self._adamw = torch.optim.AdamW(
            self.denoiser.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=model.precision != "16"
        )
        self.optimiser = processes.fabric.setup_optimizers(self._adamw)
        weights = channel_weights(model) if config.noisiest_fraction else None
        self._loss_weights = config.outside_weight, weights
        self.step, self.closed, self.waited, self.best = 0, 0, 0, []
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=model.device)

    @property
    def epoch(self) -> int:
        """Return the number of finished epochs."""
        return self.step // self.plan.steps_per_epoch

    @property
    def complete(self) -> bool:
        """Return whether nothing is left to do, the last epoch's validation included."""
        patience = max(1, math.ceil(self.config.patience / self.config.val_every))  # validations
        stopped = self.waited >= patience and not self.config.overfit_batches
        return self.step == self.closed and (self.step >= self.plan.steps or stopped)

    @property
    def model(self) -> LatentDiffusion:
        """Return the model with the averaged weights."""
        return replace(self._initial, denoiser=self.average)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next step: a linear warm-up, then constant or half a cosine down to 0."""
        warm = min(1.0, (self.step + 1) / (self.config.warmup_steps + 1))
        done = self.step / self.plan.steps if self.config.learning_rate_schedule == "cosine" else 0.0
        return self.config.learning_rate * warm * (1 + math.cos(math.pi * done)) / 2

    def advance(self, batches: Sequence[Latents]) -> None:
        """Take one optimiser step on the batches that this process accumulates, without waiting for a GPU."""
        last = len(batches) - 1
        for k, batch in enumerate(batches):
            if self.config.dropout:  # drawn from torch's own stream, which no checkpoint keeps
                _, index, _ = self.plan.batches(self.step)[k][0]
                seed = np.random.SeedSequence([self.config.seed, self.step, index]).generate_state(1)[0]
                torch.manual_seed(int(seed))
            with self.processes.accumulating(self.network, k < last):
                loss = training_loss(self.network, batch, self._initial, *self._loss_weights) / len(batches)
                self.processes.fabric.backward(loss)
            self.sums[:2] += loss.detach().double()
            self._note_bad(loss.detach())
        norm = self.processes.fabric.clip_gradients(
            self.network, self.optimiser, max_norm=self.config.gradient_clip, error_if_nonfinite=False
        )
        self.sums[NORM] += norm.double()
        if self._initial.precision != "16":  # there a gradient may overflow, and the step is left out
            self._note_bad(norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._update_average(list(self.average.parameters()), list(self.denoiser.parameters()), self.step)
        self.step += 1

    def _note_bad(self, value: Tensor) -> None:
        bad = ~value.isfinite() & (self.first_bad == NEVER)
        self.first_bad = torch.where(bad, self.step, self.first_bad)

    def bad_step(self, *, everywhere: bool = True) -> int | None:
        """Return the first step whose loss or gradient was not finite, in any process or in this one alone."""
        found = int(self.processes.reduce(self.first_bad, "min") if everywhere else self.first_bad)
        return None if found == NEVER else found

    def state(self) -> dict[str, Any]:
        """Return all that the next steps depend on, as plain values and tensors."""
        return {
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self._adamw.state_dict(),
            "scaler": self.processes.fabric.strategy.precision.state_dict(),
            "sums": self.sums.clone(),
            "progress": {"step": self.step, "closed": self.closed, "waited": self.waited, "best": self.best},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        self._adamw.load_state_dict(state["optimiser"])
        self.processes.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.sums.device)
        for name, value in state["progress"].items():
            setattr(self, name, value)
