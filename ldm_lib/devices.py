"""Choose the device and precision of a network, and measure time."""

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_lib.errors import ConfigError

log = logging.getLogger("ldm_lib")

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
PROBE_CHANNELS, PROBE_TRIALS = 48, 5  # of `probe_bf16`
LARGEST_BF16_ERROR = 0.05  # of a weight gradient, relative to the largest; 0.01 where bf16 works


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


def require_trainable(precision: str, device: torch.device) -> None:
    """Refuse to train in bf16 on a processor on which this version of torch computes its gradients wrongly.

    Where it is slower than float32, a warning is logged.

    Raises:
        ConfigError: they are wrong by more than `LARGEST_BF16_ERROR`.
    """
    if precision != "bf16" or device.type != "cpu":
        return
    error, speed = probe_bf16(device)
    if speed < 1:
        log.warning("training in bf16, which is %.1f times as fast as float32 on this processor", speed)
    if error > LARGEST_BF16_ERROR:
        raise ConfigError(f"precision = 'bf16': torch {torch.__version__} computes wrong gradients on this processor "
                          f"(off by {error:.2g} of the largest)", fix="set precision to 32")  # fmt: skip


def probe_bf16(device: torch.device) -> tuple[float, float]:
    """Compare the weight gradients of 3D convolutions in bf16 with those in float32.

    Some versions of torch compute them wrongly or slowly on some processors. Axes of one or two voxels are left out,
    because the denoiser convolves those in float32 on a CPU, see `unet_blocks.Conv`.

    Returns:
        The largest difference relative to the largest gradient, infinite where one is not a number; and how many times
        faster bf16 is, 0.5 for half as fast.
    """
    draw, error, seconds = torch.Generator().manual_seed(0), 0.0, dict.fromkeys(("32", "bf16"), math.inf)
    weight = torch.randn(PROBE_CHANNELS, PROBE_CHANNELS, 3, 3, 3, generator=draw) / PROBE_CHANNELS
    weight = weight.to(device).requires_grad_()
    for shape, _ in itertools.product(((3, 12, 12), (12, 12, 12)), range(PROBE_TRIALS)):
        x = torch.randn(4, PROBE_CHANNELS, *shape, generator=draw).to(device, memory_format=torch.channels_last_3d)
        gradients = {}
        for precision in seconds:
            taken, gradients[precision] = timed(partial(_weight_gradient, x, weight, device, precision), device)
            if min(shape) > 3:
                seconds[precision] = min(seconds[precision], taken)
        expected, found = gradients["32"], gradients["bf16"]
        difference = float((found - expected).abs().max() / expected.abs().max())
        error = max(error, difference if math.isfinite(difference) else math.inf)
    return error, seconds["32"] / seconds["bf16"]


def _weight_gradient(x: torch.Tensor, weight: torch.Tensor, device: torch.device, precision: str) -> torch.Tensor:
    with autocast(device, precision):
        convolved = torch.nn.functional.conv3d(x, weight, padding=1)
    return torch.autograd.grad(convolved.float().square().mean(), weight)[0]


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
