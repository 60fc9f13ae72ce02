"""One frozen pydantic model per notebook.

The fields of a model are its notebook's parameters cell, name for name and default for default: `parameters_cell`
writes the cell from the model, and a test compares. Defaults are the `coarse` preset, so that a notebook opened by hand
and run from top to bottom ends on a laptop; `full` holds the numbers of the design.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ldm_lib.values import (
    Count,
    Devices,
    Fraction,
    IntegerList,
    Name,
    NotNegative,
    NumberList,
    Orientation,
    Positive,
    Samples,
    SomeIntegers,
    Workers,
    integers,
    names,
)

ON_A_FLOW = {"ddpm": False, "euler": True, "midpoint": True}  # samplers of one path; the others walk on either
SHIPPED = Path(__file__).with_name("weights")  # the model folder that comes with the library
AUTOENCODER_FOLDER = "autoencoder"  # inside a model folder
FRONT_END_FACTORS = {"plain": 1, "haar": 4, "half": 2}  # voxels an axis that become one, see `front_ends`
JUDGED_CROP_VOX = 20  # an axis of the smallest crop that the discriminator of `critics` judges


class StageConfig(BaseModel):
    """What every stage takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    aside: ClassVar[frozenset[str]] = frozenset()  # parameters that decide how a stage is made, not what it becomes

    run: Name = Field("lab", description="run folder under outputs/, created if needed")
    overwrite: bool = Field(False, description="replace this stage if it was made with other settings")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of every random number in this stage")


