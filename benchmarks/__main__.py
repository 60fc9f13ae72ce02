"""Measure time and memory of this library at full size, compared with the common stack.

    python -m benchmarks [--only command|case|autoencoder|training] [--t1n-voided V --mask M] [--full] [--output F]

Seconds depend on the machine, and their ratio much less: so the ratios are what is kept and compared.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.autoencoder import bench_autoencoders
from benchmarks.case import bench_case
from benchmarks.command import bench_command
from benchmarks.machine import processor_name
from benchmarks.training import bench_training
from ldm_lib.devices import pick_device, pick_precision
from ldm_lib.errors import LdmError
from ldm_lib.experiment.run_folder import outputs_folder, provenance
from ldm_lib.files import write_json

FULL_GRID = (240, 240, 160)


def bench(
    output: Path,
    *,
    only: str | None = None,
    whole: bool = False,
    files: tuple[str, str] | None = None,
    shape: Sequence[int] = FULL_GRID,
    spacing_mm: float = 1.0,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure each part, and write the results as JSON.

    Args:
        output: JSON file: seconds and memory of all, and under "ratios" how many times faster this library is.
        only: "command" (`ldm inpaint` with the pretrained weights), "case" (which encodes and decodes a volume too),
            "autoencoder" or "training"; None measures all.
        whole: run every step of the common stack, see `bench_case`.
        files: voided T1n and mask that "command" inpaints; None takes a synthetic patient.
        shape: voxels of a volume for autoencoder and training, divisible by 8.
        spacing_mm: voxel size of the synthetic cases.
        changes: parameters of the denoiser that differ from preset `full`.
    """
    device = pick_device("auto")
    found = {"shape": list(shape), "device": str(device), "processor": processor_name(device),
             "precision": pick_precision("auto", device), "threads": torch.get_num_threads(), "ratios": {},
             "seconds": {}, "made_with": provenance()}  # fmt: skip
    if only in (None, "command"):
        _add(found, "command", partial(bench_command, files, spacing_mm=spacing_mm))
    if only in (None, "case"):
        _add(found, "case", partial(bench_case, spacing_mm, whole=whole, changes=changes))
    if only == "autoencoder":
        _add(found, "autoencoder", partial(bench_autoencoders, shape))
    if only in (None, "training"):
        encode_s = found["autoencoders"]["monai"]["encode_s"] if "autoencoders" in found else None
        whole_latents = {"latent_crop": 0, **(changes or {})}
        _add(found, "training", partial(bench_training, shape, encode_s=encode_s, changes=whole_latents))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, found)
    print("\n".join(f"{name} {value:.2f}" for name, value in found["ratios"].items()))
    return found


def _add(found: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Add the results of a part, and the seconds it took."""
    started = time.perf_counter()
    part = measure()
    found["seconds"][name] = time.perf_counter() - started
    found["ratios"] |= part.pop("ratios")
    found |= part


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["command", "case", "autoencoder", "training"],
                        help="measure one part alone")  # fmt: skip
    parser.add_argument("--t1n-voided", metavar="V", help="3D T1n that `ldm inpaint` is measured on (default: a "
                        "synthetic patient)")  # fmt: skip
    parser.add_argument("--mask", metavar="M", help="its mask")
    parser.add_argument("--full", action="store_true", help="run all steps of the common stack, not 3 of 50")
    parser.add_argument("--output", metavar="F", help="JSON file (default: outputs/bench/bench.json)")
    options = parser.parse_args(arguments)
    if bool(options.t1n_voided) != bool(options.mask):
        parser.error("--t1n-voided and --mask go together")
    files = (options.t1n_voided, options.mask) if options.mask else None
    output = Path(options.output) if options.output else outputs_folder() / "bench" / "bench.json"
    try:
        bench(output, only=options.only, whole=options.full, files=files)
    except LdmError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
