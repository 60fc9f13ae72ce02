"""Measure how much memory was taken, and name the processor of this machine."""

import platform
import resource
import sys
from pathlib import Path

import torch


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
