"""Measure how fast autoencoders encode and decode a volume, and in how much memory: ours and MONAI's in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.reference_models import standard_autoencoder
from ldm_lib.autoencoder.training import build_autoencoder
from ldm_lib.devices import autocast, pick_device, pick_precision, timed
from ldm_lib.experiment.presets import resolve
from ldm_lib.progress import report

AnyCodec = Callable[[Tensor], Tensor]


def bench_autoencoders(shape: Sequence[int]) -> dict[str, Any]:
    """Encode and decode one volume with the autoencoder of preset `full` and with MONAI's in float32.

    Ours is measured first, for its peak of memory.

    Returns:
        "autoencoders", seconds and memory of both; "ratios".
    """
    device = pick_device("auto")
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    own = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze().to(device)
    standard = standard_autoencoder().eval().to(device)
    rows = {
        "ours": time_codec(own.encode, own.decode, volume, pick_precision("auto", device)),
        "monai": time_codec(lambda given: standard.encode(given)[0], standard.decode, volume, "32"),
    }
    for name, row in rows.items():
        report(f"autoencoders, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    ours, theirs = (row["encode_s"] + row["decode_s"] for row in rows.values())
    return {"autoencoders": rows, "ratios": {"encode_decode_speedup_vs_monai_fp32": theirs / ours}}


def time_codec(encode: AnyCodec, decode: AnyCodec, volume: Tensor, precision: str) -> dict[str, float]:
    """Return the seconds of encoding and decoding, and the peak of memory so far (resident, or allocated on a GPU)."""
    device = volume.device
    reset_peak_memory(device)
    with torch.inference_mode(), autocast(device, precision):
        decode(encode(volume[..., :32, :32, :32]))  # one-time set-up is not timed
        encode_s, latent = timed(lambda: encode(volume), device)
        decode_s, _ = timed(lambda: decode(latent), device)
    return {"encode_s": encode_s, "decode_s": decode_s, "peak_memory_gb": peak_memory(device) / 1e9}
