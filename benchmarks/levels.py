"""Measure how fast each resolution level of the denoiser is.

Layers are timed one at a time, forward and backward, on their inputs in a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_lib.devices import autocast, timed
from ldm_lib.diffusion.unet import ADM
from ldm_lib.diffusion.unet_blocks import Attention, ResidualBlock

CALLS = {"cpu": 1, "cuda": 20}  # calls of a layer per measurement: a GPU needs many to be kept busy
Given = tuple[Tensor, ...]


def level_rows(denoiser: ADM, x: Tensor, t: Tensor, precision: str) -> list[dict[str, Any]]:
    """Return the FLOPs and seconds of the layers of each level, summed.

    Layers are residual blocks, attention, and the first and last convolution. Each belongs to the level of its output,
    where its convolutions work. The timestep's embedding, concatenations and padding are left out.

    Args:
        x: (b c x y z) input of the denoiser.
        t: (b,) timesteps.

    Returns:
        Rows of {"level", "cells" (latent voxels of a sample), "width", "gflop", "s"}, the finest first.
    """
    blocks = [module for module in denoiser.modules() if isinstance(module, ResidualBlock | Attention)]
    rows: dict[int, dict[str, Any]] = {}
    for layer, given, cells in _layer_inputs([denoiser.stem, *blocks, denoiser.head], denoiser, x, t, precision):
        row = rows.setdefault(cells, {"gflop": 0.0, "s": 0.0})
        with FlopCounterMode(display=False) as counter:  # and one-time set-up is done
            _forward_and_backward(layer, given, precision, 1)
        row["gflop"] += counter.get_total_flops() / 1e9
        calls = CALLS[x.device.type]
        seconds, _ = timed(lambda args=(layer, given, precision, calls): _forward_and_backward(*args), x.device)
        row["s"] += seconds / calls
    widths = [denoiser.config["base_width"] * multiplier for multiplier in denoiser.config["multipliers"]]
    finest_first = enumerate(sorted(rows, reverse=True))
    return [{"level": k, "cells": cells, "width": widths[k], **rows[cells]} for k, cells in finest_first]


def _layer_inputs(
    layers: Sequence[nn.Module], denoiser: ADM, x: Tensor, t: Tensor, precision: str
) -> list[tuple[nn.Module, Given, int]]:
    """Return each layer with its inputs in a forward pass and the latent voxels of its output.

    A step needs the gradient of all inputs but the batch itself, which only the stem sees.
    """
    found: list[tuple[nn.Module, Given, int]] = []

    def note(layer: nn.Module, given: Given, output: Tensor) -> None:
        kept = tuple(tensor.detach().requires_grad_(layer is not denoiser.stem) for tensor in given)
        found.append((layer, kept, output[0, 0].numel()))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad(), autocast(x.device, precision):
        denoiser(x, t)
    for hook in hooks:
        hook.remove()
    return found


def _forward_and_backward(layer: nn.Module, given: Given, precision: str, calls: int) -> None:
    for _ in range(calls):
        with autocast(given[0].device, precision):
            output = layer(*given)
        output.backward(torch.ones_like(output))
        for tensor in [*layer.parameters(), *given]:
            tensor.grad = None
