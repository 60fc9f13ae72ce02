"""Choose the device and precision of a network, and measure time."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ldm_lib.errors import ConfigError

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; "auto" takes a GPU if there is one.

    Raises:
        ConfigError: "cuda" was requested and no CUDA device is visible.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but no CUDA device is visible", fix="set device to auto or cpu")
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise ConfigError(f"device = {name!r}: auto, cpu and cuda are allowed", fix="set device to one of them")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve a precision: "auto" is "32" on a CPU, and "bf16" (or "16") on a GPU.

    On a CPU, reduced precision is never chosen by itself: one seed must give one result on every processor.

    Raises:
        ConfigError: an unknown precision, or "16" on a CPU.
    """
    if name != "auto" and name not in DTYPES:
        allowed = ", ".join(["auto", *DTYPES])
        raise ConfigError(f"precision = {name!r}: allowed: {allowed}, each as text", fix="set precision to one of them")
    if name == "16" and device.type == "cpu":
        raise ConfigError("precision = '16' on a CPU", fix="set precision to auto, bf16 or 32")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "32"
    return "bf16" if torch.cuda.is_bf16_supported() else "16"


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run a forward pass in mixed precision; "32" changes nothing."""
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "32"):
        yield


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device that this process may use; on Linux a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")  # holds a number, or "max"
    limit = limit_file.read_text().strip() if limit_file.exists() else ""
    return min(installed, int(limit)) if limit.isdecimal() else installed


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Call a function and return the seconds until its result has been computed, and the result."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result