class DeviceConfig(StageConfig):
    """A stage that runs a network."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    precision: Literal["auto", "32", "bf16", "16"] = Field("auto", description="auto: bf16 where it pays, else 32")


class AuditConfig(StageConfig):
    """01_data_audit: which cases are there, which may be used, who trains and who validates."""

    aside: ClassVar[frozenset[str]] = frozenset({"workers"})

    data_dir: str = Field("", description="folder of cases; empty makes the synthetic cohort")
    conditioning_dir: str = Field("", description="folder of growth and tissue maps; empty looks beside data_dir")
    assume_orientation: Orientation = Field("", description="of files that do not say theirs, such as LPS")
    nan_as_zero: bool = Field(False, description="read voxels that are not a number as 0")
    mask_labels: SomeIntegers = Field("", description="labels that are the hole, where masks are segmentations")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="of the patients")
    synthetic_patients: Annotated[int, Field(ge=2, le=9000)] = Field(30, description="size of the synthetic cohort")
    synthetic_first: Annotated[int, Field(ge=0, le=9999)] = Field(8000, description="number of its first patient")
    spacing_mm: Annotated[float, Field(ge=1, le=8)] = Field(4.0, description="voxel size of the synthetic cohort, mm")
    deformation: Annotated[float, Field(ge=0, le=4)] = Field(1.0, description="of synthetic brains; 2 folds them")
    masks_per_patient: Annotated[int, Field(ge=1, le=3)] = Field(3, description="holes per synthetic patient")
    variety: Literal["usual", "wide"] = Field("usual", description="of scanners, brains, holes; wide to train for real")
    tissue_map: Literal["true", "registered"] = Field("true", description="true, or off as registered atlases are")
    workers: Annotated[int, Field(ge=1, le=64)] = Field(1, description="processes that make the synthetic cohort")


class AutoencoderConfig(DeviceConfig):
    """02_autoencoder_check: what is lost by going latent."""

    shipped_weights: bool = Field(False, description="start from the weights that come with the library")
    autoencoder_dir: str = Field("", description="weights to take instead, ours or others'; without either it trains")
    front_end: Literal["plain", "haar", "half"] = Field("plain", description="fixed transform around the network")
    latent_channels: Positive = Field(6, description="numbers per latent cell")
    channels: IntegerList = Field("16,32", description="width of each level; one halving less than levels")
    blocks: Positive = Field(1, description="residual blocks per level")
    norm: Literal["local", "group"] = Field("local", description="statistics of one voxel, or of the whole grid")
    linear_start: bool = Field(True, description="add to the best linear code instead of starting at random")
    learned: Literal["both", "decoder", "none"] = Field("decoder", description="which way has a network")
    autoencoder_steps: Positive = Field(100, description="optimiser steps")
    autoencoder_batch_size: Positive = Field(4, description="crops per step")
    autoencoder_learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(2e-4, description="peak, of AdamW")
    autoencoder_ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.98, description="of the weights that are kept")
    crop: Positive = Field(32, description="edge of a training crop, voxels")
    final_crop: Positive = Field(48, description="edge in the last tenth of the steps, as far as the volume goes")
    kl_weight: NotNegative = Field(1e-3, description="of the KL term, a mean over elements; a learned encoder has one")
    adversarial_weight: NotNegative = Field(0.0, description="of the patch discriminator; 0 is off")
    adversarial_start: Fraction = Field(0.5, description="share of the steps before the discriminator joins")
    perceptual_file: str = Field("", description="weights of a 3D ResNet for the perceptual term; empty is off")
    perceptual_weight: NotNegative = Field(0.1, description="of the perceptual term")
    voided_fraction: Fraction = Field(0.5, description="of the crops that show the voided image")
    air_fraction: Fraction = Field(0.1, description="of the crops placed anywhere, mostly in air")
    intensity_shift: Annotated[float, Field(ge=0, le=0.5)] = Field(0.1, description="largest change of gain and gamma")
    check_cases: Positive = Field(6, description="validation cases whose ceiling is measured")
    box_margin: Count = Field(4, description="cells around the hole that are decoded with it")
    min_ceiling_psnr: NotNegative = Field(20.0, description="dB in the hole below which the stage does not close")
    min_gain_over_pca: NotNegative = Field(0.2, description="dB above principal components of blocks, likewise")
    accept_anyway: bool = Field(False, description="close the stage below these gates")

    @property
    def given_weights(self) -> str:
        """Folder or file of the weights that are taken; empty if they are trained here."""
        return self.autoencoder_dir or (str(SHIPPED / AUTOENCODER_FOLDER) if self.shipped_weights else "")

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        """A crop of few cells has no middle, and convolutions in bfloat16 fail on axes of two."""
        factor = FRONT_END_FACTORS[self.front_end] * 2 ** (len(integers(self.channels)) - 1)
        judged = -(-JUDGED_CROP_VOX // factor) if self.adversarial_weight else 0
        least = max(4, judged)
        if self.learned != "none" and self.crop < least * factor:
            raise ValueError(f"crop = {self.crop}: {factor} voxels make a cell, an axis of a crop has at least {least}")
        if self.learned != "both" and not self.linear_start:
            raise ValueError(f"learned = {self.learned!r}: needs linear_start")
        if self.final_crop < self.crop:
            raise ValueError(f"final_crop = {self.final_crop}: must be at least crop = {self.crop}")
        return self


class ConditioningConfig(StageConfig):
    """03_conditioning: what the model will see."""

    growth_threshold: Fraction = Field(0.2, description="tumour-cell concentration below which there is no tumour")
    pooling: Literal["area", "nearest"] = Field("area", description="voxels to cells: occupancy or centre voxel")
    mask_dilation: Annotated[int, Field(ge=0, le=4)] = Field(1, description="cells by which the latent mask grows")
    context: Literal["composite", "concat", "draft"] = Field(
        "composite", description="concat adds the undilated latent, draft a first guess"
    )
    make_missing: bool = Field(True, description="make the tissue and growth maps that cases lack from their scans")
    tissue_source: Literal["atlas", "given"] = Field("atlas", description="of the cases to fill; given may have peeked")
    training_tissue: Literal["atlas", "given"] = Field("given", description="of those to train on; a draft wants atlas")
    max_cases: Count = Field(6, description="validation cases to prepare for filling; 0 for all")
    show_case: str = Field("", description="case to draw; empty takes the first validation case")


class TrainingConfig(DeviceConfig):
    """04_training: the denoiser, on cached latents."""

    shipped_weights: bool = Field(False, description="start from the weights that come with the library")
    start_dir: str = Field("", description="a model folder to start from instead; without either, from noise")
    batch_size: Positive = Field(2, description="samples per device and step")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-3, description="of AdamW, constant after warm-up")
    warmup_steps: Count = Field(50, description="optimiser steps of linear warm-up")
    max_epochs: Positive = Field(40, description="passes over the training samples")
    accumulate_grad_batches: Positive = Field(1, description="batches per optimiser step")
    gradient_clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest gradient norm")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="of the averaged weights that are kept")
    devices: Devices = Field(1, description="in all; a notebook trains on one, `make train` on several")
    strategy: Literal["ddp", "fsdp"] = Field("ddp", description="of several devices: replicas, or weights in shards")
    num_workers: Workers = Field(0, description="loader processes; cached latents need none")
    checkpoint_every: Positive = Field(100, description="optimiser steps between checkpoints to go on from")
    log_every: Positive = Field(10, description="optimiser steps between logged figures")
    allow_change: str = Field("", description="parameters that may differ from those of what is resumed")
    compile: bool = Field(False, description="torch.compile the denoiser; a minute at first, for long trainings")
    patience: Positive = Field(20, description="epochs without a better val_loss before stopping")
    val_every: Positive = Field(10, description="epochs between validations")
    val_cases: Positive = Field(2, description="validation cases that are sampled and scored")
    num_inference_steps: Positive = Field(10, description="sampling steps in validation")
    save_samples_every: Count = Field(10, description="epochs between written sample volumes; 0 for none")
    overfit_batches: Count = Field(0, description="debug: train on so many fixed batches; 0 is off")
    base_width: Positive = Field(24, description="channels of the first level of the ADM")
    multipliers: IntegerList = Field("1,2,4", description="width of each level over base_width")
    blocks_per_level: Positive = Field(1, description="residual blocks per level")
    attention_rates: IntegerList = Field("4", description="downsampling rates with attention")
    keep_weights: Literal["last", "best"] = Field("last", description="EMA weights: of the end or best val_loss")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="inside residual blocks")
    conditioning_dropout: Fraction = Field(0.1, description="share of the samples that are told nothing; for guidance")
    prediction: Literal["noise", "x0", "velocity", "flow"] = Field("velocity", description="what the network predicts")
    schedule: Literal["linear", "cosine", "flow"] = Field("linear", description="noise schedule; flow with flow only")
    diffusion_steps: Annotated[int, Field(ge=2, le=10000)] = Field(1000, description="steps of the noise schedule")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="first variance of the linear schedule")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(0.02, description="last variance of the linear schedule")
    schedule_shift: Annotated[float, Field(gt=0, le=100)] = Field(1.0, description="above 1: more noise at every step")
    zero_terminal_snr: bool = Field(False, description="rescale so that the last step holds no signal")
    min_snr_gamma: NotNegative = Field(0.0, description="min-SNR weighting of noise levels, 5 is usual; 0 is off")
    outside_weight: Fraction = Field(0.0, description="weight of the cells outside the hole in the loss")
    latent_crop: Count = Field(12, description="edge of a training crop around the hole, cells; 0 takes whole latents")
    cache_variants: Positive = Field(2, description="encodings per training sample; all but the first augmented")
    flip_probability: Fraction = Field(0.5, description="left-right flip of the image and its maps")
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = Field(8.0, description="largest rotation about each axis")
    intensity_shift: Annotated[float, Field(ge=0, le=0.5)] = Field(0.1, description="largest change of gain and gamma")
    latent_noise: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="std of noise added to known latents")
    latent_flip_probability: Fraction = Field(0.0, description="flip of latents; exact for linear ones only, see 02")
    tissue_deformation_mm: Annotated[float, Field(ge=0, le=20)] = Field(4.0, description="largest, of the tissue map")
    wandb_mode: Literal["off", "offline", "online"] = Field("offline", description="Weights & Biases tracker")
    use_mlflow: bool = Field(True, description="MLflow tracker, sqlite beside the runs")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What one parameter alone cannot tell, refused before hours of other stages rather than after them."""
        rates = [2**level for level in range(len(integers(self.multipliers)))]
        if not set(integers(self.attention_rates)) <= set(rates):
            raise ValueError(
                f"attention_rates = {self.attention_rates!r}: multipliers {self.multipliers!r} leave {rates}"
            )
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start = {self.beta_start}: above beta_end = {self.beta_end}")
        if (self.prediction == "flow") != (self.schedule == "flow"):
            raise ValueError(f"prediction = {self.prediction!r}: with schedule {self.schedule!r}; flow needs flow")
        if self.num_inference_steps > self.diffusion_steps:
            steps = f"{self.num_inference_steps}: above diffusion_steps = {self.diffusion_steps}"
            raise ValueError(f"num_inference_steps = {steps}")
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ValueError("zero_terminal_snr = True: a flow ends without signal as it is")
        if self.prediction == "noise" and self.zero_terminal_snr:
            raise ValueError(
                "prediction = 'noise': says nothing where there is no signal; zero_terminal_snr needs another"
            )
        unknown = set(names(self.allow_change)) - set(type(self).model_fields)
        if unknown:
            raise ValueError(
                f"allow_change = {self.allow_change!r}: {', '.join(sorted(unknown))} is no parameter of 04"
            )
        return self

    @property
    def start(self) -> str:
        """The model folder that training starts from; empty if from noise."""
        return self.start_dir or (str(SHIPPED) if self.shipped_weights else "")

    @property
    def process(self) -> dict[str, Any]:
        """The arguments of `schedule.noise_schedule`, as they stand in a model's config."""
        shape = {"schedule": self.schedule, "steps": self.diffusion_steps, "shift": self.schedule_shift}
        betas = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return shape | betas | {"zero_terminal_snr": self.zero_terminal_snr}


