"""Options of the denoiser's training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ldm_lib.data.options import AugmentationOptions
from ldm_lib.diffusion.options import DenoiserOptions, ScheduleOptions
from ldm_lib.files import PRETRAINED
from ldm_lib.options import (
    Count,
    DeviceOptions,
    Devices,
    Fraction,
    Options,
    Positive,
    SeedOptions,
    Workers,
    names,
)


class TrainerOptions(DeviceOptions, SeedOptions):
    """Describe the optimisation: batches, learning rate, length, weights to start from."""

    heading = "Optimisation"
    untracked = frozenset({"num_workers", "checkpoint_every", "log_every", "allow_change"})
    batch_size: Positive = Field(2, description="samples per device and step")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="largest learning rate of AdamW, after the warm-up")
    learning_rate_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="learning rate after the warm-up: constant, or a cosine down to 0"
    )
    max_epochs: Positive = Field(40, description="epochs (passes over the training samples)")
    warmup_steps: Count = Field(50, description="optimiser steps of linear warm-up")
    accumulate_grad_batches: Positive = Field(1, description="batches per optimiser step")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="decay of the exponential moving average of the weights")
    keep_weights: Literal["last", "best"] = Field("last", description="EMA weights to keep: last, or best val_loss")
    pretrained: bool = Field(False, description="start from the pretrained weights of the package")
    start_dir: str = Field("", description="model folder to start from; without either, training starts at random")
    devices: Devices = Field(1, description="number of devices; a notebook uses one, `ldm run` several")
    num_workers: Workers = Field(
        0, description="processes that encode training cases and load samples; cached latents need none to load"
    )
    compile: bool = Field(False, description="torch.compile of the denoiser; pays in long trainings")
    overfit_batches: Count = Field(0, description="debugging: number of fixed batches to overfit; 0 is off")
    checkpoint_every: Positive = Field(100, description="optimiser steps between checkpoints")
    log_every: Positive = Field(10, description="optimiser steps between logged metrics")
    allow_change: str = Field(
        "", description="parameters that may differ from those of the checkpoint, comma-separated"
    )

    @model_validator(mode="after")
    def _changes_are_parameters(self) -> Self:
        if unknown := ", ".join(sorted(set(names(self.allow_change)) - set(type(self).model_fields))):
            raise ValueError(f"allow_change = {self.allow_change!r}: {unknown} is no parameter of 04")
        return self

    @property
    def start(self) -> str:
        """The model folder that training starts from; empty if it starts at random."""
        return self.start_dir or (str(PRETRAINED) if self.pretrained else "")


class ValidationOptions(Options):
    """Describe validation in image space and early stopping."""

    heading = "Validation"
    val_every: Positive = Field(10, description="epochs between validations")
    val_cases: Positive = Field(2, description="validation cases that are sampled and scored")
    num_inference_steps: Positive = Field(10, description="sampling steps in validation")
    patience: Positive = Field(20, description="epochs without a better val_loss before early stopping")
    save_samples_every: Count = Field(10, description="epochs between written sample volumes; 0 for none")


class LossOptions(Options):
    """Describe the training objective."""

    heading = "Objective"
    conditioning_dropout: Fraction = Field(
        0.1, description="probability of dropping the conditioning, for classifier-free guidance"
    )
    noisiest_fraction: Fraction = Field(
        0.0, description="fraction of timesteps from the noisiest twentieth, weighted as an image, for `mean`"
    )
    outside_weight: Fraction = Field(0.0, description="loss weight of latent voxels outside the mask")


class LatentSampleOptions(Options):
    """Describe crops and augmentation of cached latents."""

    heading = "Training samples"
    latent_crop: Count = Field(
        12, description="edge of a training crop around the mask, latent voxels; 0 takes whole latents"
    )
    early_crop: Count = Field(
        0, description="edge of the crops in the first three quarters of the steps, latent voxels; 0 is latent_crop"
    )
    fresh_samples: bool = Field(
        False, description="draw encodings afresh: warp, mask and appearance, instead of augmenting the case"
    )
    cache_variants: Count = Field(
        2, description="encodings per training case; 0 draws every fresh sample when it is needed, for a GPU"
    )
    latent_flip_probability: Fraction = Field(
        0.0, description="probability of a left-right flip of latents; exact for linear codecs only"
    )


class TrackerOptions(Options):
    """Choose the experiment trackers; metrics.csv is always written."""

    heading = "Experiment trackers"
    untracked = frozenset({"wandb_mode", "use_mlflow", "use_trackio"})
    wandb_mode: Literal["off", "offline", "online"] = Field("offline", description="Weights & Biases mode")
    use_mlflow: bool = Field(True, description="MLflow tracking, in a SQLite file next to the runs")
    use_trackio: bool = Field(
        False, description="Trackio tracking, in a folder next to the runs; `pip install trackio`"
    )


NO_TRACKERS = TrackerOptions(wandb_mode="off", use_mlflow=False)


class TrainingOptions(
    LatentSampleOptions,
    AugmentationOptions,
    LossOptions,
    ScheduleOptions,
    DenoiserOptions,
    ValidationOptions,
    TrainerOptions,
):
    """Hold all that decides how a denoiser is trained."""

    hint = "see `help(ldm.TrainingOptions)`"

    @model_validator(mode="after")
    def _samples_exist(self) -> Self:
        if self.fresh_samples and not self.latent_crop:
            raise ValueError("latent_crop = 0: fresh_samples need the size of a crop")
        if not self.cache_variants and (not self.fresh_samples or self.overfit_batches):
            raise ValueError("cache_variants = 0: 1 or more without fresh_samples, or with overfit_batches")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.num_inference_steps > self.diffusion_steps:
            given = f"num_inference_steps = {self.num_inference_steps}"
            raise ValueError(f"{given}: above diffusion_steps = {self.diffusion_steps}")
        return self
