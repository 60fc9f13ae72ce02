"""Train the denoiser on cached latents, on one device or on several.

A training may be killed or run out of disk space at any moment: the same command resumes from its last checkpoint.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import set_model_state_dict

from ldm_lib.data.augmentation import Augmentation
from ldm_lib.data.case import Case, CaseData
from ldm_lib.diffusion.latent_cache import CachedCase, LatentCache
from ldm_lib.diffusion.latents import Latents
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.errors import ConfigError, TrainingError
from ldm_lib.files import AUTOENCODER_FOLDER, fingerprint
from ldm_lib.model_io import save_model
from ldm_lib.options import names
from ldm_lib.training import checkpoints
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples
from ldm_lib.training.distributed import WHOLE, Processes
from ldm_lib.training.loop import TrainingLoop
from ldm_lib.training.options import NO_TRACKERS, SHARED_OUT, TrackerOptions, TrainingOptions
from ldm_lib.training.step import Trainer
from ldm_lib.training.trackers import trackers
from ldm_lib.training.validation import Validation

log = logging.getLogger("ldm_lib")

SPARE_COPIES = 3  # checkpoints on the disk at once: two to go on from, and the one that is being written
COPY_TENSORS = 4  # sets of weights in one: the denoiser, its average and two moments
OF_GLOBAL_BATCH = {"batch_size", "accumulate_grad_batches", "devices"}  # how a global batch comes about


def latent_cache(model: LatentDiffusion, config: TrainingOptions, run_folder: Path) -> LatentCache:
    """The encoded cases of a run, in its folder `latents`."""
    change = Augmentation(
        config.flip_probability, config.rotation_degrees, config.intensity_shift, config.tissue_deformation_mm
    )
    return LatentCache(
        run_folder / "latents",
        model.autoencoder,
        model.autoencoder.folder_config["sha256"],
        model.spec,
        device=model.device,
        precision=model.precision,
        augmentation=change,
        seed=config.seed,
    )


def encode(
    cache: LatentCache, training: Sequence[Case], validation: Sequence[Case], config: TrainingOptions
) -> tuple[list[CachedCase], list[CachedCase], list[dict[str, Any]]]:
    """Cases to train on, cases to watch, and what encoding them cost; in debug mode the watched are trained on."""
    cached = cache.encode(training, variants=1 if config.overfit_batches else config.cache_variants)
    costs = [{"cases": "training"} | cache.costs]
    if config.overfit_batches:
        return cached, cached[: config.val_cases], costs
    watched = cache.encode(validation[: config.val_cases])
    return cached, watched, costs + [{"cases": "watched"} | cache.costs]


def train(
    model: LatentDiffusion,
    variants: Mapping[str, Sequence[Latents]],
    watched: Sequence[CaseData],
    watched_latents: Sequence[Latents],
    config: TrainingOptions,
    folder: Path,
    *,
    tracking: TrackerOptions = NO_TRACKERS,
) -> Trainer:
    """Train, or resume from the newest checkpoint, and return the trainer at its end.

    Args:
        variants: key of each training case -> its encodings, in memory or read when asked for (`cache.CachedCase`).
        watched: loaded cases with a target, to validate on; their encodings in the same order.
        folder: of the stage; takes checkpoints/, samples/, panels/, metrics.csv and the trackers' files.
        tracking: experiment trackers; metrics.csv is written anyway.

    Raises:
        ConfigError: another number of processes than `devices`, while there is something left to train.
        TrainingError: a loss that is not finite, a checkpoint of another training, or one that cannot be written.
        WeightsError: each checkpoint is damaged.
        InterruptionError: it was asked to end by a signal, and has saved.
    """
    if config.overfit_batches:
        variants = dict([(k, [v[0]]) for k, v in variants.items()][: config.overfit_batches * config.batch_size])
    processes = Processes(model.device, model.precision)
    plan = BatchPlan(len(variants), config, processes.rank, config.devices)
    trainer = Trainer(model, config, plan, processes)
    validation = Validation(watched, watched_latents, config, folder)
    identity = _identity(trainer, model, list(variants), [data.case.key for data in watched])
    _resume(trainer, identity, folder / "checkpoints")
    if trainer.complete:
        log.info("already complete after %d steps", trainer.step)
        return trainer
    if processes.world != config.devices:
        (folder / SHARED_OUT).unlink(missing_ok=True)  # its checkpoints are gone, whatever was noted
        cause = f"devices = {config.devices}: {processes.world} here, after step {trainer.step} of {plan.steps}"
        fix = f"run `make train DEVICES={config.devices} RUN={folder.parent.name}`, then this again"
        raise ConfigError(cause, where="training", fix=fix)
    how = {"global_batch": plan.global_batch, "mirror": model.autoencoder.mirror}
    samples = TrainingSamples(list(variants.values()), config, model.schedule.steps, **how)
    figures = trackers(config, tracking, folder, from_step=trainer.step) if processes.rank == 0 else None
    failed = True
    try:
        TrainingLoop(trainer, samples, list(variants), validation, figures, folder, identity).run()
        failed = False
    finally:
        if figures:
            figures.close(failed=failed)
    return trainer


def _identity(trainer: Trainer, model: LatentDiffusion, cases: list[str], watched: list[str]) -> dict[str, Any]:
    """What a checkpoint belongs to; it is of no use to a training that differs in any of it."""
    settings = {name: value for name, value in trainer.config.tracked().items() if name in TrainingOptions.model_fields}
    settings = {name: value for name, value in settings.items() if name not in OF_GLOBAL_BATCH}
    settings["start_dir"] = bool(settings["start_dir"])  # no path: a checkpoint may be passed on
    return {
        "architecture": trainer.denoiser.config,
        "autoencoder": model.autoencoder.folder_config["sha256"],
        "cells": model.spec.model_dump(),
        "training cases": f"{len(cases)}, {fingerprint(cases)[:12]}",
        "watched cases": f"{len(watched)}, {fingerprint(watched)[:12]}",
        "global batch": trainer.plan.global_batch,
        "settings": settings,
    }


def _resume(trainer: Trainer, identity: Mapping[str, Any], folder: Path) -> None:
    """Take over the newest checkpoint that is whole; see that there is room for more."""
    if trainer.processes.rank == 0:
        checkpoints.remove_orphans(folder)
    trainer.processes.wait()
    if found := checkpoints.read_newest(folder):
        path, content = found
        allowed = set(names(trainer.config.allow_change))
        allowed |= {"global batch"} if allowed & OF_GLOBAL_BATCH else set()
        if told := checkpoints.differences(content["identity"], identity, allowed):
            fix = "undo the change, name it in allow_change, or set overwrite to train anew"
            raise TrainingError(f"is of another training: {'; '.join(told)}", where=path, fix=fix)
        trainer.load(content)
        trainer.processes.wait()  # until all have read
        if trainer.processes.rank == 0:
            checkpoints.remove_newer(path)
        log.info("training taken up again after step %d", trainer.step)
    if not trainer.complete:
        copy = COPY_TENSORS * sum(p.numel() * p.element_size() for p in trainer.denoiser.parameters())
        checkpoints.require_room(folder, (SPARE_COPIES - len(checkpoints.resumable(folder))) * copy)


def save_trained(trainer: Trainer, autoencoder_folder: Path, folder: Path) -> str:
    """Write the averaged denoiser and the autoencoder it belongs to as one model folder; return its sha256.

    With `keep_weights` "best" they are those of the best validation, read from the stage's checkpoints.
    """
    config, model = trainer.config, trainer.model
    if config.keep_weights == "best" and trainer.best:
        best = checkpoints.read_verified(folder.parent / "checkpoints" / trainer.best[0][1])
        set_model_state_dict(trainer.average, best["average"], options=WHOLE)
    shutil.copytree(autoencoder_folder, folder / AUTOENCODER_FOLDER, dirs_exist_ok=True)
    return save_model(
        folder,
        trainer.model.denoiser,
        schedule=config.process,
        settings=model.spec.model_dump(),
        prediction=config.prediction,
        latent_crop=model.crop,
        autoencoder_sha256=model.autoencoder.folder_config["sha256"],
        temperature=model.temperature,
        optimiser_steps=trainer.step,
    )
