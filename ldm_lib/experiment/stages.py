"""Compose the parameter models of the six notebooks from the options of the sub-packages.

The parameters cell of a notebook has the fields of its model, name for name and default for default: `parameters_cell`
writes the cell from the model, and a test compares them. Defaults are the `coarse` preset, so that a notebook that is
run by hand from top to bottom finishes on a laptop; the `full` preset holds the numbers of the paper-scale design.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_lib.autoencoder.options import AutoencoderTrainingOptions
from ldm_lib.data.options import SyntheticCohortOptions
from ldm_lib.diffusion.options import LatentOptions
from ldm_lib.errors import ConfigError
from ldm_lib.files import AUTOENCODER_FOLDER, PRETRAINED
from ldm_lib.images.options import ReadOptions
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.options import (
    Count,
    DeviceOptions,
    Devices,
    IntegerList,
    Name,
    NotNegative,
    NumberList,
    Options,
    Positive,
    SeedOptions,
    nearest,
)
from ldm_lib.training.options import TrackerOptions, TrainingOptions


class StageConfig(SeedOptions):
    """Hold the parameters that every stage has."""

    heading = "Run"
    untracked = frozenset({"run", "overwrite"})

    run: Name = Field("lab", description="run folder in outputs/, created if needed")
    overwrite: bool = Field(False, description="replace this stage if it was run with other settings")


class AuditConfig(SyntheticCohortOptions, ReadOptions, StageConfig):
    """Describe stage 01_data_audit: cases that are found and valid, and their training/validation split."""

    hint = "see `ldm params 01`"

    heading = "Data"
    data_dir: str = Field("", description="folder of cases; empty makes a cohort")
    conditioning_dir: str = Field("", description="folder of growth and tissue maps; empty searches next to data_dir")
    brains_dir: str = Field("", description="skull-stripped T1w of healthy people to make the cohort of, or empty")
    patients_file: str = Field("", description="CSV of case,patient, for names that do not say the patient; or empty")
    max_brains: Count = Field(0, description="scans of brains_dir to take, in order of id; 0 for all")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="fraction of the patients used for validation"
    )

    @model_validator(mode="after")
    def _require_one_source(self) -> Self:
        if self.data_dir and self.brains_dir:
            raise ValueError("data_dir and brains_dir are both given, a cohort has one source; leave one of them empty")
        return self


class AutoencoderConfig(AutoencoderTrainingOptions, DeviceOptions, StageConfig):
    """Describe stage 02_autoencoder_check: how much is lost by encoding and decoding."""

    hint = "see `ldm params 02`"

    heading = "Weights and checks"
    untracked = frozenset({"min_reconstruction_psnr", "min_gain_over_pca", "accept_anyway"})
    pretrained: bool = Field(False, description="use the pretrained weights of the package")
    autoencoder_dir: str = Field("", description="weights to use (this project's, MONAI's or MAISI's); empty trains")
    check_cases: Positive = Field(6, description="validation cases whose reconstruction is scored")
    box_margin: Count = Field(4, description="margin of the decoded box around the mask, latent voxels")
    min_reconstruction_psnr: NotNegative = Field(20.0, description="PSNR in the mask that the stage requires, dB")
    min_gain_over_pca: NotNegative = Field(0.2, description="gain over PCA of blocks that the stage requires, dB")
    accept_anyway: bool = Field(False, description="accept weights that fail these requirements")

    @property
    def given_weights(self) -> str:
        """Return folder or file of the weights to use; empty if they are trained here."""
        return self.autoencoder_dir or (str(PRETRAINED / AUTOENCODER_FOLDER) if self.pretrained else "")


class ConditioningConfig(LatentOptions, StageConfig):
    """Describe stage 03_conditioning: the maps that the model is conditioned on."""

    hint = "see `ldm params 03`"

    heading = "Conditioning maps"
    make_missing: bool = Field(True, description="make missing tissue and growth maps from the scans")
    tissue_source: Literal["atlas", "given"] = Field(
        "atlas", description="source of the tissue map for inference; given may leak the hidden region"
    )
    training_tissue: Literal["atlas", "given"] = Field(
        "given", description="source of the tissue map for training; atlas suits initial_estimate"
    )
    max_cases: Count = Field(6, description="validation cases to prepare for inpainting; 0 for all")
    show_case: str = Field("", description="case to plot; empty takes the first validation case")


class TrainingConfig(TrackerOptions, TrainingOptions, StageConfig):
    """Describe stage 04_training: the denoiser's training on cached latents."""

    hint = "see `ldm params 04`"


