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
Coder = Callable[[Tensor], Tensor]


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
        only: "autoencoder" or "training"; none measures both.
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
    own = build_autoencoder(resolve("full")["02_autoencoder_check"], spacing_mm=1.0).freeze().to(device)
    standard = standard_autoencoder().eval().to(device)
    rows = {
        "ours": _coded(own.encode, own.decode, volume, pick_precision("auto", device)),
        "monai": _coded(lambda given: standard.encode(given)[0], standard.decode, volume, "32"),
    }
    for name, row in rows.items():
        say(f"autoencoders, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    ours, theirs = (row["encode_s"] + row["decode_s"] for row in rows.values())
    return {"autoencoders": rows, "ratios": {"encode_decode_speedup_vs_monai_fp32": theirs / ours}}


def _coded(encode: Coder, decode: Coder, volume: Tensor, precision: str) -> dict[str, float]:
    """Seconds of encoding and decoding, and the peak of memory so far (resident on a CPU, allocated on a GPU)."""
    device = volume.device
    forget_peak(device)
    with torch.inference_mode(), autocast(device, precision):
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
    return bars(panels, title=f"{found['processor']}, {found['threads']} threads, precision {found['precision']}")


def _beside_ours(seconds: dict[str, float]) -> dict[str, tuple[float, str]]:
    ours_first = sorted(seconds, key=lambda name: name != "ours")
    return {k: (seconds[k], f"{seconds[k]:.3g} s = {seconds[k] / seconds['ours']:.2f} x ours") for k in ours_first}
