"""Inpaint the same mask with the same noise under different conditioning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.tissue import GM, WM
from ldm_lib.anatomy.tumour_growth import grow_tumour
from ldm_lib.data.case import CaseData
from ldm_lib.diffusion.latents import Latents
from ldm_lib.errors import InputError
from ldm_lib.evaluation.case_scores import conditioned_path
from ldm_lib.evaluation.conditioning_fidelity import class_shift
from ldm_lib.images.volume import write_like, write_map
from ldm_lib.inpainting.inpainter import Inpainter

AS_USED, GIVEN, SHUFFLED, EMPTY = "as used", "given", "shuffled", "empty"
HEALTHY = "healthy"


@dataclass(frozen=True)
class ConditioningVariant:
    """Hold the latents of a case under one conditioning, and the scale of classifier-free guidance."""

    latents: Latents
    guidance: float = 1.0


def conditioning_variants(
    inpainter: Inpainter, data: CaseData, *, other: CaseData, given: CaseData | None = None, guidance: float = 1.0
) -> dict[str, ConditioningVariant]:
    """Encode the same case under different conditioning, by name.

    "as used" has its own maps, "given" those of `given` (the same case, with the maps that came with it), "shuffled"
    those of another patient, and "empty" none: the learned null embedding if the model has one, else maps of zeros.
    """
    variants = {AS_USED: data} | ({} if given is None else {GIVEN: given})
    variants[SHUFFLED] = replace(data, **{name: on_grid_of(data, other, name) for name in ("growth", "tissue")})
    found = {name: ConditioningVariant(inpainter.encode(case), guidance) for name, case in variants.items()}
    nothing = inpainter.encode(replace(data, growth=np.zeros_like(data.voided), tissue=None))
    unconditional = 0.0 if inpainter.model.denoiser.supports_unconditional else guidance
    return found | {EMPTY: ConditioningVariant(nothing, unconditional)}


def guided(variants: Mapping[str, ConditioningVariant], scales: Sequence[float]) -> dict[str, ConditioningVariant]:
    """Return the case's own maps at several scales of classifier-free guidance: "guidance <scale>" -> variant."""
    return {f"guidance {scale:g}": replace(variants[AS_USED], guidance=scale) for scale in scales}


def on_grid_of(data: CaseData, other: CaseData, name: str) -> np.ndarray | None:
    """Return another patient's map on a case's own grid: cut or zero-padded at the end of each axis in LPS order."""
    volume = getattr(other, name)
    if volume is None:
        return None
    shape = data.lps(data.mask).shape
    cut = other.lps(volume)[tuple(slice(n) for n in shape)]
    padded = np.pad(cut, [(0, n - have) for n, have in zip(shape, cut.shape, strict=True)])
    return data.frame(1).to_file(padded)


def inpaint_variants(
    inpainter: Inpainter, data: CaseData, variants: Mapping[str, ConditioningVariant], **sampling: Any
) -> dict[str, np.ndarray]:
    """Draw one sample for each variant, all from the same noise: name -> (x, y, z) in the file's order and units.

    `sampling` are seed, sampler and num_inference_steps, as `Inpainter` takes them.
    """
    return {
        name: inpainter(data, latents=variant.latents, guidance=variant.guidance, **sampling).mean
        for name, variant in variants.items()
    }


def tumour_seed_mm(data: CaseData) -> tuple[float, float, float]:
    """Choose the seed point of a tumour in the mask, in the file's world (RAS, mm).

    It is the voxel of highest concentration, or without a growth map the white or grey voxel deepest in the mask.
    """
    solid = np.isin(data.tissue, (GM, WM)) & data.mask if data.tissue is not None else np.zeros(data.mask.shape, bool)
    if not solid.any():
        raise InputError("no white or grey matter in its mask", where=data.case.key, fix="give a tissue map")
    depth = ndimage.distance_transform_edt(data.mask, sampling=data.source.spacing_mm)
    score = depth if data.growth is None or not (data.growth * solid).any() else data.growth
    voxel = np.unravel_index(np.argmax(np.where(solid, score, -1)), solid.shape)
    return tuple((data.source.affine @ [*voxel, 1])[:3].tolist())


def tumours_in_time(data: CaseData, days: Sequence[float]) -> dict[str, np.ndarray]:
    """Grow one tumour from `tumour_seed_mm` to several ages: growth maps (x, y, z) by name; 0 days is healthy."""
    seed_mm, nothing = tumour_seed_mm(data), np.zeros(data.mask.shape, np.float32)
    grown = {age: grow_tumour(data.tissue, data.source.affine, age, seed_mm=seed_mm) for age in days if age}
    return {f"{age:g} days" if age else HEALTHY: grown.get(age, nothing) for age in days}


def inpaint_with_growths(
    inpainter: Inpainter, data: CaseData, growths: Mapping[str, np.ndarray], *, guidance: float = 1.0, **sampling: Any
) -> dict[str, np.ndarray]:
    """Draw one sample for each growth map, as `inpaint_variants` does for each variant."""
    latents = {name: inpainter.encode(replace(data, growth=growth)) for name, growth in growths.items()}
    variants = {name: ConditioningVariant(encoded, guidance) for name, encoded in latents.items()}
    return inpaint_variants(inpainter, data, variants, **sampling)


def write_variants(data: CaseData, volumes: Mapping[str, np.ndarray], results: Path) -> None:
    """Write the results of a case under different conditioning, where `case_scores.conditioned_path` finds them."""
    for name, volume in volumes.items():
        path = conditioned_path(results, data, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_like(path, data.source, volume, data.mask)


def write_with_growths(
    data: CaseData, volumes: Mapping[str, np.ndarray], growths: Mapping[str, np.ndarray], folder: Path
) -> None:
    """Write the results of a case with different growth maps, and the maps, as `<case>-<name>[-growth].nii.gz`."""
    folder.mkdir(exist_ok=True)
    for name, volume in volumes.items():
        stem = f"{data.case.key}-{name.replace(' ', '_')}"
        write_like(folder / f"{stem}.nii.gz", data.source, volume, data.mask)
        write_map(folder / f"{stem}-growth.nii.gz", growths[name], data.source.affine)


def healthy_shift(data: CaseData, volume: np.ndarray, *, threshold: float) -> dict[str, float]:
    """Compute `conditioning_fidelity.class_shift` of a result without tumour from the healthy brain outside the mask.

    `threshold` is the concentration from which there is tumour.
    """
    healthy = np.ones(data.mask.shape, bool) if data.growth is None else data.growth < threshold
    return class_shift(volume, data.tissue, (data.voided != 0) & ~data.mask & healthy, data.mask)
