"""Run a training in one process, or in the processes that `torchrun` started, by Lightning Fabric (DDP)."""

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

    Attributes:
        fabric: places and casts networks, scales 16-bit gradients, and averages gradients over the processes.
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

    def accumulating(self, network: nn.Module, more: bool) -> AbstractContextManager:
        """Return the context of a backward pass; with `more` to come, gradients are not exchanged yet."""
        return self.fabric.no_backward_sync(network, enabled=more) if self.world > 1 else nullcontext()

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Return the "mean" or the minimum, "min", over the processes."""
        return self.fabric.all_reduce(tensor.clone(), reduce_op=operation)

    def gathered(self, mine: Mapping[int, Any]) -> dict[int, Any]:
        """Return the union of the mappings of all processes."""
        if self.world == 1:
            return dict(mine)
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, dict(mine))
        return {k: value for part in found for k, value in part.items()}


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
