"""Convert a case to the grid of a network, and its maps to the conditioning tensor."""

from dataclasses import dataclass

import numpy as np

from ldm_lib.anatomy.tissue import one_hot
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD, threshold_growth
from ldm_lib.data.case import CaseData
from ldm_lib.data.volume import normalise
from ldm_lib.geometry import block_centre, block_mean, latent_mask

CONDITIONING_CHANNELS = ("growth", "CSF", "GM", "WM")


@dataclass(frozen=True)
class GridCase:
    """Hold one case on the model's padded LPS grid; every array is (x, y, z)."""

    voided: np.ndarray  # float32, normalised, 0 under the mask
    target: np.ndarray | None  # float32, normalised full image
    mask: np.ndarray  # bool, True = voxels to inpaint
    unknown: np.ndarray  # bool, voxels that are excluded from the loss: unhealthy ones without a growth map
    growth: np.ndarray  # float32 in [0, 1]; zero (healthy) when missing
    tissue: np.ndarray  # uint8 labels 0..3; zero (unlabelled) when missing


def grid_case(data: CaseData, multiple: int) -> GridCase:
    """Normalise a case and reorder and pad it to the grid of a network that divides each axis by `multiple`."""
    to_model = data.frame(multiple).to_model
    nothing = np.zeros(data.mask.shape, bool)
    without_growth = data.growth is None and data.unhealthy is not None
    return GridCase(
        voided=to_model(normalise(data.voided, data.scale)),
        target=None if data.target is None else to_model(normalise(data.target, data.scale)),
        mask=to_model(data.mask),
        unknown=to_model(data.unhealthy if without_growth else nothing),
        growth=to_model(nothing.astype(np.float32) if data.growth is None else data.growth),
        tissue=to_model(nothing.astype(np.uint8) if data.tissue is None else data.tissue),
    )


def conditioning(
    growth: np.ndarray, tissue: np.ndarray, *, factor: int, threshold: float = GROWTH_THRESHOLD, pooling: str = "area"
) -> np.ndarray:
    """Return growth (x, y, z) in [0, 1] and one-hot tissue, of labels (x, y, z), as float32 (4, x/f, y/f, z/f).

    Args:
        factor: voxels per latent voxel and axis.
        threshold: concentrations below it become 0, the others are kept.
        pooling: "area" is the mean over a latent voxel (for a label: its fraction), "nearest" the voxel at its centre.
    """
    channels = np.concatenate([threshold_growth(growth, threshold)[None], one_hot(tissue)])
    pool = {"area": block_mean, "nearest": block_centre}[pooling]
    return pool(channels, factor).astype(np.float32)


def loss_mask(case: GridCase, factor: int, dilation: int) -> np.ndarray:
    """Return the latent voxels (x/f, y/f, z/f) bool that enter the loss: inpainted, and not `unknown`."""
    return latent_mask(case.mask, factor, dilation) & ~latent_mask(case.unknown, factor, 0)
