"""Measure how fast this machine multiplies matrices."""

import torch

from ldm_lib.devices import DTYPES, timed

SQUARE = {"cpu": 2048, "cuda": 8192}  # edge of the matrices whose product is timed


def matmul_rate(device: torch.device, precision: str, *, repeats: int = 5) -> float:
    """Return FLOP per second of a large square matrix product, the best of several: the machine's practical limit."""
    edge = SQUARE[device.type]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(edge, edge, generator=draw).to(device, DTYPES[precision]) for _ in range(2))
    return 2 * edge**3 / min(timed(lambda: a @ b, device)[0] for _ in range(repeats))
