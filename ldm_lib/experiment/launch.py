"""Do the work of a stage in several processes, one a device, each started by torchrun.

    python -m torch.distributed.run --nproc-per-node=N -m ldm_lib.experiment.launch -- --stage 04 --run NAME

`--`, because torchrun takes `--run` for an abbreviation of one of its own options.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_lib.data.case import load_case
from ldm_lib.errors import InterruptionError, LdmError, TrainingError
from ldm_lib.experiment.path_aliases import absolute_paths
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.run_folder import SHARED_OUT, outputs_folder, read_record, require_as_made, require_done
from ldm_lib.experiment.stage import Stage, open_stage
from ldm_lib.experiment.stages import AuditConfig, SamplingConfig, TrainingConfig
from ldm_lib.files import write_json
from ldm_lib.inpainting.folder import fill_cases, require_all, require_recorded
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.options import assignments
from ldm_lib.process_control import die_with_parent
from ldm_lib.progress import report, show_progress
from ldm_lib.training.distributed import global_rank, is_first, local_rank, world_size
from ldm_lib.training.initialise import new_model
from ldm_lib.training.train import encode, latent_cache, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Do this process's part of the work on `--stage STAGE --run NAME`; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ldm_lib.experiment.launch", description=__doc__)
    parser.add_argument("--stage", required=True, choices=list(WORK), help="stage to run: 04 trains, 05 inpaints")
    parser.add_argument("--run", required=True, help="run folder in outputs/, its earlier stages done")
    parser.add_argument("--preset", help="preset of the run; without it the parameters are those of its config.json")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="other parameters of the preset"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given[1:] if given[:1] == ["--"] else given)
    if options.set and not options.preset:
        parser.error("--set needs --preset")
    work = partial(WORK[options.stage], preset=options.preset, settings=options.set)
    return run_process(work, options.run, debug=options.debug)


def run_process(work: Callable[[str], None], run: str, *, debug: bool = False) -> int:
    """Do this process's part of the work on a run, and return the exit status; only the first process prints."""
    os.umask(0o077)  # as the command line does
    if world_size() > 1:
        die_with_parent(os.getppid())
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s %(message)s", handlers=[handler])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    show_progress(is_first())
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
            work(AuditConfig.parse({"run": run}).run)
    except InterruptionError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return error.status
    except (LdmError, RuntimeError) as error:
        if debug or not (isinstance(error, LdmError) or world_size() > 1):
            raise
        if not isinstance(error, LdmError):  # torch's long text when another process has ended
            cause = f"this process cannot continue without the others ({str(error).strip().splitlines()[0][:160]})"
            fix = "see the error of the process that ended first; the same command continues"
            error = TrainingError(cause, where=f"process {local_rank()}", fix=fix)
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0


TRAINING, SAMPLING = "04_training", "05_sampling"


def _config(name: str, stage: str, preset: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a stage: those of a preset and settings, else those in the run's config.json."""
    run_folder = outputs_folder() / name
    if not preset:
        return read_record(run_folder / "config.json")[stage] | {"run": name}
    given = absolute_paths(assignments(settings))
    configs = resolve(preset, given | {"run": name})
    require_as_made(run_folder, configs, given, stage)
    return configs[stage].model_dump()


def train_run(name: str, *, preset: str | None = None, settings: Sequence[str] = ()) -> None:
    """Train stage 04 of a run; the stage's notebook finishes it afterwards."""
    run_folder = outputs_folder() / name
    require_done(run_folder, "03_conditioning")
    config = TrainingConfig.parse(_config(name, TRAINING, preset, settings) | {"devices": world_size()})
    folder = run_folder / TRAINING
    if (folder / "done.json").exists() and not (config.overwrite or config.allow_change):
        report(f"{name}/{TRAINING}: already complete")
        return
    stage = open_stage(TRAINING, config.model_dump()) if is_first() else Stage(TRAINING, config, folder, {})
    training, validation = stage.cases("03_conditioning", with_target=True)
    model = new_model(stage.previous("02_autoencoder_check") / "model", config, stage.latent_spec())
    cached, validated, _ = encode(latent_cache(model, config, run_folder), training, validation, config)
    variants = {entry.case.key: entry for entry in cached}
    cases = [load_case(entry.case) for entry in validated]
    trainer = train(model, variants, cases, [entry[0] for entry in validated], config, folder, tracking=config)
    if is_first():  # so that the notebook only checks it and finishes the stage
        write_json(folder / SHARED_OUT, {"processes": world_size()})
        report(f"{name}/{TRAINING}: trained for {trainer.step} steps; stage 04 finishes it")


def inpaint_run(name: str, *, preset: str | None = None, settings: Sequence[str] = ()) -> None:
    """Inpaint this process's part of the cases of stage 05."""
    run_folder = outputs_folder() / name
    model = require_done(run_folder, TRAINING) / "model"
    config = SamplingConfig.parse(_config(name, SAMPLING, preset, settings))
    stage = Stage(SAMPLING, config, run_folder / SAMPLING, {})
    if world_size() > 1:
        torch.distributed.init_process_group("gloo")
    if is_first():
        open_stage(SAMPLING, config.model_dump())
    if world_size() > 1:
        torch.distributed.barrier()  # starting the stage may have cleared the folder
    cases = stage.cases("03_conditioning")[1][: config.max_cases or None]
    inpainter = Inpainter.for_sampling(model, config)
    rows = fill_cases(inpainter, cases[global_rank() :: world_size()], config, stage.folder)
    if world_size() > 1:
        torch.distributed.barrier()
    require_all(rows)
    require_recorded(cases, stage.folder)
    if is_first():
        write_json(stage.folder / SHARED_OUT, {"processes": world_size()})


WORK: dict[str, Callable[..., None]] = {"04": train_run, "05": inpaint_run}

if __name__ == "__main__":
    sys.exit(main())
