"""Measure how fast this machine multiplies matrices and how much memory was taken, and name its processor."""

import platform
import resource
import sys
from pathlib import Path

import torch

from ldm_lib.devices import DTYPES, timed

SQUARE = {"cpu": 2048, "cuda": 8192}  # edge of the matrices whose product is timed


def matmul_rate(device: torch.device, precision: str, *, repeats: int = 5) -> float:
    """Return FLOP per second of a large square matrix product, the best of several: the machine's practical limit."""
    edge = SQUARE[device.type]
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(edge, edge, generator=draw).to(device, DTYPES[precision]) for _ in range(2))
    return 2 * edge**3 / min(timed(lambda: a @ b, device)[0] for _ in range(repeats))


def processor_name(device: torch.device) -> str:
    """Return the model name of the processor that computes, or the machine's architecture if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where `platform` knows no name
    pairs = (line.partition(":") for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else []))
    names = (value.strip() for key, _, value in pairs if key.strip() == "model name")
    return next(names, "") or platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Reset a GPU's record of peak memory; the peak of a process on a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, or resident of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
