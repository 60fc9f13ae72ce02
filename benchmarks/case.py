"""Measure how long one case takes, from voided to inpainted file, and in how much memory: ours and the common stack.

The common stack: MONAI's AutoencoderKL and DiffusionModelUNet in float32, 50 DDIM steps over the whole latent, the
whole volume decoded. Weights are random, of the sizes of preset `full`. Each contestant runs in a process of its own,
one after the other on the same files: the peak of memory of a process cannot be reset.

    python -m benchmarks.case '{"who": "ours", "folder": ..., "spacing_mm": 1, "changes": {}, "steps_run": 3}'
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.autoencoder import time_codec
from benchmarks.machine import peak_memory, reset_peak_memory
from benchmarks.reference_models import ddim_steps, fill_zero_layers, standard_autoencoder, standard_denoiser
from ldm_lib.autoencoder.training import build_autoencoder
from ldm_lib.data.case import Case, load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.devices import pick_device, timed
from ldm_lib.diffusion.latents import LatentSpec, input_channels
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.errors import RunError
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import TrainingConfig
from ldm_lib.files import AUTOENCODER_FOLDER
from ldm_lib.geometry import Padding
from ldm_lib.inpainting.inpainter import DEFAULT_STEPS, Inpainter
from ldm_lib.model_io import read_config, save_model
from ldm_lib.progress import report
from ldm_lib.training.initialise import build_denoiser

COMMON_STEPS, STEPS_RUN = 50, 3
PARTS = ("read_s", "encode_s", "steps_s", "decode_s", "write_s")
SPEC, FACTOR = LatentSpec(), 8
ROW = "row.json"
Row = dict[str, Any]


def bench_case(
    spacing_mm: float = 1.0,
    *,
    whole: bool = False,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Inpaint a synthetic patient by both.

    Args:
        spacing_mm: voxel size; 1 gives the challenge's grid.
        whole: run all steps of the common stack, instead of extrapolating the seconds of a few.
        changes: parameters of the denoiser that differ from preset `full`.

    Returns:
        "case", rows of both; "autoencoders", seconds and memory of encoding and decoding the whole volume; "hole", the
        size of the mask; "ratios".
    """
    with tempfile.TemporaryDirectory() as folder:
        make_synthetic_cohort(folder, 1, first=0, spacing_mm=spacing_mm, masks=1)
        request = {"folder": folder, "spacing_mm": spacing_mm, "changes": changes or {},
                 "steps_run": COMMON_STEPS if whole else STEPS_RUN}  # fmt: skip
        _save_model(Path(folder) / "model", request)
        rows = {}
        for who in CONTESTANTS:
            rows[who] = _run_in_process(request | {"who": who})
            report(f"case, {who}: " + _summary(rows[who]))
    ours, common = rows["ours"], rows["common_stack"]
    coders = {"ours": ours.pop("autoencoder"), "monai": common.pop("autoencoder")}
    coding = {name: row["encode_s"] + row["decode_s"] for name, row in coders.items()}
    ratios = {
        "encode_decode_speedup_vs_monai_fp32": coding["monai"] / coding["ours"],
        "case_speedup_vs_common_stack": common["total_s"] / ours["total_s"],
        "case_memory_reduction_vs_common_stack": common["peak_memory_gb"] / ours["peak_memory_gb"],
    }
    return {"case": rows, "autoencoders": coders, "hole": ours.pop("hole"), "ratios": ratios}


def ours(request: Row) -> Row:
    """Inpaint the case as `inpaint` does; then encode and decode the whole volume, for comparison."""
    folder, device = Path(request["folder"]), pick_device("auto")
    reset_peak_memory(device)
    load_s, inpainter = timed(lambda: Inpainter.load(folder / "model"), device)
    marks: list[float] = []
    read_s, data = timed(lambda: load_case(_case(folder)), device)
    encode_s, latents = timed(lambda: inpainter.encode(data), device)
    started = time.perf_counter()
    fill_s, filled = timed(
        lambda: inpainter(data, latents=latents, callback=lambda _: marks.append(time.perf_counter())), device
    )
    steps_s = marks[-1] - started
    write_s, _ = timed(lambda: filled.save(folder / "ours.nii.gz"), device)
    box = [s.stop - s.start for s in inpainter.model.context(latents)]
    parts = dict(zip(PARTS, (read_s, encode_s, steps_s, fill_s - steps_s, write_s), strict=True))
    row = _row(parts, load_s, device, inpainter.model.denoiser, DEFAULT_STEPS)
    litre = float(np.prod(data.source.spacing_mm)) / 1000
    size = {"ml": float(data.mask.sum()) * litre, "cells": int(latents["mask"].sum()), "box": box,
            "grid": list(latents["mask"].shape[1:])}  # fmt: skip
    row |= {"precision": inpainter.model.precision, "hole": size}
    autoencoder = inpainter.model.autoencoder
    volume = torch.rand(1, 1, *(n * FACTOR for n in size["grid"]), generator=torch.Generator().manual_seed(0))
    return row | {
        "autoencoder": time_codec(autoencoder.encode, autoencoder.decode, volume.to(device), inpainter.model.precision)
    }


