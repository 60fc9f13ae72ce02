"""Options of the diffusion model: latents and conditioning, denoiser network, noise schedule, sampler."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ldm_lib.options import Fraction, IntegerList, NotNegative, Options, Positive, integers

FLOW_SAMPLERS = {"ddpm": False, "euler": True, "midpoint": True}  # samplers of one kind of process; others do both


class LatentOptions(Options):
    """Describe what the denoiser is conditioned on."""

    heading = "Latents and conditioning"
    context: Literal["composite", "concat", "initial_estimate"] = Field(
        "composite", description="denoiser input; concat adds the undilated latent, initial_estimate a first estimate"
    )
    mask_dilation: int = Field(1, ge=0, le=4, description="dilation of the latent mask, latent voxels")
    growth_threshold: Fraction = Field(
        0.2, description="tumour-cell concentration below which tissue counts as healthy"
    )
    pooling: Literal["area", "nearest"] = Field(
        "area", description="pooling of voxels to a latent voxel: their mean, or the central voxel"
    )
    contralateral: bool = Field(
        False, description="show the other hemisphere, mirrored, to the denoiser; needs context initial_estimate"
    )
    bias_field_correction: bool = Field(
        False, description="divide each scan by its bias field, and multiply the result by it"
    )

    @model_validator(mode="after")
    def _contralateral_has_an_estimate(self) -> Self:
        if self.contralateral and self.context != "initial_estimate":
            raise ValueError(f"contralateral = True: with context {self.context!r}; it needs initial_estimate")
        return self


class DenoiserOptions(Options):
    """Describe the architecture of the denoiser, an ADM U-Net."""

    heading = "Denoiser network"
    base_width: Positive = Field(24, description="channels of the first level")
    multipliers: IntegerList = Field("1,2,4", description="width of each level, multiples of base_width")
    blocks_per_level: Positive = Field(1, description="residual blocks per level")
    attention_rates: IntegerList = Field("4", description="downsampling rates with self-attention")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate inside residual blocks")

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        rates = [2**level for level in range(len(integers(self.multipliers)))]
        if not set(integers(self.attention_rates)) <= set(rates):
            raise ValueError(
                f"attention_rates = {self.attention_rates!r}: multipliers {self.multipliers!r} leave {rates}"
            )
        return self


class ScheduleOptions(Options):
    """Describe the noise schedule and what the network predicts."""

    heading = "Diffusion process"
    prediction: Literal["noise", "x0", "velocity", "flow"] = Field("velocity", description="prediction target")
    schedule: Literal["linear", "cosine", "flow"] = Field(
        "linear", description="noise schedule; flow (straight lines to the noise) if prediction is flow"
    )
    diffusion_steps: int = Field(1000, ge=2, le=10000, description="steps of the noise schedule")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first variance of the linear schedule")
    beta_end: float = Field(0.02, gt=0, lt=1, description="last variance of the linear schedule")

    @model_validator(mode="after")
    def _process_is_consistent(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start = {self.beta_start}: above beta_end = {self.beta_end}")
        if (self.prediction == "flow") != (self.schedule == "flow"):
            values = f"prediction = {self.prediction!r}: with schedule {self.schedule!r}"
            raise ValueError(f"{values}; either both are flow or neither")
        return self

    @property
    def process(self) -> dict[str, Any]:
        """The arguments of `schedule.noise_schedule`, as a model's config.json holds them."""
        betas = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return {"schedule": self.schedule, "steps": self.diffusion_steps} | betas


class SamplerOptions(Options):
    """Describe how a sample is drawn."""

    heading = "Sampling"
    sampler: Literal["ddpm", "ddim", "dpm++2m", "euler", "midpoint"] = Field("dpm++2m", description="sampler")
    num_inference_steps: Positive = Field(8, description="sampling steps (denoiser calls per sample)")
    guidance: NotNegative = Field(
        1.0, description="classifier-free guidance scale: 0 unconditional, 1 conditional, > 1 amplified"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="scale of initial noise and detail: 1 as trained, below 1 less diverse, 0 the model's default"
    )
