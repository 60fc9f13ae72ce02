"""Train the denoiser on cached latents, on one device or on many, for a week if need be.

    python -m torch.distributed.run --nproc-per-node=N -m ldm_lib.training -- --run NAME

(`--`, because torchrun takes `--run` for an abbreviation of an option of its own.)

A training may be killed or run out of disk at any moment: the same command goes on from its last checkpoint.
"""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import set_model_state_dict

from ldm_lib import checkpoints, cohort
from ldm_lib.augmentation import Augmentation
from ldm_lib.batches import Plan, TrainingSamples
from ldm_lib.cache import CachedCase, LatentCache
from ldm_lib.cases import Case, CaseData, load_case
from ldm_lib.config import AUTOENCODER_FOLDER, TrainingConfig
from ldm_lib.denoising import new_inpainter
from ldm_lib.errors import ConfigError, TrainingError
from ldm_lib.files import fingerprint
from ldm_lib.fit import Fit
from ldm_lib.inpainter import Inpainter
from ldm_lib.latents import CellSettings, Latents
from ldm_lib.launched import launched, mark_done
from ldm_lib.learner import Learner
from ldm_lib.parameters import validated
from ldm_lib.processes import WHOLE, Processes, is_first, world_size
from ldm_lib.runs import SHARED_OUT, open_stage, outputs_folder, read_record, require_done, tracked
from ldm_lib.tracking import trackers
from ldm_lib.validation import Validation
from ldm_lib.values import names
from ldm_lib.weights import save_model

log = logging.getLogger("ldm_lib")

STAGE = "04_training"
SPARE_COPIES = 3  # checkpoints on the disk at once: two to go on from, and the one that is being written
COPY_TENSORS = 4  # sets of weights in one: the denoiser, its average and two moments
OF_GLOBAL_BATCH = {"batch_size", "accumulate_grad_batches", "devices", "strategy"}  # how a global batch comes about


def latent_cache(inpainter: Inpainter, config: TrainingConfig, run_folder: Path) -> LatentCache:
    """The encoded cases of a run, in its folder `latents`."""
    change = Augmentation(
        config.flip_probability, config.rotation_degrees, config.intensity_shift, config.tissue_deformation_mm
    )
    return LatentCache(
        run_folder / "latents",
        inpainter.autoencoder,
        inpainter.autoencoder.folder_config["sha256"],
        inpainter.settings,
        device=inpainter.device,
        precision=inpainter.precision,
        augmentation=change,
        seed=config.seed,
    )


def encode(
    cache: LatentCache, training: Sequence[Case], validation: Sequence[Case], config: TrainingConfig
) -> tuple[list[CachedCase], list[CachedCase], list[dict[str, Any]]]:
    """Cases to train on, cases to watch, and what encoding them cost; in debug mode the watched are trained on."""
    cached = cache.fill(training, variants=1 if config.overfit_batches else config.cache_variants)
    costs = [{"cases": "training"} | cache.costs]
    if config.overfit_batches:
        return cached, cached[: config.val_cases], costs
    watched = cache.fill(validation[: config.val_cases])
    return cached, watched, costs + [{"cases": "watched"} | cache.costs]


def train(
    inpainter: Inpainter,
    variants: Mapping[str, Sequence[Latents]],
    watched: Sequence[CaseData],
    watched_latents: Sequence[Latents],
    config: TrainingConfig,
    folder: Path,
) -> Learner:
    """Train, or go on from the newest checkpoint, and return the learner at its end.

    Args:
        variants: key of each training case -> its encodings, in memory or read when asked for (`cache.CachedCase`).
        watched: loaded cases with a target, to validate on; their encodings in the same order.
        folder: of the stage; takes checkpoints/, samples/, panels/, metrics.csv and the trackers' files.

    Raises:
        ConfigError: another number of processes than `devices`, while there is something left to train.
        TrainingError: a loss that is not finite, a checkpoint of another training, or one that cannot be written.
        WeightsError: each checkpoint is damaged.
        InterruptionError: it was asked to end by a signal, and has saved.
    """
    if config.overfit_batches:
        variants = dict([(k, [v[0]]) for k, v in variants.items()][: config.overfit_batches * config.batch_size])
    processes = Processes(inpainter.device, inpainter.precision, config.strategy)
    plan = Plan(len(variants), config, processes.rank, config.devices)
    learner = Learner(inpainter, config, plan, processes)
    validation = Validation(watched, watched_latents, config, folder)
    identity = _identity(learner, inpainter, list(variants), [data.case.key for data in watched])
    _resume(learner, identity, folder / "checkpoints")
    if learner.complete:
        log.info("already complete after %d steps", learner.step)
        return learner
    if processes.world != config.devices:
        (folder / SHARED_OUT).unlink(missing_ok=True)  # its checkpoints are gone, whatever was noted
        cause = f"devices = {config.devices}: {processes.world} here, after step {learner.step} of {plan.steps}"
        fix = f"run `make train DEVICES={config.devices} RUN={config.run}`, then this again"
        raise ConfigError(cause, where="training", fix=fix)
    how = {"global_batch": plan.global_batch, "mirror": inpainter.autoencoder.mirror}
    samples = TrainingSamples(list(variants.values()), config, inpainter.schedule.steps, **how)
    figures = trackers(config, folder, from_step=learner.step) if processes.rank == 0 else None
    failed = True
    try:
        Fit(learner, samples, list(variants), validation, figures, folder, identity).run()
        failed = False
    finally:
        if figures:
            figures.close(failed=failed)
    return learner


