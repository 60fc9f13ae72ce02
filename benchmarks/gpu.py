"""Measure on a GPU, in one run of less than 8 minutes: cases, training steps, memory, bf16, torch.compile, CUDA graphs.

    python -m benchmarks.gpu [--tiny] [--output F]

Every part is printed and written as soon as it is measured, so that a run that is stopped keeps what it has.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import bench_case
from benchmarks.machine import peak_memory, processor_name, reset_peak_memory
from benchmarks.reference_models import fill_zero_layers
from benchmarks.training import training_batches, untrained_model
from ldm_lib.anatomy.registration import Registration, register
from ldm_lib.data.case import CaseData, load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.devices import DTYPES, autocast, pick_device, pick_precision, probe_bf16, timed
from ldm_lib.diffusion.latents import LatentSpec, input_channels
from ldm_lib.diffusion.unet import ADM, count_flops
from ldm_lib.diffusion.unet_blocks import ResidualBlock
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.run_folder import outputs_folder, provenance
from ldm_lib.files import write_json
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.tissue_maps import CACHE_VARIABLE
from ldm_lib.progress import report
from ldm_lib.training.batch_plan import BatchPlan
from ldm_lib.training.distributed import Processes
from ldm_lib.training.initialise import build_denoiser
from ldm_lib.training.step import Trainer

REPEATS = {"cpu": (0, 1), "cuda": (3, 10)}  # calls that warm up, and calls of which the fastest counts
SPEC, CHANNELS = LatentSpec(), 6


@dataclass(frozen=True)
class Size:
    """Hold how large everything is that is measured."""

    grid: tuple[int, int, int] = (30, 30, 20)  # latent voxels of a whole BraTS volume
    spacing_mm: float = 1.0  # of the synthetic case
    matrix: int = 8192  # edge of the matrices whose product is the yardstick
    most: int = 64  # largest batch that is tried
    changes: tuple[tuple[str, Any], ...] = ()  # parameters that differ from preset `full`
    compiled: bool = True


FULL = Size()
TINY = Size((4, 4, 3), 8.0, 256, 2, (("base_width", 32), ("blocks_per_level", 1)), compiled=False)


def bench_gpu(output: Path, size: Size = FULL) -> dict[str, Any]:
    """Measure each part, and write all that there is after each.

    Returns:
        "device", "made_with", and what the functions of `PARTS` return under their names, with "seconds" of each; a
        part that failed, for lack of memory say, has "failed".
    """
    device = pick_device("auto")
    found = {"device": processor_name(device), "precision": pick_precision("auto", device), "seconds": {},
             "made_with": provenance()}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in PARTS.items():
        started = time.perf_counter()
        try:
            found[name] = measure(size, device)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other parts are worth having
            found[name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        found["seconds"][name] = time.perf_counter() - started
        write_json(output, found)
        report(f"{name}: {found[name]}")
    _add_shares(found)
    write_json(output, found)
    return found


def _add_shares(found: dict[str, Any]) -> None:
    """Add to each rate its share of that of a matrix product in the same precision."""
    best = found["matrix_product_tflops"].get(found["precision"])
    rows = [row for name in ("training_step", "levels") for row in found.get(name, []) if isinstance(row, dict)]
    for row in rows if best else []:
        row["share"] = row["tflops"] / best
    report(", ".join(f"{row.get('width', row.get('batch_size'))}: {row.get('share', 0):.0%}" for row in rows))


def matrix_product(size: Size, device: torch.device) -> dict[str, float]:
    """Return the TFLOP/s of square matrix products by precision: what the processor reaches at best."""
    rates = {}
    for precision in ("32", "bf16"):
        a, b = (torch.randn(size.matrix, size.matrix, device=device, dtype=DTYPES[precision]) for _ in range(2))
        rates[precision] = 2 * size.matrix**3 / _fastest(lambda a=a, b=b: a @ b, device) / 1e12
    return rates


def full_size_case(size: Size, device: torch.device) -> dict[str, Any]:  # noqa: ARG001
    """Return `benchmarks.case.bench_case`: a case of preset `full`, and the common stack."""
    found = bench_case(size.spacing_mm, changes=dict(size.changes))
    return {"case": found["case"], "ratios": found["ratios"]}


def pretrained_case(size: Size, device: torch.device) -> dict[str, Any]:
    """Return the seconds of a case with the pretrained weights in a process that has loaded them: first, and again."""
    inpainter = Inpainter.load(device=device.type)
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {CACHE_VARIABLE: folder}):
        make_synthetic_cohort(folder, 1, first=0, spacing_mm=size.spacing_mm, masks=1)
        case = find_cases(Path(folder) / "data")[0].to_inpaint()
        case = case.with_maps(tissue=None, growth=None)  # so that its tissue map is made from the scan
        rows: dict[str, Any] = {}
        for name in ("first", "again"):
            reset_peak_memory(device)
            seconds, data = timed(lambda: load_case(case), device)
            parts = {"read_s": seconds, "register_s": timed(lambda data=data: _registered(data, device), device)[0]}
            parts |= {"map_s": timed(lambda data=data: inpainter.prepare(data), device)[0]}
            encode_s, latents = timed(lambda data=data: inpainter.encode(data), device)
            sample_s, filled = timed(lambda data=data, z=latents: inpainter(data, latents=z), device)
            write_s, _ = timed(lambda filled=filled: filled.save(Path(folder) / "filled.nii.gz"), device)
            parts |= {"encode_s": encode_s, "sample_s": sample_s, "write_s": write_s}
            rows[name] = parts | {"total_s": sum(parts.values()), "peak_memory_gb": peak_memory(device) / 1e9}
    return rows


def _registered(data: CaseData, device: torch.device) -> Registration:
    return register(data.voided / data.scale, data.affine, data.mask, device=device)


def training_step(size: Size, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for batches of 2, 4, 8 and so on, as far as the memory goes: seconds, memory, rate."""
    rows, batch_size = [], 2
    while batch_size <= size.most:
        try:
            rows.append(_training_row(size, device, batch_size))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        batch_size *= 2
    return rows


