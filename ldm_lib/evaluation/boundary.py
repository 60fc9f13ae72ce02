"""Is the edge of a filled hole visible? Steps across it and beside it, in pairs of voxels that share a face.

next inward | inside || outside | next outward      along each axis, both ways; || is the mask's edge
"""

from collections.abc import Iterator

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

STEP, BIAS, GRADIENT = "edge step", "edge bias", "edge gradient"


def boundary_scores(volume: np.ndarray, voided: np.ndarray, mask: np.ndarray, scale: float) -> dict[str, float]:
    """Three figures of the seam; a hole whose edge cannot be seen has 1, 0 and 1, as the truth nearly has.

    `edge step` is the mean |inside - outside| over the mean |outside - next outward|: above 1 the edge shows.
    `edge bias` is the mean of inside - outside, over the scale. `edge gradient` is the mean |next inward - inside| over
    the mean |outside - next outward|: below 1 the hole is smoother than what lies around it, above 1 rougher. Only
    where both outer voxels are known brain; NaN where there is no such place.

    Args:
        volume: (x, y, z) filled.
        voided: (x, y, z) 0 where there is no brain.
        mask: (x, y, z) bool, True in the hole.
        scale: the case's intensity divisor.

    Raises:
        InputError: shapes that differ.
    """
    if not volume.shape == voided.shape == mask.shape:
        raise InputError(f"shapes differ: {volume.shape}, {voided.shape}, {mask.shape}", fix="give volumes of one grid")
    across, beside, within = ([np.empty(0)] for _ in range(3))
    for values, brain, hole in _lines(volume, voided != 0, mask):
        edge = hole[1] & ~hole[2] & ~hole[3] & brain[2] & brain[3]
        across.append((values[1] - values[2])[edge])
        beside.append((values[2] - values[3])[edge])
        within.append((values[0] - values[1])[edge & hole[0]])
    across, beside, within = (np.concatenate(parts) for parts in (across, beside, within))
    usual = _mean(np.abs(beside))
    return {STEP: _over(_mean(np.abs(across)), usual), BIAS: _mean(across) / scale,
            GRADIENT: _over(_mean(np.abs(within)), usual)}  # fmt: skip


def _lines(volume: np.ndarray, brain: np.ndarray, mask: np.ndarray) -> Iterator[list[list[np.ndarray]]]:
    """For each axis and way along it, of each array the four neighbours of every place, from inside to outside."""
    if not mask.any():
        return
    box = bounding_box(mask, 2)
    # beyond the volume there is neither hole nor brain
    padded = [np.pad(array[box], 2) for array in (volume.astype(np.float64), brain, mask)]
    for axis in range(3):
        for way in (1, -1):
            turned = [np.flip(np.moveaxis(array, axis, 0), 0) if way < 0 else np.moveaxis(array, axis, 0)
                      for array in padded]  # fmt: skip
            yield [[array[k : len(array) - 3 + k] for k in range(4)] for array in turned]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan


def _over(value: float, usual: float) -> float:
    return value / usual if usual > 0 else np.nan
