"""How fast, and in how much memory: what is ours beside what is commonly done, at full size in one process.

Seconds depend on the machine; their ratio much less, so the ratio is what is kept and compared.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_lib.autoencoding import build_autoencoder
from ldm_lib.bench_training import bench_training
from ldm_lib.charts import bars
from ldm_lib.devices import autocast, pick_device, pick_precision, processor_name
from ldm_lib.files import write_json
from ldm_lib.presets import resolve
from ldm_lib.runs import provenance
from ldm_lib.slices import Plate
from ldm_lib.standards import standard_autoencoder
from ldm_lib.stopwatch import forget_peak, peak_memory, timed

FULL_GRID = (240, 240, 160)
PARTS = ("autoencoder", "training")


def bench(
    output: Path,
    *,
    only: str | None = None,
    shape: Sequence[int] = FULL_GRID,
    changes: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure each part, and write what was found as JSON and as a picture beside it.

    The autoencoders go first, so that their peak of memory is their own: the system only tells a process's largest so
    far.

    Args:
        output: JSON file: seconds and memory of all, and under "ratios" how many times faster ours is.
        only: one of PARTS; none measures all.
        shape: voxels, divisible by 8.
        changes: of the denoiser's parameters in `full`.
    """
    device = pick_device("auto")
    found = {"shape": list(shape), "device": str(device), "processor": processor_name(device),
             "precision": pick_precision("auto", device), "threads": torch.get_num_threads(), "ratios": {},
             "seconds": {}, "made_with": provenance()}  # fmt: skip
    encode_s = None
    if only in (None, "autoencoder"):
        _add(found, "autoencoder", partial(bench_autoencoders, shape, say=say))
        encode_s = found["autoencoders"]["monai"]["encode_s"]
    if only in (None, "training"):
        _add(found, "training", partial(bench_training, shape, encode_s=encode_s, changes=changes, say=say))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    picture(found).savefig(output.with_suffix(".png"), dpi=100)
    say("\n".join(f"{name} {value:.2f}" for name, value in found["ratios"].items()))
    return found


def _add(found: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Take over what a part found, and the seconds it took."""
    started = time.perf_counter()
    part = measure()
    found["seconds"][name] = time.perf_counter() - started
    found["ratios"] |= part.pop("ratios")
    found |= part


def bench_autoencoders(shape: Sequence[int], *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Encode and decode one volume with the autoencoder of `full` and with MONAI's in float32.

    Ours goes first, for its peak of memory.

    Returns:
        "autoencoders", seconds and memory of both; "ratios".
    """
    device = pick_device("auto")
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows = {}
    for name, (encode, decode, how) in _contestants(device, pick_precision("auto", device)).items():
        rows[name] = _coded(encode, decode, volume, device, how)
        told = ", ".join(f"{key} {value:.2f}" for key, value in rows[name].items())
        say(f"autoencoders, {name} ({how}): {told}")
    ours, standard = (row["encode_s"] + row["decode_s"] for row in rows.values())
    return {"autoencoders": rows, "ratios": {"encode_decode_speedup_vs_monai_fp32": standard / ours}}


def _contestants(device: torch.device, precision: str) -> dict[str, tuple[Callable, Callable, str]]:
    ours = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze().to(device)
    standard = standard_autoencoder().eval().to(device)
    return {
        "ours": (ours.encode, ours.decode, precision),
        "monai": (lambda volume: standard.encode(volume)[0], standard.decode, "32"),
    }


def _coded(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    volume: Tensor,
    device: torch.device,
    how: str,
) -> dict[str, float]:
    """Seconds of encoding and decoding, and the peak of memory so far (resident on a CPU, allocated on a GPU)."""
    forget_peak(device)
    with torch.inference_mode(), autocast(device, how):
        decode(encode(volume[..., :32, :32, :32]))  # whatever is made once is made now
        encode_s, latent = timed(lambda: encode(volume), device)
        decode_s, _ = timed(lambda: decode(latent), device)
    return {"encode_s": encode_s, "decode_s": decode_s, "peak_memory_gb": peak_memory(device) / 1e9}


def picture(found: dict[str, Any]) -> Plate:
    """What was measured as bars: seconds, each beside ours, and how much of the machine's rate a step reaches."""
    panels = {}
    if "autoencoders" in found:
        seconds = {name: row["encode_s"] + row["decode_s"] for name, row in found["autoencoders"].items()}
        panels["encode and decode a volume, s"] = _beside_ours(seconds)
    if "training" in found:
        seconds = {name.replace("_", " "): row["s"] for name, row in found["training"].items()}
        panels[f"a training step, s (batch of {found['batch_size']})"] = _beside_ours(seconds)
        shares = {"ours, whole step": found["training"]["ours"]["share_of_matmul_rate"]}
        shares |= {
            f"{row['cells']} cells, width {row['width']}": row["share_of_matmul_rate"] for row in found["levels"]
        }
        percent = {name: (100 * share, f"{share:.0%}") for name, share in shares.items()}
        panels[f"% of the matrix-product rate, {max(found['matmul_gflop_s']):.0f} GFLOP/s"] = percent
    title = f"{found['processor']}, threads: {found['threads']}, precision: {found['precision']}"
    return bars(panels, title=title)


def _beside_ours(seconds: dict[str, float]) -> dict[str, tuple[float, str]]:
    times = {
        name: "" if name == "ours" else f" = {value / seconds['ours']:.2f} x ours" for name, value in seconds.items()
    }
    return {name: (value, f"{value:.3g} s{times[name]}") for name, value in seconds.items()}
