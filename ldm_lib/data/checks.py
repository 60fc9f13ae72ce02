"""Whether an image and its mask can be what they are said to be: a head of usual size, with the hole in its brain."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from ldm_lib.data.volume import Volume
from ldm_lib.errors import InputError

LARGEST_BRAIN_L = 2.5  # with its CSF; real ones measured 1.2 and 1.6, heads with skull and neck have 4 and more
BRATS_MM = (240, 240, 155)  # field of view along the axes of LPS
LARGEST_ANISOTROPY = 1.5  # longest over shortest edge of a voxel
LARGEST_HOLE = 0.5  # share of the head; the challenge's largest have a fifth
CENTRED = 0.1  # share of negative voxels beyond which intensities have been centred


def require_in_brain(
    mask: np.ndarray, voided: np.ndarray, target: np.ndarray | None, *, where: Path, warnings: list[str]
) -> None:
    """A hole has brain around it or, where the truth is known, in it; without the truth there is only a warning.

    Args:
        mask: x y z, bool.
        voided: x y z, 0 under the mask.
        target: the full image, or None.
    """
    along = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(places[0] - 1, 0), places[-1] + 2) for places in along)
    around = ndimage.binary_dilation(mask[box]) & ~mask[box]
    if target is not None and not (target[mask] > 0).any():
        raise InputError(f"0 % of its {int(mask.sum())} voxels lie in the brain: there is nothing to learn or to score",
                         where=where, fix="check that mask and image belong together")  # fmt: skip
    if (share := np.count_nonzero(mask) / (np.count_nonzero(mask) + np.count_nonzero(voided))) > LARGEST_HOLE:
        warnings.append(f"the mask covers {share:.0%} of what is not air: little is left to tell how it was")
    if not (voided[box][around] > 0).any():
        warnings.append(f"0 % of the voxels around the mask ({int(mask.sum())} voxels) lie in the brain")


def oddities(voided: np.ndarray, source: Volume) -> list[str]:
    """What is unlike the images that this project is made for, and may be filled badly.

    Args:
        voided: x y z, source units, 0 under the mask.
    """
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
        share = negative / max(np.count_nonzero(voided), 1)
        told = f"{negative} negative voxels, down to {voided.min():g}; read as 0"
        looks = f" although they are {share:.0%} of what is not 0: give intensities from before centring, or air as 0"
        warnings.append(told + (looks if share > CENTRED else ""))
    return warnings
