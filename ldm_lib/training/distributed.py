"""The processes that train together: one in a notebook, as many as `torchrun` started else. The only user of Lightning.

Lightning Fabric places, casts, wraps in DDP and shards; the loop is ours (`training`).
"""

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ldm_lib.diffusion.unet import ADM
from ldm_lib.process_control import STALL_S

for _name in ("lightning.fabric", "lightning.pytorch"):  # which of the two speaks depends on what was imported last
    logging.getLogger(_name).setLevel(logging.WARNING)  # no banner
# Of a view that is returned by a sharded module; none of ours is changed in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

WHOLE = StateDictOptions(full_state_dict=True)  # of sharded weights too
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def world_size() -> int:
    """How many processes `torchrun` started, over all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def global_rank() -> int:
    """The number of this process among all."""
    return int(os.environ["RANK"]) if _launched() else 0


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return global_rank() == 0


class Processes:
    """This process among those that train together, and what they do in common.

    Args:
        device: where this process computes.
        precision: "32", "bf16" or "16", of forward passes.
        strategy: "ddp", a copy of the weights in each process, or "fsdp", a shard.
    """

    def __init__(self, device: torch.device, precision: str, strategy: str = "ddp") -> None:
        self.device, self.world = device, world_size()
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if _launched() else 1
        self.sharded = self.world > 1 and strategy == "fsdp"
        # Named, because a notebook inside a SLURM allocation is one process, whatever the allocation holds.
        environment = TorchElasticEnvironment() if _launched() else LightningEnvironment()
        self.fabric = Fabric(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=here,
            num_nodes=self.world // here,
            strategy=_strategy(strategy, self.world) if self.world > 1 else "auto",
            precision=PRECISIONS[precision],
            plugins=[environment],
        )
        self.fabric.launch()
        self.rank = self.fabric.global_rank

    def setup(self, module: nn.Module) -> nn.Module:
        """The module as it is called in training: placed, cast, and its gradients averaged over the processes."""
        return self.fabric.setup(module)

    def setup_optimiser(self, optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser, which unscales 16-bit gradients and skips a step where they overflowed."""
        return self.fabric.setup_optimizers(optimiser)

    def shard(self, module: nn.Module) -> nn.Module:
        """A module that is not trained: placed, and sharded as `setup` would."""
        return _shard(module, self.fabric.strategy.device_mesh) if self.sharded else module.to(self.device)

    def whole(self, module: nn.Module, twin: ADM) -> nn.Module:
        """The module with all its weights in this process; every process takes part where they are sharded.

        Args:
            twin: a network of the same build.
        """
        if not self.sharded:
            return module
        plain = ADM(**twin.config).to(self.device).eval()
        plain.load_state_dict(get_model_state_dict(module, options=WHOLE))
        return plain.requires_grad_(False)

    def accumulating(self, network: nn.Module, more: bool) -> AbstractContextManager:
        """The context of a backward pass; with `more` to come before the step, gradients are not exchanged yet."""
        return self.fabric.no_backward_sync(network, enabled=more) if self.world > 1 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, scaled where the precision needs it."""
        self.fabric.backward(loss)

    def clip(self, network: nn.Module, optimiser: torch.optim.Optimizer, most: float) -> Tensor:
        """Clip the gradient to a norm, and return what its norm was."""
        norm = self.fabric.clip_gradients(network, optimiser, max_norm=most, error_if_nonfinite=False)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.fabric.all_reduce(tensor.clone(), reduce_op="mean")

    def smallest(self, tensor: Tensor) -> Tensor:
        """The least over the processes."""
        return self.fabric.all_reduce(tensor.clone(), reduce_op="min")

    def largest(self, number: int) -> Tensor:
        """The most over the processes."""
        return self.fabric.all_reduce(torch.tensor(number, device=self.device), reduce_op="max")

    def gathered(self, mine: Mapping[int, Any]) -> dict[int, Any]:
        """The union of what each process found, by number."""
        if self.world == 1:
            return dict(mine)
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, dict(mine))
        return {k: value for part in found for k, value in part.items()}

    def wait(self) -> None:
        """Until every process is here."""
        self.fabric.barrier()

    def scaler_state(self) -> dict[str, Any]:
        """The scale of 16-bit gradients; empty in other precisions."""
        return self.fabric.strategy.precision.state_dict()

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Take over what `scaler_state` returned."""
        self.fabric.strategy.precision.load_state_dict(state)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _strategy(name: str, world: int) -> Strategy:
    patience = {"timeout": timedelta(seconds=STALL_S)}
    if name == "ddp":
        return DDPStrategy(**patience)
    return ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1, **patience)


def _shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(module, mesh=mesh["data_parallel"])