class SamplingConfig(InpaintOptions, StageConfig):
    """Describe stage 05_sampling: voided volumes in, inpainted volumes out."""

    untracked = frozenset({"devices"})
    hint = "see `ldm params 05`"

    heading = "Cases and comparisons"
    max_cases: Count = Field(6, description="validation cases to inpaint; 0 for all")
    devices: Devices = Field(1, description="number of devices; cases are distributed over them")
    compare_cases: Count = Field(2, description="cases to inpaint by every sampler; 0 for none")
    compare_steps: IntegerList = Field("4,8,10,20", description="numbers of sampling steps to compare")
    fidelity_cases: Count = Field(3, description="cases to inpaint with changed conditioning; 0 for none")
    guidance_scales: NumberList = Field("0,1,2,3", description="scales of classifier-free guidance to compare")
    counterfactual_days: NumberList = Field("0,60,120,180", description="tumour ages of one case, days")
    page_cases: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="cases to write an HTML page of, 3 to 5 MB each; 0 for none"
    )


class EvaluationConfig(StageConfig):
    """Describe stage 06_evaluation: scores comparable with the challenge's."""

    hint = "see `ldm params 06`"

    heading = "Evaluation"
    baselines: bool = Field(True, description="scores of five baselines, from mean intensity to initial estimate")
    show_cases: Positive = Field(3, description="cases to plot: best, median and worst by SSIM first")


STAGES: dict[str, type[StageConfig]] = {
    "01_data_audit": AuditConfig,
    "02_autoencoder_check": AutoencoderConfig,
    "03_conditioning": ConditioningConfig,
    "04_training": TrainingConfig,
    "05_sampling": SamplingConfig,
    "06_evaluation": EvaluationConfig,
}


def stage_name(text: str) -> str:
    """Return the full name of a stage: "4", "04" or "04_training" -> "04_training"."""
    found = [name for name in STAGES if name == text or name[:2] == text.zfill(2)]
    if not found:
        raise ConfigError(f"no stage {text!r}; there are {', '.join(STAGES)}", fix=nearest(text, STAGES))
    return found[0]


def parameter_groups(model: type[Options]) -> Iterator[tuple[str, list[str]]]:
    """Yield the heading and the parameter names of each group: run, the stage's own, then those of its sub-packages."""
    owners = [cls for cls in model.__mro__ if issubclass(cls, Options)]
    order = sorted(owners, key=lambda cls: (cls is not StageConfig, cls is not SeedOptions, cls is not model))
    own = {cls: [name for name in model.model_fields if name in cls.__annotations__] for cls in order}
    run = own.pop(StageConfig, []) + own.pop(SeedOptions, [])
    if run:
        yield StageConfig.heading, run
    stage_first, rest = {model: own.pop(model)}, dict(reversed(own.items()))
    for cls, names in (stage_first | rest).items():
        if names:
            yield cls.heading, names


LINE_LENGTH = 120  # of a notebook's code, whose formatter would wrap a longer line


def parameters_cell(model: type[StageConfig]) -> str:
    """Return the source of a notebook's parameters cell: one `name: type = literal  # description` a line."""
    groups = []
    for heading, names in parameter_groups(model):
        lines = [f"# {heading}"]
        for name in names:
            field = model.model_fields[name]
            kind = type(field.default).__name__
            literal = json.dumps(field.default) if kind == "str" else repr(field.default)
            choices = getattr(field.annotation, "__args__", ())
            among = f" ({', '.join(choices)})" if choices and all(isinstance(c, str) for c in choices) else ""
            line = f"{name}: {kind} = {literal}  # {field.description}"
            lines.append(line + among if len(line + among) <= LINE_LENGTH else line)
        groups.append("\n".join(lines))
    return "\n\n".join(groups)
