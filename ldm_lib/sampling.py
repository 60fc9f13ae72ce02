"""Fill the holes of a run's cases, in one process or shared out by case, each case once whoever is interrupted.

    python -m torch.distributed.run --nproc-per-node=N -m ldm_lib.sampling -- --run NAME

A sample is the same whoever draws it, and what is filled is not filled again (`filling`).
"""

import sys

import torch

from ldm_lib import cohort
from ldm_lib.config import SamplingConfig
from ldm_lib.filling import fill_cases, require_all, require_recorded
from ldm_lib.inpainter import Inpainter
from ldm_lib.launched import launched, mark_done
from ldm_lib.parameters import validated
from ldm_lib.processes import global_rank, is_first, world_size
from ldm_lib.runs import open_stage, outputs_folder, read_record, require_done

STAGE = "05_sampling"


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
    inpainter = Inpainter.for_sampling(model, config)
    rows = fill_cases(inpainter, cases[global_rank() :: world_size()], config, run_folder / STAGE)
    if world_size() > 1:
        torch.distributed.barrier()
    require_all(rows)
    require_recorded(cases, run_folder / STAGE)
    if is_first():
        mark_done(run_folder / STAGE)


if __name__ == "__main__":
    sys.exit(launched(fill_run, "sampling"))
