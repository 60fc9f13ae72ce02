"""Fill the holes of a run's cases, in one process or shared out by case, each case once whoever is interrupted.

    python -m torch.distributed.run --nproc-per-node=N -m ldm_lib.sampling -- --run NAME

A sample depends on its case, its number and the seed alone, so that it is the same whoever draws it. What is filled
is noted in `filled/<case>.json` with the digests of what it was made from and of what was written.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_lib import cohort
from ldm_lib.cases import Case, load_case
from ldm_lib.config import SamplingConfig, validated
from ldm_lib.files import fingerprint, sha256, write_json
from ldm_lib.inpainter import Inpainter
from ldm_lib.inpainting import write_filled
from ldm_lib.launched import launched, mark_done
from ldm_lib.processes import global_rank, is_first, world_size
from ldm_lib.runs import open_stage, outputs_folder, read_record, require_done

STAGE = "05_sampling"
RECORDS = "filled"


def fill_cases(
    inpainter: Inpainter, cases: Sequence[Case], config: SamplingConfig, folder: Path, *, share: slice = slice(None)
) -> list[dict[str, Any]]:
    """Fill each case that is not filled yet, and return a row for each: case, result, spread, seconds.

    Args:
        folder: takes the results and their records.
        share: of the cases, for this process.
    """
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases[share]:
        made_from = _made_from(case, inpainter, config)
        rows.append(_found(case, folder, made_from) or _fill(case, folder, made_from, inpainter, config))
    return rows


def _found(case: Case, folder: Path, made_from: str) -> dict[str, Any] | None:
    """The row of a case that was filled from the same files, weights and settings, if its results are still whole."""
    path = _record(case, folder)
    if not path.exists():
        return None
    record = read_record(path)
    whole = all((folder / n).exists() and sha256(folder / n) == d for n, d in record["outputs"].items())
    return record["row"] if whole and record["made_from"] == made_from else None


def _fill(case: Case, folder: Path, made_from: str, inpainter: Inpainter, config: SamplingConfig) -> dict[str, Any]:
    data, started = load_case(case), time.monotonic()
    filled = inpainter.fill(
        data,
        samples=config.samples,
        seed=config.seed,
        sampler=config.sampler,
        steps=config.num_inference_steps,
        guidance=config.guidance,
    )
    written = write_filled(filled, data, folder / case.result_name, samples=True)
    seconds, spread = time.monotonic() - started, float(filled.std[data.mask].mean() / data.scale)
    row = {"case": case.key, "result": written[0].name, "spread": spread, "seconds": round(seconds, 1)}
    outputs = {path.name: sha256(path) for path in written}
    write_json(_record(case, folder), {"made_from": made_from, "outputs": outputs, "row": row})
    print(f"{case.key}: filled in {seconds:.1f} s", flush=True)
    return row


def _made_from(case: Case, inpainter: Inpainter, config: SamplingConfig) -> str:
    asked = ("samples", "seed", "sampler", "num_inference_steps", "guidance")
    weights = [net.folder_config["sha256"] for net in (inpainter.denoiser, inpainter.autoencoder)]
    files = {role: sha256(path) for role, path in case.files().items()}
    settings = {name: getattr(config, name) for name in asked} | {"precision": inpainter.precision}
    return fingerprint({"weights": weights, "files": files, "settings": settings})


def _record(case: Case, folder: Path) -> Path:
    return folder / RECORDS / f"{case.key}.json"


def fill_run(name: str) -> None:
    """Fill this process's share of the cases of stage 05, with the parameters in the run's config.json."""
    run_folder = outputs_folder() / name
    model, prepared = require_done(run_folder, "04_training") / "model", require_done(run_folder, "03_conditioning")
    config = validated(SamplingConfig, read_record(run_folder / "config.json")[STAGE] | {"run": name})
    if world_size() > 1:
        torch.distributed.init_process_group("gloo")
    if is_first():
        open_stage(STAGE, config.model_dump())
    if world_size() > 1:
        torch.distributed.barrier()  # opening may have cleared the folder
    cases = cohort.read_cohort(prepared / "cohort.json", run_folder)[1][: config.max_cases or None]
    inpainter = Inpainter.load(model, device=config.device, precision=config.precision)
    share = slice(global_rank(), None, world_size())
    fill_cases(inpainter, cases, config, run_folder / STAGE, share=share)
    if world_size() > 1:
        torch.distributed.barrier()
    if is_first():
        mark_done(run_folder / STAGE)


if __name__ == "__main__":
    sys.exit(launched(fill_run, "sampling"))