def _identity(learner: Learner, inpainter: Inpainter, cases: list[str], watched: list[str]) -> dict[str, Any]:
    """What a checkpoint belongs to; it is of no use to a training that differs in any of it."""
    settings = {name: value for name, value in tracked(learner.config).items() if name not in OF_GLOBAL_BATCH}
    return {
        "architecture": learner.denoiser.config,
        "autoencoder": inpainter.autoencoder.folder_config["sha256"],
        "cells": asdict(inpainter.settings),
        "training cases": f"{len(cases)}, {fingerprint(cases)[:12]}",
        "watched cases": f"{len(watched)}, {fingerprint(watched)[:12]}",
        "global batch": learner.plan.global_batch,
        "settings": settings,
    }


def _resume(learner: Learner, identity: Mapping[str, Any], folder: Path) -> None:
    """Take over the newest checkpoint that is whole; see that there is room for more."""
    if learner.processes.rank == 0:
        checkpoints.remove_orphans(folder)
    learner.processes.wait()
    if found := checkpoints.read_newest(folder):
        path, content = found
        allowed = set(names(learner.config.allow_change))
        allowed |= {"global batch"} if allowed & OF_GLOBAL_BATCH else set()
        if told := checkpoints.differences(content["identity"], identity, allowed):
            fix = "undo the change, name it in allow_change, or set overwrite to train anew"
            raise TrainingError(f"is of another training: {'; '.join(told)}", where=path, fix=fix)
        learner.load(content)
        learner.processes.wait()  # until all have read
        if learner.processes.rank == 0:
            checkpoints.remove_newer(path)
        log.info("training taken up again after step %d", learner.step)
    if not learner.complete:
        copy = COPY_TENSORS * sum(p.numel() * p.element_size() for p in learner.denoiser.parameters())
        checkpoints.require_room(folder, (SPARE_COPIES - len(checkpoints.resumable(folder))) * copy)


def save_trained(learner: Learner, autoencoder_folder: Path, folder: Path) -> str:
    """Write the averaged denoiser and the autoencoder it belongs to as one model folder; return its sha256.

    With `keep_weights` "best" they are those of the best validation, read from the stage's checkpoints.
    """
    config, inpainter = learner.config, learner.inpainter
    if config.keep_weights == "best" and learner.best:
        best = checkpoints.read_verified(folder.parent / "checkpoints" / learner.best[0][1])
        set_model_state_dict(learner.average, best["average"], options=WHOLE)
    shutil.copytree(autoencoder_folder, folder / AUTOENCODER_FOLDER, dirs_exist_ok=True)
    return save_model(
        folder,
        learner.inpainter.denoiser,
        schedule=config.process,
        settings=asdict(inpainter.settings),
        prediction=config.prediction,
        latent_crop=inpainter.crop,
        autoencoder_sha256=inpainter.autoencoder.folder_config["sha256"],
        temperature=inpainter.temperature,
        optimiser_steps=learner.step,
    )


def train_run(name: str) -> None:
    """Train stage 04 of a run, with the parameters in its config.json; the stage's notebook closes it afterwards."""
    run_folder = outputs_folder() / name
    for stage in ("01_data_audit", "02_autoencoder_check", "03_conditioning"):
        require_done(run_folder, stage)
    values = read_record(run_folder / "config.json")[STAGE]
    config = validated(TrainingConfig, values | {"run": name, "devices": world_size()})
    folder = run_folder / STAGE
    if (folder / "done.json").exists() and not (config.overwrite or config.allow_change):
        print(f"{name}/{STAGE}: already complete")
        return
    if is_first():
        open_stage(STAGE, config.model_dump())
    prepared, autoencoder = run_folder / "03_conditioning", run_folder / "02_autoencoder_check" / "model"
    settings = CellSettings(**read_record(prepared / "settings.json"))
    training, validation = map(cohort.with_target, cohort.read_cohort(prepared / "cohort.json", run_folder))
    inpainter = new_inpainter(autoencoder, config, settings)
    cached, watched, _ = encode(latent_cache(inpainter, config, run_folder), training, validation, config)
    variants = {entry.case.key: entry for entry in cached}
    learner = train(inpainter, variants, [load_case(w.case) for w in watched], [w[0] for w in watched], config, folder)
    if is_first():
        mark_done(folder)
    print(f"{name}/{STAGE}: trained for {learner.step} steps; stage 04 closes it", flush=True)


if __name__ == "__main__":
    sys.exit(launched(train_run, "training"))
