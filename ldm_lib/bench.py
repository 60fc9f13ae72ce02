"""How fast, and in how much memory: our autoencoders at full size beside MONAI's as it comes, in one process.

Seconds depend on the machine; their ratio much less, so the ratio is what is kept and compared.
"""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_lib.autoencoder import NETWORKS
from ldm_lib.autoencoding import build_autoencoder
from ldm_lib.devices import autocast, pick_device, pick_precision
from ldm_lib.files import write_json
from ldm_lib.presets import resolve
from ldm_lib.runs import provenance

FULL_GRID = (240, 240, 160)
STANDARD = {"spatial_dims": 3, "num_res_blocks": (2,) * 4, "channels": (32, 64, 128, 128), "latent_channels": 6,
            "attention_levels": (False,) * 4, "norm_num_groups": 32, "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False}  # fmt: skip


def bench(output: Path, *, shape: Sequence[int] = FULL_GRID, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Encode and decode one volume with the autoencoder of `full` and with MONAI's AutoencoderKL in float32.

    Ours goes first, so that its peak of resident memory is its own: the system only tells the largest so far.

    Args:
        output: JSON file: seconds and memory of both, and under "ratios" how many times faster ours is.
        shape: voxels, divisible by 8.
    """
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows = {}
    for name, (encode, decode, how) in _contestants(device, precision).items():
        rows[name] = _timed(encode, decode, volume, device, how)
        told = ", ".join(f"{key} {value:.2f}" for key, value in rows[name].items())
        say(f"{name} ({how}): {told}")
    ours, standard = (row["encode_s"] + row["decode_s"] for row in rows.values())
    ratios = {"encode_decode_speedup_vs_monai_fp32": standard / ours}
    found = {"shape": list(shape), "device": str(device), "precision": precision, "threads": torch.get_num_threads(),
             "autoencoders": rows, "ratios": ratios, "made_with": provenance()}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    say("\n".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    return found


def _contestants(device: torch.device, precision: str) -> dict[str, tuple[Callable, Callable, str]]:
    ours = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze().to(device)
    standard = NETWORKS["AutoencoderKL"](**STANDARD).eval().to(device)
    return {
        "ours": (ours.encode, ours.decode, precision),
        "monai": (lambda volume: standard.encode(volume)[0], standard.decode, "32"),
    }


def _timed(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    volume: Tensor,
    device: torch.device,
    how: str,
) -> dict[str, float]:
    """Seconds of encoding and decoding, and the peak of memory so far (resident on a CPU, allocated on a GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def seconds(step: Callable[[Tensor], Tensor], given: Tensor) -> tuple[float, Tensor]:
        started = time.perf_counter()
        result = step(given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    with torch.inference_mode(), autocast(device, how):
        decode(encode(volume[..., :32, :32, :32]))  # whatever is made once is made now
        encode_s, latent = seconds(encode, volume)
        decode_s, _ = seconds(decode, latent)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
    return {"encode_s": encode_s, "decode_s": decode_s, "peak_memory_gb": peak / 1e9}


def resident_peak() -> int:
    """Bytes of this process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
