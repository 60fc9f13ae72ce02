"""One hole and one noise, told different things: does the model obey, and what would another tumour look like?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.options import DEFAULT_RATES, GrowthRates
from ldm_lib.anatomy.tissue import GM, WM
from ldm_lib.anatomy.tumour_growth import grow_tumour
from ldm_lib.data.case import CaseData
from ldm_lib.diffusion.latents import Latents
from ldm_lib.errors import InputError
from ldm_lib.inpainting.inpainter import Inpainter

AS_USED, GIVEN, SHUFFLED, EMPTY = "as used", "given", "shuffled", "empty"
HEALTHY = "healthy"


@dataclass(frozen=True)
class ConditioningVariant:
    """What the model is told of a case: its latents, drawn from what it was told, and the scale of guidance."""

    latents: Latents
    guidance: float = 1.0


def tellings(
    inpainter: Inpainter, data: CaseData, *, other: CaseData, given: CaseData | None = None, guidance: float = 1.0
) -> dict[str, ConditioningVariant]:
    """The same case with different conditioning, by name.

    "as used" has its own maps, "given" those of `given` (the same case, with the maps that came with it), "shuffled"
    those of another patient, and "empty" none: the learned null where the model has one, else maps of zeros.
    """
    told = {AS_USED: data} | ({} if given is None else {GIVEN: given})
    told[SHUFFLED] = replace(data, **{name: on_grid_of(data, other, name) for name in ("growth", "tissue")})
    found = {name: ConditioningVariant(inpainter.encode(case), guidance) for name, case in told.items()}
    nothing = inpainter.encode(replace(data, growth=np.zeros_like(data.voided), tissue=None))
    return found | {
        EMPTY: ConditioningVariant(nothing, 0.0 if inpainter.model.denoiser.supports_unconditional else guidance)
    }


def on_grid_of(data: CaseData, other: CaseData, name: str) -> np.ndarray | None:
    """Another patient's map, in LPS order cut or padded behind to a case's own grid."""
    volume = getattr(other, name)
    if volume is None:
        return None
    shape = data.lps(data.mask).shape
    cut = other.lps(volume)[tuple(slice(n) for n in shape)]
    padded = np.pad(cut, [(0, n - have) for n, have in zip(shape, cut.shape, strict=True)])
    return data.frame(1).to_file(padded)


def fill_each(
    inpainter: Inpainter, data: CaseData, told: Mapping[str, ConditioningVariant], **how: Any
) -> dict[str, np.ndarray]:
    """One sample for each telling, all from one noise: name -> (x, y, z) in the file's order and units."""
    return {
        name: inpainter(data, n_samples=1, latents=t.latents, guidance=t.guidance, **how).mean
        for name, t in told.items()
    }


def start_of_tumour_mm(data: CaseData) -> tuple[float, float, float]:
    """Where a tumour of this hole would start, in the file's world (RAS, mm).

    It is the hole's highest concentration, or without growth the white or grey voxel deepest in the hole.

    Raises:
        InputError: the case has no tissue map, or no white or grey matter in its hole.
    """
    solid = np.isin(data.tissue, (GM, WM)) & data.mask if data.tissue is not None else np.zeros(data.mask.shape, bool)
    if not solid.any():
        raise InputError("no white or grey matter in its hole", where=data.case.key, fix="give a tissue map")
    depth = ndimage.distance_transform_edt(data.mask, sampling=data.source.spacing_mm)
    worth = depth if data.growth is None or not (data.growth * solid).any() else data.growth
    voxel = np.unravel_index(np.argmax(np.where(solid, worth, -1)), solid.shape)
    return tuple((data.source.affine @ [*voxel, 1])[:3].tolist())


def tumours_in_time(
    data: CaseData,
    days: Sequence[float],
    *,
    seed_mm: Sequence[float] | None = None,
    rates: GrowthRates = DEFAULT_RATES,
) -> dict[str, np.ndarray]:
    """Growth maps (x, y, z) of one tumour at several ages, in the case's own tissue; 0 days is healthy.

    Raises:
        InputError: no tissue map, or a start outside white and grey matter.
    """
    seed_mm = start_of_tumour_mm(data) if seed_mm is None else seed_mm
    nothing = np.zeros(data.mask.shape, np.float32)
    grown = {
        age: grow_tumour(data.tissue, data.source.affine, age, seed_mm=seed_mm, rates=rates)
        for age in days
        if age
    }
    return {f"{age:g} days" if age else HEALTHY: grown.get(age, nothing) for age in days}


def fill_with_growths(
    inpainter: Inpainter, data: CaseData, growths: Mapping[str, np.ndarray], *, guidance: float = 1.0, **how: Any
) -> dict[str, np.ndarray]:
    """One sample for each growth map, all from one noise: name -> (x, y, z) in the file's order and units."""
    told = {
        name: ConditioningVariant(inpainter.encode(replace(data, growth=growth)), guidance)
        for name, growth in growths.items()
    }
    return fill_each(inpainter, data, told, **how)