def common_stack(request: Row) -> Row:
    """Inpaint the case by the common stack; the seconds of the steps that are run stand for all."""
    folder, device, run = Path(request["folder"]), pick_device("auto"), request["steps_run"]
    schedule = noise_schedule()
    reset_peak_memory(device)
    load_s, (autoencoder, denoiser) = timed(lambda: _standard_networks(request, device), device)
    case = _case(folder)
    read_s, (source, voided, mask, maps) = timed(lambda: _read_plainly(case), device)
    padding, scale = Padding.to_multiple(voided.shape, FACTOR), float(np.percentile(voided[voided > 0], 99.5))
    to_grid = [torch.from_numpy(padding.pad(array))[None, None].to(device) for array in (voided / scale, mask, *maps)]
    volume, mask_voxels, growth, tissue = to_grid
    with torch.inference_mode():
        encode_s, latent = timed(lambda: autoencoder.encode(volume)[0], device)
        latent_mask = F.max_pool3d(mask_voxels, FACTOR)
        one_hot = torch.cat([(tissue == label).float() for label in (1, 2, 3)], dim=1)
        shown = F.avg_pool3d(torch.cat([growth, one_hot], dim=1), FACTOR)
        latent, latent_mask, shown = (_whole_multiples(tensor) for tensor in (latent, latent_mask, shown))
        steps = {"steps": COMMON_STEPS, "run": range(run)}
        steps_s, filled = timed(lambda: ddim_steps(denoiser, latent, shown, latent_mask, schedule, **steps), device)
        kept = [slice(0, n // FACTOR) for n in volume.shape[2:]]
        decode_s, decoded = timed(lambda: autoencoder.decode(filled[(..., *kept)]), device)
    result = padding.crop(decoded[0, 0].cpu().numpy()) * scale
    write_s, _ = timed(lambda: _write_plainly(folder / "common.nii.gz", source, result, mask), device)
    parts = dict(zip(PARTS, (read_s, encode_s, steps_s / run * COMMON_STEPS, decode_s, write_s), strict=True))
    row = _row(parts, load_s, device, denoiser, COMMON_STEPS)
    coding = {name: row[name] for name in ("encode_s", "decode_s", "peak_memory_gb")}
    row |= {"precision": "32", "steps_run": run, "extrapolated": run < COMMON_STEPS, "autoencoder": coding}
    return row


CONTESTANTS = {"ours": ours, "common_stack": common_stack}


def _run_in_process(request: Row) -> Row:
    command = [sys.executable, "-m", "benchmarks.case", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row_file = Path(request["folder"]) / ROW
    if done.returncode or not row_file.exists():
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RunError(f"its process ended without a result ({last})", where=f"bench, {request['who']}",
                       fix="free memory: the common stack takes about 10 GB")  # fmt: skip
    row = json.loads(row_file.read_text())
    row_file.unlink()
    return row


def _row(parts: dict[str, float], load_s: float, device: torch.device, denoiser: torch.nn.Module, steps: int) -> Row:
    total, size = sum(parts.values()), sum(p.numel() for p in denoiser.parameters())
    return {"total_s": total, **parts, "load_s": load_s, "total_with_load_s": total + load_s, "steps": steps,
            "peak_memory_gb": peak_memory(device) / 1e9, "parameters": size}  # fmt: skip


def _settings(request: Row) -> TrainingConfig:
    return resolve("full", request["changes"])["04_training"]


def _save_model(folder: Path, request: Row) -> None:
    """Write a model folder as a training leaves it, its weights random in every layer."""
    config, stage = _settings(request), resolve("full")["02_autoencoder_check"]
    autoencoder = build_autoencoder(stage, spacing_mm=request["spacing_mm"]).freeze()
    save_model(folder / AUTOENCODER_FOLDER, autoencoder, box_margin=stage.box_margin)
    channels = autoencoder.latent_channels
    denoiser = build_denoiser(config, in_channels=input_channels(channels, SPEC), out_channels=channels)
    fill_zero_layers(denoiser)
    save_model(folder, denoiser, schedule=config.process, settings=SPEC.model_dump(), prediction=config.prediction,
               latent_crop=config.latent_crop,
               autoencoder_sha256=read_config(folder / AUTOENCODER_FOLDER)["sha256"])  # fmt: skip


def _standard_networks(request: Row, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    with torch.device("meta"):  # only its sizes are needed
        twin = build_denoiser(_settings(request), in_channels=input_channels(6, SPEC), out_channels=6)
    return standard_autoencoder().eval().to(device), standard_denoiser(twin).eval().to(device)


def _case(folder: Path) -> Case:
    return find_cases(folder / "data")[0]


def _read_plainly(case: Case) -> tuple[nib.Nifti1Image, np.ndarray, np.ndarray, list[np.ndarray]]:
    source = nib.load(case.t1n_voided)
    arrays = [nib.load(path).get_fdata(dtype=np.float32) for path in (case.mask, case.growth, case.tissue)]
    return source, source.get_fdata(dtype=np.float32), arrays[0], arrays[1:]


def _write_plainly(path: Path, source: nib.Nifti1Image, volume: np.ndarray, mask: np.ndarray) -> None:
    pasted = np.where(mask > 0, volume, source.get_fdata(dtype=np.float32))
    nib.save(nib.Nifti1Image(pasted, source.affine), path)


def _whole_multiples(tensor: torch.Tensor, multiple: int = 4) -> torch.Tensor:
    return F.pad(tensor, [side for size in reversed(tensor.shape[2:]) for side in (0, -size % multiple)])


def _summary(row: Row) -> str:
    parts = ", ".join(f"{name} {row[name]:.2f}" for name in ("total_s", *PARTS, "load_s", "peak_memory_gb"))
    if not row.get("extrapolated"):
        return parts
    return f"{parts}; steps_s is that of {row['steps_run']} steps times {row['steps'] / row['steps_run']:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Run one contestant, and write its row to the folder."""
    request = json.loads(arguments[0])
    row = CONTESTANTS[request["who"]](request)
    (Path(request["folder"]) / ROW).write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
