"""Describe results as BIDS derivatives: `dataset_description.json`, and a JSON sidecar next to every image."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.data.bids import data_set_of, uri
from ldm_lib.data.case import CaseData
from ldm_lib.files import write_json
from ldm_lib.images.image_files import stem
from ldm_lib.images.skull_strip import deepbet_version
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.result import Inpainting, sidecar_path
from ldm_lib.version import __version__

BIDS_VERSION = "1.10.0"
IGNORED = "filled\nresults.csv\n*_summary.json\n*.html\n"  # which BIDS has no names for
DESCRIPTIONS = {  # by the last part of an image's name
    "T1w": "T1w with synthetic tissue in the mask; all other voxels are those of the source",
    "mask": "brain of the source, which the model saw alone",
    "dseg": "tissue labels of the inpainted T1w: from its intensities in the mask, from a tissue map elsewhere",
}
REST = 0.1  # of a brain; a mask leaves less than that of a stripped scan, and more than all of it of a head
LABELS = "index\tname\tabbreviation\n1\tCerebrospinal fluid\tCSF\n2\tGray matter\tGM\n3\tWhite matter\tWM\n"


def describe_data_set(output: Path, source: Path, *, labels: bool) -> None:
    """Write `dataset_description.json`, `README.md`, `.bidsignore` and the meaning of labels of a derivative data set.

    BIDS numbers tissues otherwise (1 GM, 2 WM, 3 CSF) where no such table is.
    """
    generated = {"Name": "ldm_lib", "Version": __version__, "Description": "lesions inpainted by latent diffusion"}
    description = {
        "Name": f"Inpainted T1w of {source.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [generated],
        "DatasetLinks": {"raw": Path(os.path.relpath(source, output)).as_posix()},
    }
    write_json(output / "dataset_description.json", description)
    readme = (
        f"T1w of {source.name} whose lesions were inpainted by ldm_lib {__version__}: voxels in a mask are synthetic,"
    )
    texts = {".bidsignore": IGNORED, "README.md": f"{readme}\nall others are those of the source.\n"}
    texts |= {"desc-inpainted_dseg.tsv": LABELS} if labels else {}
    for name, text in texts.items():
        if not (output / name).exists():
            (output / name).write_text(text)


def write_sidecars(
    inpainter: Inpainter, options: InpaintOptions, result: Inpainting, images: Sequence[Path]
) -> list[Path]:
    """Write the sidecar of each image of a result, and return the files."""
    written = []
    for image in images:
        suffix = stem(image).rpartition("_")[2]
        about = _about_brain_mask(result) if suffix == "mask" else _sidecar(inpainter, options, result)
        write_json(sidecar_path(image), {"Description": DESCRIPTIONS[suffix]} | about)
        written.append(sidecar_path(image))
    return written


def provenance(inpainter: Inpainter, options: InpaintOptions, result: Inpainting) -> dict[str, Any]:
    """Return the model, the settings and the kind of tissue map of a result, in the terms of BIDS where it has them."""
    model, sampling, data = inpainter.model, options.sampling, result.data
    weights = {"Denoiser": model.denoiser, "Autoencoder": model.autoencoder}
    estimate = getattr(options, "estimate", "samples")
    return {
        "Model": {"Name": model.name} | {name: network.folder_config["sha256"] for name, network in weights.items()},
        "SoftwareVersion": f"ldm_lib {__version__}",
        "Estimate": estimate,
        "Samples": sampling["n_samples"],
        **({} if estimate == "mean" else {"Seed": options.seed}),  # the mean depends on no seed
        "Sampler": sampling["sampler"],
        "Steps": sampling["num_inference_steps"],
        "TissueMap": "given" if data.case.tissue else "none" if data.tissue is None else "made from the scan",
        **({} if data.brain is None else {"BrainMask": _brain_mask_of(result)}),
    }


def _sidecar(inpainter: Inpainter, options: InpaintOptions, result: Inpainting) -> dict[str, Any]:
    """Return what an image was made from and how, in the terms of BIDS where it has them."""
    case = result.data.case
    files = (case.t1n_voided, case.mask, case.brain_mask)
    source, mask, *brain = (uri(path, data_set_of(case)) for path in files if path)
    return {
        "Sources": [source, mask, *brain],
        "SkullStripped": _is_stripped(result.data),
        "Synthetic": True,
        "SyntheticRegion": {"Mask": mask, "Dilation": case.dilate, "Voxels": int(result.data.mask.sum())},
    } | provenance(inpainter, options, result)


def _about_brain_mask(result: Inpainting) -> dict[str, Any]:
    case = result.data.case
    return {"Type": "Brain", "Sources": [uri(case.t1n_voided, data_set_of(case))], "BrainMask": _brain_mask_of(result)}


def _brain_mask_of(result: Inpainting) -> str:
    return "given" if result.data.case.brain_mask else f"made with deepbet {deepbet_version()}"


def _is_stripped(data: CaseData) -> bool:
    """Return whether a scan shows hardly anything but its brain."""
    if data.brain is None:
        return True
    return np.count_nonzero(data.source.voxels[~data.brain]) < REST * np.count_nonzero(data.brain)
