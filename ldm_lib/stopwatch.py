"""How long a call takes, how much memory it took, and how fast the machine multiplies."""

import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from ldm_lib.devices import DTYPES

SQUARE = {"cpu": 2048, "cuda": 8192}  # edge of the matrices whose product is timed


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until what was called has been computed, and what it returned."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def forget_peak(device: torch.device) -> None:
    """Measure a GPU's peak of memory anew from here; a process's own cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a GPU; on a CPU the most resident of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(device: torch.device, precision: str, *, repeats: int = 5) -> float:
    """FLOP a second of a large square matrix product, the best of several: what the machine can do at most."""
    edge = SQUARE[device.type]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(edge, edge, generator=draw).to(device, DTYPES[precision]) for _ in range(2))
    return 2 * edge**3 / min(timed(lambda: a @ b, device)[0] for _ in range(repeats))
