"""Measure boundary artefacts: intensity steps across the mask's edge and next to it, between face neighbours.

next inward | inside || outside | next outward      along each axis, both ways; || is the mask's edge
"""

from collections.abc import Iterator

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

STEP, BIAS, GRADIENT = "edge step", "edge bias", "edge gradient"


def boundary_scores(volume: np.ndarray, voided: np.ndarray, mask: np.ndarray, scale: float) -> dict[str, float]:
    """Compute three scores of the boundary; an invisible edge has 1, 0 and 1, and the ground truth is close to that.

    `edge step` is the mean |inside - outside| over the mean |outside - next outward|: above 1 the edge is visible.
    `edge bias` is the mean of inside - outside, over the scale. `edge gradient` is the mean |next inward - inside| over
    the mean |outside - next outward|: below 1 the masked region is smoother than its surroundings, above 1 rougher.
    Only places where both outer voxels are known brain count; NaN if there are none.

    Args:
        volume: (x, y, z), inpainted where `mask` is True.
        voided: (x, y, z), 0 where there is no brain.
        scale: the case's intensity divisor.

    Raises:
        InputError: shapes that differ.
    """
    if not volume.shape == voided.shape == mask.shape:
        raise InputError(f"shapes differ: {volume.shape}, {voided.shape}, {mask.shape}", fix="give volumes of one grid")
    across, outside, within = ([np.empty(0)] for _ in range(3))
    for values, brain, inside in _lines(volume, voided != 0, mask):
        edge = inside[1] & ~inside[2] & ~inside[3] & brain[2] & brain[3]
        across.append((values[1] - values[2])[edge])
        outside.append((values[2] - values[3])[edge])
        within.append((values[0] - values[1])[edge & inside[0]])
    across, outside, within = (np.concatenate(parts) for parts in (across, outside, within))
    reference = _mean(np.abs(outside))
    return {STEP: _over(_mean(np.abs(across)), reference), BIAS: _mean(across) / scale,
            GRADIENT: _over(_mean(np.abs(within)), reference)}  # fmt: skip


def _lines(volume: np.ndarray, brain: np.ndarray, mask: np.ndarray) -> Iterator[list[list[np.ndarray]]]:
    """Yield, for each axis and direction, four consecutive voxels of each array at every place, from inside out."""
    if not mask.any():
        return
    box = bounding_box(mask, 2)
    # beyond the volume there is neither mask nor brain
    padded = [np.pad(array[box], 2) for array in (volume.astype(np.float64), brain, mask)]
    for axis in range(3):
        for direction in (1, -1):
            turned = [np.moveaxis(array, axis, 0)[::direction] for array in padded]
            yield [[array[k : len(array) - 3 + k] for k in range(4)] for array in turned]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan


def _over(value: float, reference: float) -> float:
    return value / reference if reference > 0 else np.nan
