"""Describe an exported model for others: a model card for Hugging Face, and the configs of a MONAI bundle.

The front matter of the card, and a bundle's metadata.json, state what the model folder knows; licence and data of a
training are its owner's to add.
"""

import csv
import inspect
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_lib.diffusion.model import LatentDiffusion
from ldm_lib.files import write_json
from ldm_lib.images.options import ReadOptions
from ldm_lib.inpainting.single_file import inpaint
from ldm_lib.model_io import read_config
from ldm_lib.version import __version__

CARD, LOG = "README.md", "training.csv"
PACKAGE = "brain-mri-inpainting"
# The form of a bundle's metadata.json that `monai.bundle verify_metadata` checks.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
TASK = "Inpainting of skull-stripped 3D T1-weighted brain MRI by latent diffusion"
USE = "Research. Not a medical device; the result is plausible, not true, and never to be counted as data of a patient."
FRONT_MATTER = f"""---
license: unknown
library_name: {PACKAGE}
pipeline_tag: image-to-image
datasets: []
metrics:
- psnr
- ssim
- mse
tags:
- mri
- brain
- inpainting
- latent-diffusion
- safetensors
---
"""


def model_card(folder: Path) -> str:
    """Return a card of what config.json and the log of its training state about an exported model."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(folder).items())
    with (folder / LOG).open(newline="") as stream:
        last = {name: value for row in csv.DictReader(stream) for name, value in row.items() if value}
    logged = "\n".join(f"| {name} | {value} |" for name, value in last.items())
    return f"""{FRONT_MATTER}
# Brain MRI inpainting

{TASK}, a model of {PACKAGE} {__version__}. Before it is published, complete this card: licence and data sets above, and
on whom it was trained and measured.

    ldm inpaint --model FOLDER --t1n-voided V.nii.gz --mask M.nii.gz --output O.nii.gz

## Intended use

{USE}

## Model

| | |
|---|---|
{facts}

## Training

`{LOG}` holds the log. Its last values:

| metric | value |
|---|---|
{logged}
"""


def _facts(folder: Path) -> dict[str, Any]:
    """Return what a reader of the card wants to know of the model."""
    model, config = LatentDiffusion.load(folder, device="cpu"), read_config(folder)
    return {
        "denoiser": f"3D ADM, {sum(each.numel() for each in model.denoiser.parameters()):,} weights",
        "autoencoder": f"{model.autoencoder.latent_channels} channels of {model.autoencoder.factor} voxels",
        "voxel size, mm": f"{model.autoencoder.spacing_mm:g}",
        "process": f"{model.process['schedule']} schedule, {model.schedule.steps} steps, predicts {model.prediction}",
        "context": model.spec.context,
        "temperature": f"{model.temperature:g}",
        "optimiser steps": config.get("optimiser_steps", "not recorded"),
        "sha256 of the denoiser": config["sha256"],
        "sha256 of the autoencoder": config["autoencoder_sha256"],
    }


def write_bundle_configs(folder: Path) -> None:
    """Write a MONAI bundle's configs: metadata.json, and inference.json, which calls `ldm_lib.inpaint`."""
    folder.mkdir()
    write_json(folder / "metadata.json", _metadata())
    reading = ReadOptions().model_dump()
    arguments = {name: each.default for name, each in inspect.signature(inpaint).parameters.items()} | {
        "t1n_voided": "t1n-voided.nii.gz",
        "mask": "mask.nii.gz",
        "output": "inpainted.nii.gz",
        "model": "$@bundle_root + '/models'",
        "read_options": f"$ldm_lib.ReadOptions({_references(reading)})",
    }
    run = [f"$ldm_lib.inpaint({_references(arguments)})"]
    config = {"imports": ["$import ldm_lib"], "bundle_root": ".", **reading, **arguments, "run": run}
    write_json(folder / "inference.json", config)


def _references(names: Iterable[str]) -> str:
    """Return arguments that take the values of the config's entries of the same names."""
    return ", ".join(f"{name}=@{name}" for name in names)


def _metadata() -> dict[str, Any]:
    def volume(meaning: str, kind: str) -> dict[str, Any]:
        return {"type": "image", "format": kind, "modality": "MR", "num_channels": 1, "spatial_shape": ["*", "*", "*"],
                "dtype": "float32", "value_range": [], "is_patch_data": False,
                "channel_def": {"0": meaning}}  # fmt: skip

    stated = f"stated in docs/{CARD}"
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"exported by {PACKAGE} {__version__}"},
        **{f"{name}_version": version(package) for name, package in
           (("monai", "monai"), ("pytorch", "torch"), ("numpy", "numpy"))},
        "required_packages_version": {PACKAGE: __version__},
        "task": TASK,
        "description": "A frozen autoencoder and a 3D ADM that denoises the latents of the masked region; weights are "
                       "safetensors in models/, and voxels outside the mask keep their bits",
        "authors": stated,
        "copyright": stated,
        "data_source": stated,
        "data_type": "nibabel",
        "intended_use": USE,
        "network_data_format": {
            "inputs": {"t1n_voided": volume("T1-weighted, skull-stripped, void under the mask", "magnitude"),
                       "mask": volume("1 = inpaint", "segmentation")},
            "outputs": {"output": volume("inpainted T1-weighted", "magnitude")},
        },
    }  # fmt: skip
