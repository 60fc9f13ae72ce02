"""Options of cohorts that are made and of augmentation in image space."""

from typing import Annotated, Literal

from pydantic import Field

from ldm_lib.options import Fraction, Options, SeedOptions


class MadeCohortOptions(SeedOptions):
    """Describe what the synthetic cohort and a cohort of healthy scans have in common."""

    heading = "Cohort to make (when data_dir is empty)"
    untracked = frozenset({"workers"})
    spacing_mm: Annotated[float, Field(ge=1, le=8)] = Field(4.0, description="voxel size, mm")
    masks_per_patient: Annotated[int, Field(ge=1, le=8)] = Field(3, description="masks made in each patient")
    workers: Annotated[int, Field(ge=1, le=64)] = Field(1, description="processes that make the cohort")


class SyntheticCohortOptions(MadeCohortOptions):
    """Describe the synthetic cohort."""

    heading = "Synthetic cohort (when data_dir and brains_dir are empty)"
    synthetic_patients: Annotated[int, Field(ge=2, le=9000)] = Field(30, description="patients to make")
    synthetic_first: Annotated[int, Field(ge=0, le=9999)] = Field(8000, description="number of the first patient")
    deformation: Annotated[float, Field(ge=0, le=4)] = Field(
        1.0, description="scale of the brains' random deformation; from about 2 on, tissue is folded over itself"
    )
    domain_randomisation: Literal["narrow", "wide"] = Field(
        "narrow", description="range of contrast, noise, anatomy, mask size; wide for training"
    )
    tissue_map: Literal["exact", "registered"] = Field(
        "exact", description="tissue labels: exact, or with simulated registration error"
    )


class AugmentationOptions(Options):
    """Describe augmentation in image space, before encoding."""

    heading = "Augmentation in image space"
    flip_probability: Fraction = Field(0.5, description="probability of a left-right flip of the image and its maps")
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = Field(
        8.0, description="largest rotation about each axis, degrees"
    )
    intensity_shift: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="largest relative change of gain and gamma"
    )
    tissue_deformation_mm: Annotated[float, Field(ge=0, le=20)] = Field(
        4.0, description="largest random deformation of the tissue map, mm"
    )
