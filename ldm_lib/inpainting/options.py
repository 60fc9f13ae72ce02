"""Define the options of inpainting a case."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ldm_lib.diffusion.options import SamplerOptions
from ldm_lib.errors import ConfigError
from ldm_lib.options import DeviceOptions, Samples, SeedOptions


class InpaintOptions(SamplerOptions, DeviceOptions, SeedOptions):
    """Describe how cases are inpainted."""

    heading = "Inpainting"
    samples: Samples = Field(4, description="samples per case (K); the result is their mean when K > 1")
    blend_mm: Annotated[float, Field(ge=0, le=1000)] = Field(
        16.0, description="reach of the intensity correction at the mask's edge, mm; 0 is off"
    )
    detail: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0,
        description="scale of random detail finer than the latents, times the temperature; 0 leaves out its mean, too",
    )

    @classmethod
    def of_arguments(cls, *, n_samples: int, **arguments: Any) -> Self:
        """Check the arguments of a Python function, in which the parameter `samples` is called `n_samples`."""
        try:
            return cls(samples=n_samples, **arguments)
        except ConfigError as error:
            cause = error.cause.replace("samples = ", "n_samples = ", 1)
            raise ConfigError(cause, fix="give an allowed value") from None

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `Inpainter.__call__` that these options set."""
        names = ("sampler", "num_inference_steps", "seed", "guidance")
        return {"n_samples": self.samples} | {name: getattr(self, name) for name in names}

    @property
    def method(self) -> tuple[str, int]:
        """Return the sampler and its number of steps."""
        return self.sampling["sampler"], self.sampling["num_inference_steps"]


# At the noisiest step nothing of the sample is known: what minimises the error there is the mean of all samples.
# `LatentDiffusion.sample` starts a single step from the mean of the noise.
MEAN = {"n_samples": 1, "sampler": "ddim", "num_inference_steps": 1}


class ResultOptions(InpaintOptions):
    """Describe what is made of a case: samples, or their expected mean in one denoiser evaluation."""

    samples: Samples = Field(1, description="samples per case (K); the result is their mean when K > 1")
    estimate: Literal["samples", "mean"] = Field(
        "samples", description="samples, or their mean in one evaluation, without sampler, steps, seed and temperature"
    )
    dilate: Annotated[int, Field(ge=0, le=50)] = Field(
        0, description="voxels by which the mask grows in every direction before it is inpainted"
    )

    @model_validator(mode="after")
    def _one_volume(self) -> Self:
        if self.estimate == "mean" and self.samples > 1:
            raise ValueError(f"samples = {self.samples}: allowed: 1 with estimate 'mean', which is one volume")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `Inpainter.__call__` that these options set."""
        return super().sampling | (MEAN if self.estimate == "mean" else {})
