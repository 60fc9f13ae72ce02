"""Check whether an image and its mask are plausible: a head of usual size, with the mask in its brain."""

from pathlib import Path

import numpy as np

from ldm_lib.data.volume import Volume
from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

LARGEST_BRAIN_L = 2.5  # with its CSF; real ones measured 1.2 and 1.6, heads with skull and neck have 4 and more
BRATS_MM = (240, 240, 155)  # field of view along the axes of LPS
LARGEST_ANISOTROPY = 1.5  # longest over shortest edge of a voxel
LARGEST_MASK = 0.5  # fraction of the head; the challenge's largest masks cover a fifth


def require_in_brain(
    mask: np.ndarray, voided: np.ndarray, target: np.ndarray | None, *, where: Path, warnings: list[str]
) -> None:
    """Raise InputError if the ground truth is known and no brain is under the mask; warn if none is around it."""
    if target is not None and not (target[mask] > 0).any():
        raise InputError(f"0 % of its {int(mask.sum())} voxels lie in the brain: there is nothing to learn or to score",
                         where=where, fix="check that mask and image belong together")  # fmt: skip
    if (fraction := mask.sum() / (mask.sum() + np.count_nonzero(voided))) > LARGEST_MASK:
        warnings.append(f"the mask covers {fraction:.0%} of the head: little context is left to inpaint it from")
    box = bounding_box(mask, 1)
    around = np.zeros_like(mask[box])  # the faces' neighbours, by numpy because scipy.ndimage takes 0.4 s to load
    for axis in range(3):
        inside, neighbours = np.moveaxis(mask[box], axis, 0), np.moveaxis(around, axis, 0)
        neighbours[1:] |= inside[:-1]
        neighbours[:-1] |= inside[1:]
    if not (voided[box][around & ~mask[box]] > 0).any():
        warnings.append(f"0 % of the voxels around the mask ({int(mask.sum())} voxels) lie in the brain")


def image_warnings(voided: np.ndarray, source: Volume) -> list[str]:
    """List how an image, voided and in source units, differs from those that the models are made for."""
    warnings, spacing = [], np.array(source.spacing_mm)
    shape, sizes = "x".join(map(str, source.shape)), "x".join(f"{s:g}" for s in spacing)
    axes = [next(k for k, pair in enumerate(("LR", "PA", "SI")) if letter in pair) for letter in source.orientation]
    extent, usual = np.array(source.shape) * spacing, np.array(BRATS_MM)[axes]
    if (np.abs(extent - usual) > np.maximum(spacing, 1.5)).any():
        warnings.append(f"{shape} voxels of {sizes} mm are not BraTS's field of view of 240x240x155 mm: "
                        "out of training domain")  # fmt: skip
    if spacing.max() > LARGEST_ANISOTROPY * spacing.min():
        warnings.append(f"voxels of {sizes} mm are far from cubes: out of training domain")
    litres = float(np.count_nonzero(voided) * np.prod(spacing)) / 1e6
    if litres > LARGEST_BRAIN_L:
        warnings.append(f"{litres:.1f} litres are not 0, more than a brain: not skull-stripped, out of training domain")
    if negative := int(np.count_nonzero(voided < 0)):
        fraction = negative / np.count_nonzero(voided)
        warnings.append(f"{negative} negative voxels ({fraction:.0%} of the head), down to {voided.min():g}; read as 0")
    return warnings
