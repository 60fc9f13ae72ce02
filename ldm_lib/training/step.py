"""The denoiser as it learns: one optimiser step, and all that the next one depends on.

A step is a function of (weights, optimiser, seed, step): what it sees comes from `batches.Plan`, its learning rate from
its number. So a training that was killed goes on from its checkpoint as if nothing had been.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm_lib.diffusion.latents import Latents
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.diffusion.unet import ADM
from ldm_lib.training.batch_plan import BatchPlan
from ldm_lib.training.distributed import WHOLE, Processes
from ldm_lib.training.objective import training_loss
from ldm_lib.training.options import TrainingOptions

NEVER = 2**62  # the step of a loss that was not finite, while all were
EPOCH, INTERVAL, NORM = range(3)  # what is summed since the epoch began, and since figures were last logged


class Trainer:
    """A denoiser, its moving average and its optimiser: what a checkpoint keeps, and what one step does to it.

    Attributes:
        step: optimiser steps done.
        closed: the step whose epoch was validated and logged last.
        best: [val_loss, file name] of the best validations, the best first.
        waited: validations since the best.
    """

    def __init__(self, model: LatentDiffusion, config: TrainingOptions, plan: BatchPlan, processes: Processes) -> None:
        self.config, self.plan, self.processes, self._given = config, plan, processes, model
        layout = torch.channels_last_3d if model.precision != "32" else torch.contiguous_format
        self.denoiser = model.denoiser.to(memory_format=layout)
        self.average = processes.shard(deepcopy(self.denoiser).requires_grad_(False).eval())
        self.network = processes.setup(torch.compile(self.denoiser) if config.compile else self.denoiser)
        # An optimiser that steps in one kernel unscales too, and so leaves a 16-bit gradient unclipped.
        self.optimiser = processes.setup_optimiser(
            torch.optim.AdamW(self.denoiser.parameters(), lr=config.learning_rate, weight_decay=0.0,
                              fused=model.precision != "16")
        )  # fmt: skip
        self.step, self.closed, self.waited, self.best = 0, 0, 0, []
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=model.device)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.plan.steps_per_epoch

    @property
    def patience(self) -> int:
        """Validations without a better one after which the training ends."""
        return max(1, math.ceil(self.config.patience / self.config.val_every))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, the last epoch's validation included."""
        stopped = self.waited >= self.patience and not self.config.overfit_batches
        return self.step == self.closed and (self.step >= self.plan.steps or stopped)

    @property
    def model(self) -> LatentDiffusion:
        """The frozen parts with the averaged denoiser."""
        return replace(self._given, denoiser=self.processes.whole(self.average, self._given.denoiser))

    @property
    def raw(self) -> ADM:
        """The denoiser as it is optimised."""
        return self.processes.whole(self.denoiser, self._given.denoiser)

    def advance(self, batches: Sequence[Latents]) -> None:
        """One optimiser step on the batches that this process accumulates; nothing waits for a GPU."""
        last = len(batches) - 1
        for k, batch in enumerate(batches):
            self._seed_dropout(k)
            with self.processes.accumulating(self.network, k < last):
                loss = training_loss(self.network, batch, self._given, self.config) / len(batches)
                self.processes.backward(loss)
            self.sums[:2] += loss.detach().double()
            self._note_bad(loss.detach())
        norm = self.processes.clip(self.network, self.optimiser, self.config.gradient_clip)
        self.sums[NORM] += norm.double()
        if self._given.precision != "16":  # there a gradient may overflow, and the step is left out
            self._note_bad(norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        rate = min(self.config.ema_decay, self.step / (9 + self.step))  # rises, so that the start is forgotten
        torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), 1 - rate)

    @property
    def learning_rate(self) -> float:
        """Of the next step: constant after a linear warm-up."""
        return self.config.learning_rate * min(1.0, (self.step + 1) / (self.config.warmup_steps + 1))

    def _seed_dropout(self, k: int) -> None:
        if self.config.dropout:  # drawn from torch's own stream, which no checkpoint keeps
            _, index, _ = self.plan.batches(self.step)[k][0]
            torch.manual_seed(int(np.random.SeedSequence([self.config.seed, self.step, index]).generate_state(1)[0]))

    def _note_bad(self, value: Tensor) -> None:
        bad = ~value.isfinite() & (self.first_bad == NEVER)
        self.first_bad = torch.where(bad, self.step, self.first_bad)

    def bad_step(self, *, everywhere: bool = True) -> int | None:
        """The first step whose loss or gradient was not finite, in any process or in this one."""
        found = self.processes.smallest(self.first_bad) if everywhere else self.first_bad
        return None if int(found) == NEVER else int(found)

    def averaged_weights(self) -> dict[str, Tensor]:
        """Those of the moving average, whole; every process of shards takes part."""
        return get_model_state_dict(self.average, options=WHOLE)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain values and tensors; every process of shards takes part."""
        return {
            "denoiser": get_model_state_dict(self.denoiser, options=WHOLE),
            "average": self.averaged_weights(),
            "optimiser": get_optimizer_state_dict(self.denoiser, self.optimiser, options=WHOLE),
            "scaler": self.processes.scaler_state(),
            "sums": self.sums.clone(),
            "progress": {"step": self.step, "closed": self.closed, "waited": self.waited, "best": self.best},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        set_model_state_dict(self.denoiser, state["denoiser"], options=WHOLE)
        set_model_state_dict(self.average, state["average"], options=WHOLE)
        set_optimizer_state_dict(self.denoiser, self.optimiser, state["optimiser"], options=WHOLE)
        self.processes.load_scaler(state["scaler"])
        self.sums = state["sums"].to(self.sums.device)
        for name, value in state["progress"].items():
            setattr(self, name, value)
