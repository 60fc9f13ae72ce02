"""Measure conditioning fidelity: whether a result shows the tissues and the tumour of its conditioning maps.

The tissue of a voxel is inferred from its intensity alone, by the intensities of the tissues outside the mask in the
same scan. The ground truth is labelled in the same way, which bounds what a result can reach.
"""

import numpy as np

from ldm_lib.anatomy.tissue import TISSUES

LEAK_MARGIN = 0.1  # by which a given map may agree with the hidden image better than the atlas does
FEWEST_VOXELS = 20  # of a tissue outside the mask, to estimate its intensities


def tissue_by_intensity(volume: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Label the most likely tissue of every voxel in the mask: uint8 (x, y, z), 0 outside the mask and in air.

    Tissues are normal distributions of intensity with the mean and standard deviation they have outside the mask, by
    the labels there.
    """
    values, found = volume[mask].astype(np.float64), np.zeros(volume.shape, np.uint8)
    misfit = np.full((len(TISSUES), values.size), np.inf)
    for row, tissue in enumerate(TISSUES):
        seen = volume[(labels == tissue) & ~mask & (volume != 0)].astype(np.float64)
        if seen.size >= FEWEST_VOXELS:
            std = max(float(seen.std()), 1e-6 * max(abs(float(seen.mean())), 1e-6))
            misfit[row] = ((values - seen.mean()) / std) ** 2 / 2 + np.log(std)
    found[mask] = np.where(values != 0, 1 + misfit.argmin(0), 0)
    return found


def tissue_dice(requested: np.ndarray, found: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """Compute the Dice overlap of each tissue in a region, and their `mean`; NaN for a tissue in neither map."""
    dice = {}
    for tissue, name in TISSUES.items():
        a, b = (labels[region] == tissue for labels in (requested, found))
        both = int(a.sum() + b.sum())
        dice[name] = 2 * int((a & b).sum()) / both if both else np.nan
    known = [value for value in dice.values() if not np.isnan(value)]
    return dice | {"mean": float(np.mean(known)) if known else np.nan}


def growth_response(volume: np.ndarray, growth: np.ndarray, mask: np.ndarray, *, threshold: float) -> dict[str, float]:
    """Compute the mean intensity in the mask `inside` and `outside` the growth's contour, and their `difference`.

    Only brain counts, that is voxels that are not 0; NaN if the mask has no voxel on one side.
    """
    brain = mask & (volume != 0)
    sides = {"inside": brain & (growth >= threshold), "outside": brain & (growth < threshold)}
    means = {name: float(volume[side].mean()) if side.any() else np.nan for name, side in sides.items()}
    return means | {"difference": means["inside"] - means["outside"]}


def class_shift(volume: np.ndarray, labels: np.ndarray, outside: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """Compute how far each tissue's mean in the result lies from its mean outside the mask, in standard deviations.

    Args:
        labels: the tissue map of the conditioning (x, y, z).
        outside, inside: bool (x, y, z), known healthy brain, and the inpainted voxels in question.

    Returns:
        tissue -> shift; one with fewer than 20 voxels on either side is left out.
    """
    shifts = {}
    for tissue, name in TISSUES.items():
        filled, seen = (volume[(labels == tissue) & part & (volume != 0)] for part in (inside, outside))
        if min(filled.size, seen.size) >= FEWEST_VOXELS:
            shifts[name] = float((filled.mean(dtype=float) - seen.mean(dtype=float)) / seen.std(dtype=float))
    return shifts


def agreement(labels: np.ndarray, image: np.ndarray, outside: np.ndarray, mask: np.ndarray) -> float:
    """Compute the fraction of voxels in the mask whose label agrees with the image's intensity, in [0, 1].

    The leak audit compares it with that of a map made from the voided image. All volumes are (x, y, z); `outside` are
    labels by which the tissues' intensities outside the mask are estimated.
    """
    found = tissue_by_intensity(image, outside, mask)
    labelled = mask & (found > 0)
    return float((labels[labelled] == found[labelled]).mean()) if labelled.any() else np.nan
