"""Options of tumour growth."""

from typing import Annotated

from pydantic import Field

from ldm_lib.options import NotNegative, Options


class GrowthRates(Options):
    """Hold the rates at which a tumour spreads.

    The defaults describe a glioblastoma of medium speed: the width of its front, sqrt(D / rho), is 2 mm, and in white
    matter the front moves 0.2 mm per day.
    """

    heading = "Tumour growth"
    hint = "give finite rates"
    diffusion_white_mm2_per_day: NotNegative = Field(
        0.2, description="diffusion coefficient D in white matter, mm^2 per day"
    )
    diffusion_ratio: Annotated[float, Field(gt=0)] = Field(10.0, description="D in white matter over D in grey matter")
    proliferation_per_day: NotNegative = Field(0.05, description="proliferation rate rho, per day")


DEFAULT_RATES = GrowthRates()