def _training_row(size: Size, device: torch.device, batch_size: int) -> dict[str, Any]:
    reset_peak_memory(device)
    config = resolve("full", {"latent_crop": 0, "batch_size": batch_size, **dict(size.changes)})["04_training"]
    model = untrained_model(config, device, pick_precision("auto", device))
    model.denoiser.to(device)
    batch = training_batches(size.grid, config, model, cases=batch_size)[0]
    trainer = Trainer(model, config, BatchPlan(batch_size, config), Processes(device, model.precision))
    seconds = _fastest(lambda: trainer.advance([batch]), device)
    flops = 3 * batch_size * count_flops(trainer.denoiser, size.grid)  # a backward pass takes twice a forward pass
    return {"batch_size": batch_size, "s": seconds, "cases_a_second": batch_size / seconds,
            "tflops": flops / seconds / 1e12, "peak_memory_gb": peak_memory(device) / 1e9}  # fmt: skip


def levels(size: Size, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for a residual block of each level, forward and backward at batch 2: TFLOP/s in "auto" precision."""
    config = resolve("full", dict(size.changes))["04_training"]
    precision, rows = pick_precision("auto", device), []
    for level, multiplier in enumerate((1, 2, 4)):
        width, grid = config.base_width * multiplier, [max(1, -(-n // 2**level)) for n in size.grid]
        block = ResidualBlock(width, width, embedding=4 * config.base_width).to(device)
        x = torch.randn(2, width, *grid, device=device, requires_grad=True)
        embedding = torch.randn(2, 4 * config.base_width, device=device)

        def both(block: nn.Module = block, x: Tensor = x, embedding: Tensor = embedding) -> None:
            with autocast(device, precision):
                block(x, embedding).float().square().mean().backward()

        with FlopCounterMode(display=False) as counter:
            both()
        seconds = _fastest(both, device)
        rows.append({"level": level, "width": width, "grid": grid, "s": seconds,
                     "tflops": counter.get_total_flops() / seconds / 1e12})  # fmt: skip
    return rows


def bf16(size: Size, device: torch.device) -> dict[str, float]:
    """Compare a forward pass of the denoiser in bf16 with one in float32; and `probe_bf16`."""
    denoiser, x, t = _denoiser(size, device)
    passes, seconds = {}, {}
    with torch.inference_mode():
        for precision in ("32", "bf16"):
            with autocast(device, precision):
                seconds[precision] = _fastest(lambda: denoiser(x, t), device)
                passes[precision] = denoiser(x, t).float()
    error = (passes["bf16"] - passes["32"]).square().mean().sqrt() / passes["32"].square().mean().sqrt()
    gradient_error, speed = probe_bf16(device)
    return {"forward_32_s": seconds["32"], "forward_bf16_s": seconds["bf16"], "forward_error": float(error),
            "gradient_error": gradient_error, "gradient_speed": speed}  # fmt: skip


def compiled(size: Size, device: torch.device) -> dict[str, float]:
    """Return the seconds of a forward pass as it is, compiled, and compiled with CUDA graphs; and of compiling."""
    denoiser, x, t = _denoiser(size, device)
    modes: dict[str, str | None] = {"eager": None}
    if size.compiled:
        modes |= {"compiled": "default"} | ({"cuda_graphs": "reduce-overhead"} if device.type == "cuda" else {})
    seconds = {}
    for name, mode in modes.items():
        run = torch.compile(denoiser, mode=mode) if mode else denoiser
        with torch.inference_mode(), autocast(device, pick_precision("auto", device)):
            seconds[f"{name}_first_s"] = timed(lambda run=run: run(x, t), device)[0]
            seconds[f"{name}_s"] = _fastest(lambda run=run: run(x, t), device)
    return seconds


PARTS: dict[str, Callable[[Size, torch.device], Any]] = {
    "matrix_product_tflops": matrix_product,
    "full_size_case": full_size_case,
    "pretrained_case": pretrained_case,
    "training_step": training_step,
    "levels": levels,
    "bf16": bf16,
    "compiled": compiled,
}


def _denoiser(size: Size, device: torch.device) -> tuple[ADM, Tensor, Tensor]:
    """Return the denoiser of preset `full` with random weights in every layer, and an input of batch 1."""
    config = resolve("full", dict(size.changes))["04_training"]
    denoiser = build_denoiser(config, in_channels=input_channels(CHANNELS, SPEC), out_channels=CHANNELS)
    fill_zero_layers(denoiser)
    x = torch.randn(1, denoiser.config["in_channels"], *size.grid)
    return denoiser.eval().to(device), x.to(device), torch.zeros(1, dtype=torch.long, device=device)


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds of some calls, after those that warm up."""
    warm_ups, repeats = REPEATS[device.type]
    for _ in range(warm_ups):
        call()
    return min(timed(call, device)[0] for _ in range(repeats))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="F", help="JSON file (default: outputs/bench/gpu.json)")
    parser.add_argument("--tiny", action="store_true", help="measure at the size of a test, on any machine")
    options = parser.parse_args(arguments)
    output = Path(options.output) if options.output else outputs_folder() / "bench" / "gpu.json"
    found = bench_gpu(output, TINY if options.tiny else FULL)
    return int(any("failed" in found[name] for name in PARTS))


if __name__ == "__main__":
    sys.exit(main())
