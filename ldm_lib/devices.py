"""Choose the device and precision of a network, and measure time and memory."""

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ldm_lib.errors import ConfigError

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto", "cpu" or "cuda" -> a device that is there; a GPU that was asked for and is absent is refused."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but no CUDA device is visible", fix="set device to auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the processor multiplies it faster, else "32"; "16" needs a GPU."""
    if name == "16" and device.type == "cpu":
        raise ConfigError("precision = '16' on a CPU", fix="set precision to auto, bf16 or 32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "16"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision for a forward pass; "32" changes nothing."""
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "32"):
        yield


def total_memory(device: torch.device) -> int:
    """Bytes that the device has in all, as far as this process may use them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container on Linux; a number, or "max"
    told = limit.read_text().strip() if limit.exists() else ""
    return min(installed, int(told)) if told.isdecimal() else installed


def processor_name(device: torch.device) -> str:
    """What its maker calls the processor that computes; the kind of machine where that is not told."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    listed = Path("/proc/cpuinfo")  # of Linux, where `platform` knows no name
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = [
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "model name"
    ]
    return named[0] if named else platform.processor() or platform.machine()


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
