"""Run a training in one process, or in the processes that `torchrun` started, by Lightning Fabric (DDP).

Fabric places, casts and averages gradients over the processes; the training loop is in `loop`.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from ldm_lib.process_control import STALL_S

for _name in ("lightning.fabric", "lightning.pytorch"):  # which of the two logs depends on what was imported last
    logging.getLogger(_name).setLevel(logging.WARNING)  # no banner

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def world_size() -> int:
    """Return how many processes `torchrun` started, over all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def global_rank() -> int:
    """Return the number of this process among all."""
    return int(os.environ["RANK"]) if _launched() else 0


def local_rank() -> int:
    """Return the number of this process on its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return global_rank() == 0


class Processes:
    """Hold this process among those that train together, and what they do in common.

    Args:
        device: where this process computes.
        precision: "32", "bf16" or "16", of forward passes.

    Attributes:
        rank, world: the number of this process, and of all.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.world = device, world_size()
        local_world = int(os.environ["LOCAL_WORLD_SIZE"]) if _launched() else 1
        # Explicit, because a notebook inside a SLURM allocation is one process, whatever the allocation holds.
        environment = TorchElasticEnvironment() if _launched() else LightningEnvironment()
        self.fabric = Fabric(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=local_world,
            num_nodes=self.world // local_world,
            strategy=DDPStrategy(timeout=timedelta(seconds=STALL_S)) if self.world > 1 else "auto",
            precision=PRECISIONS[precision],
            plugins=[environment],
        )
        self.fabric.launch()
        self.rank = self.fabric.global_rank

    def setup(self, module: nn.Module) -> nn.Module:
        """Return the module as it is called in training: placed, cast, and its gradients averaged over processes."""
        return self.fabric.setup(module)

    def setup_optimiser(self, optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimiser, which unscales 16-bit gradients and skips a step where they overflowed."""
        return self.fabric.setup_optimizers(optimiser)

    def accumulating(self, network: nn.Module, more: bool) -> AbstractContextManager:
        """Return the context of a backward pass; with `more` to come, gradients are not exchanged yet."""
        return self.fabric.no_backward_sync(network, enabled=more) if self.world > 1 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, scaled where the precision needs it."""
        self.fabric.backward(loss)

    def clip(self, network: nn.Module, optimiser: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clip the gradient to a norm, and return its norm before."""
        return self.fabric.clip_gradients(network, optimiser, max_norm=max_norm, error_if_nonfinite=False)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes."""
        return self.fabric.all_reduce(tensor.clone(), reduce_op="mean")

    def smallest(self, tensor: Tensor) -> Tensor:
        """Return the minimum over the processes."""
        return self.fabric.all_reduce(tensor.clone(), reduce_op="min")

    def gathered(self, mine: Mapping[int, Any]) -> dict[int, Any]:
        """Return the union of the mappings of all processes."""
        if self.world == 1:
            return dict(mine)
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, dict(mine))
        return {k: value for part in found for k, value in part.items()}

    def wait(self) -> None:
        """Wait until every process is here."""
        self.fabric.barrier()

    def scaler_state(self) -> dict[str, Any]:
        """Return the scale of 16-bit gradients; empty in other precisions."""
        return self.fabric.strategy.precision.state_dict()

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Restore what `scaler_state` returned."""
        self.fabric.strategy.precision.load_state_dict(state)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
