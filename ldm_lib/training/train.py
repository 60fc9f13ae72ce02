"""Train the denoiser on cached latents, on one device or on several.

A training may be killed or run out of disk space at any moment: the same command resumes from its last checkpoint.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.augmentation import Augmentation
from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.cohort import with_target
from ldm_lib.diffusion.fresh_samples import FreshSamples
from ldm_lib.diffusion.latent_cache import CachedCase, LatentCache
from ldm_lib.diffusion.latents import Latents, LatentSpec
from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.errors import ConfigError, TrainingError
from ldm_lib.files import AUTOENCODER_FOLDER, fingerprint
from ldm_lib.images.volume import read_volume
from ldm_lib.model_io import load_model, without_derived
from ldm_lib.options import names
from ldm_lib.training import checkpoints
from ldm_lib.training.batch_plan import BatchPlan, TrainingSamples
from ldm_lib.training.distributed import Processes
from ldm_lib.training.initialise import new_model
from ldm_lib.training.loop import TrainingLoop
from ldm_lib.training.options import NO_TRACKERS, TrackerOptions, TrainingOptions
from ldm_lib.training.step import Trainer
from ldm_lib.training.trackers import trackers
from ldm_lib.training.validation import Validation

log = logging.getLogger("ldm_lib")

COPY_TENSORS = 4  # sets of weights in a checkpoint: the denoiser, its average and two moments
OF_GLOBAL_BATCH = {"batch_size", "accumulate_grad_batches", "devices"}  # options that a global batch is a product of


def train_denoiser(
    model: LatentDiffusion | Autoencoder,
    cases: Sequence[Case],
    options: TrainingOptions | None = None,
    *,
    folder: str | Path,
    validation_cases: Sequence[Case] = (),
    spec: LatentSpec | None = None,
) -> LatentDiffusion:
    """Train a denoiser in the latent space of an autoencoder; an interrupted training resumes from its folder.

    Args:
        model: a trained autoencoder, for a denoiser from random weights; or a model whose training continues.
        cases: training cases, with a target.
        options: architecture and training, see `help(ldm.TrainingOptions)`; the defaults suit a first trial.
        folder: takes latents/, autoencoder/, checkpoints/, metrics.csv and the validation's samples/ and panels/.
        validation_cases: cases with a target, of other patients; the first `val_cases` are scored.
        spec: how cases become latents and conditioning; that of the model, or the default one.

    Returns:
        The model with the averaged (EMA) weights; `save` writes it.

    Raises:
        ConfigError: the architecture of a given model differs from the options.
        InputError: no case with a target.
        TrainingError: a loss that is not finite, or a checkpoint of another training in the folder.

    Examples:
        >>> import ldm_lib as ldm
        >>> patients = ldm.make_synthetic_cohort(folder, n_patients=2, spacing_mm=8, masks=1)
        >>> cases = ldm.find_cases(folder / "data")
        >>> autoencoder = ldm.Autoencoder.load(model)
        >>> network = {"base_width": 8, "multipliers": "1", "attention_rates": "1"}
        >>> options = ldm.TrainingOptions(**network, max_epochs=1, device="cpu")
        >>> trained = ldm.train_denoiser(autoencoder, cases, options, folder=folder / "training")
        >>> trained.prediction, trained.spec.context
        ('velocity', 'composite')
        >>> digest = trained.save(folder / "model")
    """
    options, folder, cases = options or TrainingOptions(), Path(folder), with_target(cases)
    if shared := {case.patient for case in cases} & {case.patient for case in validation_cases}:
        raise ConfigError(f"patients {', '.join(sorted(shared)[:3])} are among both training and validation cases",
                          where="train_denoiser", fix="split the cases by patient")  # fmt: skip
    given = model if isinstance(model, Autoencoder) else model.autoencoder
    given.save(folder / AUTOENCODER_FOLDER, **without_derived(getattr(given, "folder_config", {})))
    autoencoder = load_model(folder / AUTOENCODER_FOLDER, Autoencoder)
    start = replace(model, autoencoder=autoencoder) if isinstance(model, LatentDiffusion) else None
    initial = new_model(autoencoder, options, spec or (start.spec if start else LatentSpec()), start=start)
    cache = latent_cache(initial, options, folder)
    cached, validation, _ = encode(cache, cases, validation_cases, options)
    variants = {entry.case.key: entry for entry in cached}
    loaded, latents = [load_case(entry.case) for entry in validation], [entry[0] for entry in validation]
    return trained_model(train(initial, variants, loaded, latents, options, folder), folder)


def latent_cache(model: LatentDiffusion, config: TrainingOptions, run_folder: Path) -> LatentCache:
    """Return the cache of encoded cases in the folder `latents` of a run."""
    shifts = config.intensity_shift, config.tissue_deformation_mm
    augmentation = Augmentation(config.flip_probability, config.rotation_degrees, *shifts)
    return LatentCache(
        run_folder / "latents", model.autoencoder, model.autoencoder.folder_config["sha256"], model.spec,
        device=model.device, precision=model.precision, augmentation=augmentation, seed=config.seed,
    )  # fmt: skip


def encode(
    cache: LatentCache, training: Sequence[Case], validation: Sequence[Case], config: TrainingOptions
) -> tuple[list[CachedCase] | list[FreshSamples], list[CachedCase], list[dict[str, Any]]]:
    """Encode training and validation cases, and add a row of costs for each of the two.

    With `overfit_batches` training cases are validated. Without any `cache_variants` training samples are drawn when
    they are needed, and only validation cases are encoded.
    """
    crop = config.latent_crop if config.fresh_samples else 0
    if not config.cache_variants:
        drawn = cache.sources(training, crop)
        return drawn, cache.encode(validation[: config.val_cases]), [{"cases": "validation"} | cache.costs]
    variants = 1 if config.overfit_batches else config.cache_variants
    cached = cache.encode(training, variants=variants, fresh_crop=crop, workers=config.num_workers)
    costs = [{"cases": "training"} | cache.costs]
    if config.overfit_batches or not validation:
        return cached, cached[: config.val_cases] if config.overfit_batches else [], costs
    validated = cache.encode(validation[: config.val_cases])
    return cached, validated, costs + [{"cases": "validation"} | cache.costs]


def train(
    model: LatentDiffusion,
    variants: Mapping[str, Sequence[Latents]],
    validation: Sequence[CaseData],
    validation_latents: Sequence[Latents],
    config: TrainingOptions,
    folder: Path,
    *,
    tracking: TrackerOptions = NO_TRACKERS,
) -> Trainer:
    """Train, or resume from the newest checkpoint, and return the trainer at its end.

    Args:
        variants: the encodings of each training case by its key, in memory or read when needed (`CachedCase`).
        validation: loaded validation cases with a target; their encodings in the same order.
        folder: of the stage; takes checkpoints/, samples/, panels/, metrics.csv and the trackers' files.

    Raises:
        ConfigError: another number of processes than `devices`, while there is something left to train.
        TrainingError: a loss that is not finite, no memory left, a checkpoint of another training, or a full disk.
        WeightsError: each checkpoint is damaged.
        InterruptionError: a signal requested the end; the state is saved.
    """
    if config.overfit_batches:
        variants = dict([(k, [v[0]]) for k, v in variants.items()][: config.overfit_batches * config.batch_size])
    processes = Processes(model.device, model.precision)
    trainer = Trainer(model, config, BatchPlan(len(variants), config, processes.rank, config.devices), processes)
    identity = _identity(trainer, model, list(variants), [data.case.key for data in validation])
    _resume(trainer, identity, folder / "checkpoints")
    if trainer.complete:
        log.info("already complete after %d steps", trainer.step)
        return trainer
    if processes.world != config.devices:
        cause = f"devices = {config.devices}: {processes.world} here, after step {trainer.step} of {trainer.plan.steps}"
        fix = f"run `ldm run 04 --run {folder.parent.name} --set devices={config.devices}`"
        raise ConfigError(cause, where="training", fix=fix)
    samples = TrainingSamples(list(variants.values()), config, model.schedule.steps,
                              global_batch=trainer.plan.global_batch,
                              early_steps=trainer.plan.early_steps, mirror=model.autoencoder.mirror)  # fmt: skip
    scored = Validation(validation, validation_latents, config, folder)
    tracked = trackers(config, tracking, folder, from_step=trainer.step) if processes.rank == 0 else None
    failed = True
    try:
        TrainingLoop(trainer, samples, list(variants), scored, tracked, folder, identity).run()
        failed = False
    finally:
        if tracked:
            tracked.close(failed=failed)
    return trainer


def _identity(
    trainer: Trainer, model: LatentDiffusion, cases: list[str], validation_cases: list[str]
) -> dict[str, Any]:
    """Describe the training that a checkpoint belongs to; a training that differs in any of it cannot use it."""
    known = set(TrainingOptions.model_fields) - OF_GLOBAL_BATCH
    settings = {name: value for name, value in trainer.config.tracked().items() if name in known}
    settings["start_dir"] = bool(settings["start_dir"])  # no path: a checkpoint may be passed on
    return {
        "architecture": trainer.denoiser.config,
        "autoencoder": model.autoencoder.folder_config["sha256"],
        "latents": model.spec.model_dump(),
        "training cases": f"{len(cases)}, {fingerprint(cases)[:12]}",
        "validation cases": f"{len(validation_cases)}, {fingerprint(validation_cases)[:12]}",
        "global batch": trainer.plan.global_batch,
        "settings": settings,
    }


def _resume(trainer: Trainer, identity: Mapping[str, Any], folder: Path) -> None:
    """Restore the newest checkpoint that verifies, and require free space for the next ones."""
    if trainer.processes.rank == 0:
        for partial in folder.glob(".*.part"):  # of a process that was killed
            partial.unlink()
    trainer.processes.fabric.barrier()
    if found := checkpoints.read_newest(folder):
        path, content = found
        allowed = set(names(trainer.config.allow_change))
        allowed |= {"global batch"} if allowed & OF_GLOBAL_BATCH else set()
        if changes := checkpoints.differences(content["identity"], identity, allowed):
            fix = "undo the change, name it in allow_change, or set overwrite to train from the start"
            raise TrainingError(f"is of another training: {'; '.join(changes)}", where=path, fix=fix)
        trainer.load(content)
        trainer.processes.fabric.barrier()  # until all have read
        if trainer.processes.rank == 0:
            checkpoints.remove_newer(path)
        log.info("training resumed after step %d", trainer.step)
    if not trainer.complete:
        copy = COPY_TENSORS * sum(p.numel() * p.element_size() for p in trainer.denoiser.parameters())
        checkpoints.require_room(folder, (checkpoints.KEPT + 1 - len(checkpoints.resumable(folder))) * copy)


def trained_model(trainer: Trainer, folder: Path) -> LatentDiffusion:
    """Return the model with the averaged weights that `keep_weights` names: the last, or the best in checkpoints/."""
    if trainer.config.keep_weights == "best" and trainer.best:
        best = checkpoints.read_verified(folder / "checkpoints" / trainer.best[0][1])
        trainer.average.load_state_dict(best["average"])
    return trainer.model


def save_trained(trainer: Trainer, autoencoder_folder: Path, folder: Path) -> str:
    """Write the trained model and its autoencoder as one model folder in that of the stage; return its sha256."""
    model = trained_model(trainer, folder.parent)
    return model.save(folder, autoencoder_folder=autoencoder_folder, optimiser_steps=trainer.step)


def read_samples(folder: Path, data: CaseData) -> dict[str, np.ndarray]:
    """Read the samples of a validation case that a training wrote: "epoch 010" -> (x, y, z) in the file's order."""
    paths = sorted((folder / "samples").glob(f"*/{data.case.id}_{data.case.index or 'mask'}_inpainted.nii.gz"))
    return {path.parent.name.replace("_", " "): read_volume(path).voxels for path in paths}


def verify_last_checkpoint(folder: Path) -> tuple[bool, str]:
    """Read the newest checkpoint of a training back; return whether it is intact, and its name."""
    newest = checkpoints.resumable(folder / "checkpoints")[0]
    return bool(checkpoints.read_verified(newest)), newest.name
