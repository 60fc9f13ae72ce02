"""Grow tumours of random place, size and shape, in the synthetic brains or in the segmented brain of a person."""

import numpy as np
from scipy import ndimage

from ldm_lib.anatomy.synthetic_brain import EXTENT_MM, Grid, as_volume, brats_grid, deformed_atlas
from ldm_lib.anatomy.tissue import smooth_field
from ldm_lib.anatomy.tumour_growth import random_tumour
from ldm_lib.errors import InputError

GROWTH_MM = 3.0  # voxel size of the grid on which tumours grow
SUPRATENTORIAL_MM = 62.0  # tumours start above this height


def synthetic_tumour(anatomy_rng: np.random.Generator, rng: np.random.Generator, deformation: float) -> np.ndarray:
    """Grow a tumour on the grid of GROWTH_MM in the brain that `anatomy_rng` draws: float32 (x, y, z) in [0, 1]."""
    brain = deformed_atlas(anatomy_rng, brats_grid(GROWTH_MM), deformation)
    grey, white = (as_volume(brain.inside, fraction) for fraction in brain.fractions[1:])
    return grow_in_brain(brain.inside, grey, white, rng)


def grow_in_brain(inside: np.ndarray, grey: np.ndarray, white: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grow a tumour on the grid of GROWTH_MM in a given brain: float32 (x, y, z) in [0, 1].

    Args:
        inside: bool (x, y, z), the brain.
        grey, white: tissue fractions (x, y, z) in [0, 1].
        rng: draws the patches of the tissue, the start, the size and the rates.

    Raises:
        InputError: no voxel in which a tumour may start.
    """
    grid = brats_grid(GROWTH_MM)
    # cells spread unevenly through tissue: tumours are lobed, not round
    patchy = 0.08 + 0.92 / (1 + np.exp(-3 * smooth_field(rng, grid.positions_mm, 9, EXTENT_MM)))
    grey, white = grey * patchy, white * patchy
    depth = ndimage.distance_transform_edt(inside, sampling=GROWTH_MM)
    allowed = (white > 0.3) & (depth > 10) & (grid.positions_mm[2] > SUPRATENTORIAL_MM)
    if not allowed.any():
        raise InputError("no white matter deeper than 10 mm above the tentorium, where a tumour could start",
                         where="tumour", fix="check the scan's contrast and its skull-stripping")  # fmt: skip
    return random_tumour(white, grey, allowed, rng, spacing_mm=GROWTH_MM)


def from_growth_grid(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Interpolate a field (x, y, z) linearly from the grid of GROWTH_MM to another grid, axis by axis."""
    for positions in grid.positions_mm:
        nodes = np.arange(field.shape[0])[:, None] + 0.5
        weights = np.clip(1 - np.abs(positions[None] / GROWTH_MM - nodes), 0, None)
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 0))
    return field


def to_growth_grid(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Average a field (x, y, z) on a grid over the voxels of the grid of GROWTH_MM, axis by axis: float32."""
    for count in brats_grid(GROWTH_MM).shape:
        low, source_low = np.arange(count)[:, None] * GROWTH_MM, np.arange(field.shape[0]) * grid.spacing_mm
        overlap = np.minimum(low + GROWTH_MM, source_low + grid.spacing_mm) - np.maximum(low, source_low)
        weights = np.clip(overlap, 0, None) / GROWTH_MM
        field = np.tensordot(field.astype(np.float32), weights.astype(np.float32), axes=(0, 1))
    return field
