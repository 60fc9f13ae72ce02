"""Define the options of inpainting a case."""

from typing import Annotated, Any

from pydantic import Field

from ldm_lib.diffusion.options import SamplerOptions
from ldm_lib.options import DeviceOptions, Samples, SeedOptions


class InpaintOptions(SamplerOptions, DeviceOptions, SeedOptions):
    """Describe how cases are inpainted."""

    heading = "Inpainting"
    samples: Samples = Field(4, description="samples per case (K); the result is their mean when K > 1")
    blend_mm: Annotated[float, Field(ge=0, le=1000)] = Field(
        16.0, description="reach of the intensity correction at the mask's edge, mm; 0 is off"
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `Inpainter.__call__` that these options set."""
        names = ("sampler", "num_inference_steps", "seed", "guidance")
        return {"n_samples": self.samples} | {name: getattr(self, name) for name in names}
