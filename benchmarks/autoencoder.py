"""How fast an autoencoder codes a volume, and in how much memory: that of `full` beside MONAI's in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_models import standard_autoencoder
from ldm_lib.autoencoder.training import build_autoencoder
from ldm_lib.devices import autocast, peak_memory, pick_device, pick_precision, reset_peak_memory, timed
from ldm_lib.experiment.presets import resolve

AnyCodec = Callable[[Tensor], Tensor]


def bench_autoencoders(shape: Sequence[int], *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Encode and decode one volume with the autoencoder of `full` and with MONAI's in float32.

    Ours goes first, for its peak of memory.

    Returns:
        "autoencoders", seconds and memory of both; "ratios".
    """
    device = pick_device("auto")
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    own = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze().to(device)
    standard = standard_autoencoder().eval().to(device)
    rows = {
        "ours": coded(own.encode, own.decode, volume, pick_precision("auto", device)),
        "monai": coded(lambda given: standard.encode(given)[0], standard.decode, volume, "32"),
    }
    for name, row in rows.items():
        say(f"autoencoders, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    ours, theirs = (row["encode_s"] + row["decode_s"] for row in rows.values())
    return {"autoencoders": rows, "ratios": {"encode_decode_speedup_vs_monai_fp32": theirs / ours}}


def coded(encode: AnyCodec, decode: AnyCodec, volume: Tensor, precision: str) -> dict[str, float]:
    """Seconds of encoding and decoding, and the peak of memory so far (resident on a CPU, allocated on a GPU)."""
    device = volume.device
    reset_peak_memory(device)
    with torch.inference_mode(), autocast(device, precision):
        decode(encode(volume[..., :32, :32, :32]))  # whatever is made once is made now
        encode_s, latent = timed(lambda: encode(volume), device)
        decode_s, _ = timed(lambda: decode(latent), device)
    return {"encode_s": encode_s, "decode_s": decode_s, "peak_memory_gb": peak_memory(device) / 1e9}
