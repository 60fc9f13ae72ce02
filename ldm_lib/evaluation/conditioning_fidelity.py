"""Whether a filled hole holds what was asked for: its tissues, and the tumour where growth was given.

The tissue of a filled voxel is told from its intensity alone, by what the tissues look like outside the hole in the
same scan. Of the truth this is told in the same way, which bounds what a fill can reach.
"""

import numpy as np

from ldm_lib.anatomy.tissue import TISSUES

LEAK_MARGIN = 0.1  # by which a given map may know the hidden image better than the atlas does
FEWEST_VOXELS = 20  # of a tissue outside the hole, to tell what it looks like


def tissue_by_intensity(volume: np.ndarray, labels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The most likely tissue of every voxel in the hole: labels uint8 (x, y, z), 0 outside the hole and in air.

    Tissues are normal distributions of intensity with the mean and standard deviation they have outside the hole.

    Args:
        volume: filled or true image (x, y, z).
        labels: tissue outside the hole (x, y, z), 1 CSF, 2 GM, 3 WM; what it says in the hole is not looked at.
        hole: bool (x, y, z).
    """
    values, found = volume[hole].astype(np.float64), np.zeros(volume.shape, np.uint8)
    misfit = np.full((len(TISSUES), values.size), np.inf)
    for row, tissue in enumerate(TISSUES):
        seen = volume[(labels == tissue) & ~hole & (volume != 0)].astype(np.float64)
        if seen.size >= FEWEST_VOXELS:
            std = max(float(seen.std()), 1e-6 * max(abs(float(seen.mean())), 1e-6))
            misfit[row] = ((values - seen.mean()) / std) ** 2 / 2 + np.log(std)
    found[hole] = np.where(values != 0, 1 + misfit.argmin(0), 0)
    return found


def tissue_dice(asked: np.ndarray, found: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """Dice overlap of each tissue, and their `mean`, within `where`, (x, y, z) all; NaN for a tissue in neither."""
    dice = {}
    for tissue, name in TISSUES.items():
        a, b = (labels[where] == tissue for labels in (asked, found))
        both = int(a.sum() + b.sum())
        dice[name] = 2 * int((a & b).sum()) / both if both else np.nan
    known = [value for value in dice.values() if not np.isnan(value)]
    return dice | {"mean": float(np.mean(known)) if known else np.nan}


def growth_response(volume: np.ndarray, growth: np.ndarray, hole: np.ndarray, *, threshold: float) -> dict[str, float]:
    """Mean intensity of the filled voxels `inside` and `outside` the contour of the growth, and their `difference`.

    Only brain counts, that is what is not 0; NaN where the hole has no voxel on one side.
    """
    brain = hole & (volume != 0)
    sides = {"inside": brain & (growth >= threshold), "outside": brain & (growth < threshold)}
    means = {name: float(volume[side].mean()) if side.any() else np.nan for name, side in sides.items()}
    return means | {"difference": means["inside"] - means["outside"]}


def class_shift(volume: np.ndarray, labels: np.ndarray, outside: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """How far each tissue's mean in the fill lies from its mean outside the hole, in standard deviations there.

    Args:
        volume: filled image (x, y, z).
        labels: the tissue asked for (x, y, z).
        outside: bool (x, y, z), known healthy brain.
        where: bool (x, y, z), the filled voxels in question.

    Returns:
        tissue -> shift; one with fewer than 20 voxels on either side is left out.
    """
    shifts = {}
    for tissue, name in TISSUES.items():
        filled, seen = (volume[(labels == tissue) & part & (volume != 0)] for part in (where, outside))
        if min(filled.size, seen.size) >= FEWEST_VOXELS:
            shifts[name] = float((filled.mean(dtype=float) - seen.mean(dtype=float)) / seen.std(dtype=float))
    return shifts


def agreement(labels: np.ndarray, image: np.ndarray, outside: np.ndarray, hole: np.ndarray) -> float:
    """Share of the hole's voxels whose label is what the image's intensity says, in [0, 1].

    For the leak audit: a map that was made from the voided image cannot know the image under the mask this well.

    Args:
        labels: the map to be judged (x, y, z).
        image: the true image (x, y, z).
        outside: labels (x, y, z) that tell what the tissues look like outside the hole.
        hole: bool (x, y, z).
    """
    found = tissue_by_intensity(image, outside, hole)
    told = hole & (found > 0)
    return float((labels[told] == found[told]).mean()) if told.any() else np.nan