class SamplingConfig(DeviceConfig):
    """05_sampling: voided volumes in, inpainted volumes out."""

    aside: ClassVar[frozenset[str]] = frozenset({"devices"})
    sampler: Literal["ddpm", "ddim", "dpm++2m", "euler", "midpoint"] = Field(
        "dpm++2m", description="how the noise is removed"
    )
    num_inference_steps: Positive = Field(8, description="denoiser calls per sample")
    guidance: NotNegative = Field(1.0, description="how far to go from told nothing (0) to told all (1) and beyond")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="of the noise that sampling starts from, below 1 nearer to the mean; 0: the model's own"
    )
    blend_mm: Annotated[float, Field(ge=0, le=1000)] = Field(
        16.0, description="reach of the fit at the hole's edge, mm; 0 is off"
    )
    samples: Samples = Field(4, description="K: samples per case; the mean of K is the output when K > 1")
    max_cases: Count = Field(6, description="validation cases to fill; 0 for all")
    devices: Devices = Field(1, description="that share out the cases")
    compare_cases: Count = Field(2, description="cases filled by every sampler in several numbers of steps; 0 for none")
    compare_steps: IntegerList = Field("4,8,10,20", description="numbers of steps to compare")
    obedience_cases: Count = Field(3, description="cases filled again with other conditioning; 0 for none")
    guidance_scales: NumberList = Field("0,1,2,3", description="of classifier-free guidance, to compare")
    what_if_days: NumberList = Field("0,60,120,180", description="ages of the tumours of one case, days")


class EvaluationConfig(StageConfig):
    """06_evaluation: scores comparable with the challenge's."""

    baselines: bool = Field(True, description="score mean, mirror, harmonic fill and tissue paint too")
    show_cases: Positive = Field(3, description="cases to draw: best, median, worst by SSIM first")


STAGES: dict[str, type[StageConfig]] = {
    "01_data_audit": AuditConfig,
    "02_autoencoder_check": AutoencoderConfig,
    "03_conditioning": ConditioningConfig,
    "04_training": TrainingConfig,
    "05_sampling": SamplingConfig,
    "06_evaluation": EvaluationConfig,
}
