"""How fast, and in how much memory: what is ours beside what is commonly done, at full size.

Seconds depend on the machine; their ratio much less, so the ratio is what is kept and compared.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.autoencoder import bench_autoencoders
from benchmarks.case import PARTS, bench_case
from benchmarks.training import bench_training
from ldm_lib.devices import pick_device, pick_precision, processor_name
from ldm_lib.experiment.run_folder import provenance
from ldm_lib.files import write_json
from ldm_lib.plots.charts import bars
from ldm_lib.plots.slices import InlineFigure

FULL_GRID = (240, 240, 160)


def bench(
    output: Path,
    *,
    only: str | None = None,
    whole: bool = False,
    shape: Sequence[int] = FULL_GRID,
    spacing_mm: float = 1.0,
    changes: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure each part, and write what was found as JSON and as a picture beside it.

    Args:
        output: JSON file: seconds and memory of all, and under "ratios" how many times faster ours is.
        only: "case" (which codes a volume too), "autoencoder" or "training"; none measures all, each thing once.
        whole: run every step of the common stack, see `bench_case`.
        shape: voxels of autoencoder and training, divisible by 8.
        spacing_mm: voxel size of the case.
        changes: of the denoiser's parameters in `full`.
    """
    device = pick_device("auto")
    found = {"shape": list(shape), "device": str(device), "processor": processor_name(device),
             "precision": pick_precision("auto", device), "threads": torch.get_num_threads(), "ratios": {},
             "seconds": {}, "made_with": provenance()}  # fmt: skip
    if only in (None, "case"):
        _add(found, "case", partial(bench_case, spacing_mm, whole=whole, changes=changes, say=say))
    if only == "autoencoder":
        _add(found, "autoencoder", partial(bench_autoencoders, shape, say=say))
    if only in (None, "training"):
        encode_s = found["autoencoders"]["monai"]["encode_s"] if "autoencoders" in found else None
        whole_latents = {"latent_crop": 0, **(changes or {})}
        _add(found, "training", partial(bench_training, shape, encode_s=encode_s, changes=whole_latents, say=say))
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


def picture(found: dict[str, Any]) -> InlineFigure:
    """What was measured as bars: seconds, each beside ours, and how much of the machine's rate a step reaches."""
    panels = _of_the_case(found["case"]) if "case" in found else {}
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


def _of_the_case(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[float, str]]]:
    common = rows["common_stack"]
    note = f" ({common['steps_run']} of {common['steps']} steps run)" if common["extrapolated"] else ""
    panels = {
        unit: _beside_ours({"ours": rows["ours"][key], f"common stack{note}": common[key]}, sign)
        for unit, key, sign in (("a case, file to file, s", "total_s", "s"), ("its memory, GB", "peak_memory_gb", "GB"))
    }
    parts = {part.removesuffix("_s"): rows["ours"][part] for part in PARTS}
    total = sum(parts.values())
    return panels | {"where our seconds go": {k: (s, f"{s:.2g} s, {s / total:.0%}") for k, s in parts.items()}}


def _beside_ours(values: dict[str, float], unit: str = "s") -> dict[str, tuple[float, str]]:
    ours_first = sorted(values, key=lambda name: name != "ours")
    return {k: (values[k], f"{values[k]:.3g} {unit} = {values[k] / values['ours']:.2f} x ours") for k in ours_first}
