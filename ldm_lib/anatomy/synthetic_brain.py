"""Make synthetic brains: the MNI152 templates, deformed at random, on a grid of any voxel size."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.tissue import CSF, smooth_field

EXTENT_MM = (240, 240, 155)  # the BraTS field of view
CENTRE_MM = (120.0, 126.0, 76.0)  # position of the brain's centre in it, from the corner of voxel 0
ATLAS_CENTRE_VOX = (98, 117, 77)  # centre of the MNI152 brain's bounding box
DEFORMATIONS_MM = {45: 2.8, 18: 1.9, 9: 0.8}  # node distance of a smooth field -> its standard deviation
# For each node distance, what a registration recovers of the field (a fraction), and the size of its own error
# relative to the field's standard deviation; both are ranges.
REGISTERED = {45: ((0.8, 1.05), (0.3, 0.3)), 18: ((0.1, 0.9), (0.0, 0.6)), 9: ((0.0, 0.0), (0.0, 0.5))}
REGISTERED_VENTRICLES = (0.6, 1.1)  # recovered fraction of their zoom
REGISTERED_ATROPHY = 0.4  # standard deviation of the logarithm of CSF's weight


class Grid(NamedTuple):
    """Describe the field of view in voxels of one size; positions are voxel centres along x, y, z from its corner."""

    shape: tuple[int, int, int]
    spacing_mm: float

    @property
    def positions_mm(self) -> list[np.ndarray]:
        return [(np.arange(n, dtype=np.float32) + 0.5) * self.spacing_mm for n in self.shape]

    @property
    def affine(self) -> np.ndarray:
        s, shift = self.spacing_mm, (self.spacing_mm - 1) / 2
        affine = np.diag([-s, -s, s, 1.0])
        affine[:3, 3] = -shift, 239 - shift, shift
        return affine


class Brain(NamedTuple):
    """Hold a healthy brain on a grid: a bool volume `inside` (x, y, z), and values of its n voxels in that order."""

    inside: np.ndarray
    fractions: np.ndarray  # CSF, GM, WM (3, n), sum 1
    detail: np.ndarray  # residual of T1 that the tissues do not explain (n,)

    @property
    def labels(self) -> np.ndarray:
        """uint8 (x, y, z): 0 background, 1 CSF, 2 GM, 3 WM."""
        return as_volume(self.inside, CSF + self.fractions.argmax(0), np.uint8)


def brats_grid(spacing_mm: float) -> Grid:
    """Return the BraTS field of view in isotropic voxels of this size."""
    return Grid(tuple(int(np.ceil(e / spacing_mm)) for e in EXTENT_MM), float(spacing_mm))


def as_volume(inside: np.ndarray, values: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Put values into the voxels inside and 0 outside: (x, y, z)."""
    volume = np.zeros(inside.shape, dtype)
    volume[inside] = values
    return volume


def make_brain(
    rng: np.random.Generator, grid: Grid, deformation: float, *, registration_rng: np.random.Generator | None = None
) -> Brain:
    """Deform the atlas into one brain; coarse voxels are the means of eight voxels of half their size.

    Args:
        rng: the brain is a function of its state, the same on every grid.
        deformation: factor on the deformation of the atlas.
        registration_rng: draws the errors of a registration of the atlas to this brain; the result is then the atlas
            as registered: with most of the coarse deformation, some of the finer and none of the finest.
    """
    if grid.spacing_mm < 2:
        return deformed_atlas(rng, grid, deformation, registration_rng=registration_rng)
    half = Grid(tuple(2 * n for n in grid.shape), grid.spacing_mm / 2)
    fine = deformed_atlas(rng, half, deformation, registration_rng=registration_rng)
    count = _block_sum(fine.inside, np.ones(1))
    inside = count >= 4
    values = np.stack([_block_sum(fine.inside, v)[inside] for v in (*fine.fractions, fine.detail)])
    values /= count[inside]
    return Brain(inside, values[:3], values[3])


def _block_sum(inside: np.ndarray, values: np.ndarray) -> np.ndarray:
    x, y, z = (n // 2 for n in inside.shape)
    return as_volume(inside, values).reshape(x, 2, y, 2, z, 2).sum((1, 3, 5))


def deformed_atlas(
    rng: np.random.Generator, grid: Grid, deformation: float, *, registration_rng: np.random.Generator | None = None
) -> Brain:
    """Sample the deformed atlas at the centre of each voxel; the arguments are those of `make_brain`."""
    points = _atlas_points(rng, grid, deformation, registration_rng)
    brain, *maps = _atlas()
    brain = ndimage.map_coordinates(brain, points, order=1)
    inside = brain >= 0.5
    points, brain = points[:, inside], brain[inside]
    grey, white, detail = (ndimage.map_coordinates(m, points, order=1) for m in maps)
    sharpness, atrophy = rng.uniform(1.4, 2.4), rng.uniform(-0.7, 0.8)
    if registration_rng is not None:  # the atlas does not have the patient's own tissue fractions
        sharpness, atrophy = 1.0, registration_rng.normal(0, REGISTERED_ATROPHY)
    fractions = np.maximum(np.stack([brain - grey - white, grey, white]), 1e-3) ** sharpness
    fractions[0] *= np.exp(atrophy)
    return Brain(inside, fractions / fractions.sum(0), detail)


@lru_cache(maxsize=1)
def _atlas() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the MNI152 brain, its GM and WM fractions, and the residual of its T1: each (x, y, z), RAS, 1 mm."""
    atlas = mni152()
    brain, (_, gm, wm) = atlas.brain, atlas.fractions
    values = atlas.fractions[:, brain]
    means = np.linalg.lstsq(values.T, atlas.t1[brain], rcond=None)[0]
    detail = np.zeros_like(atlas.t1)
    detail[brain] = np.clip(atlas.t1[brain] - means @ values, -0.12, 0.12)
    return brain.astype(np.float32), gm, wm, detail


def _atlas_points(
    rng: np.random.Generator, grid: Grid, deformation: float, registration_rng: np.random.Generator | None
) -> np.ndarray:
    """Return the atlas position (voxels) that each voxel of the grid takes its tissue from: float32 (3, x, y, z)."""
    x, y, z = (p - c for p, c in zip(grid.positions_mm, CENTRE_MM, strict=True))
    position = np.stack(np.meshgrid(-x, -y, z, indexing="ij")).astype(np.float32)
    rotation = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    matrix = rotation / (rng.uniform(0.90, 0.97) * rng.uniform(0.95, 1.05, 3))
    points = np.tensordot(matrix.astype(np.float32), position, axes=1)
    points += rng.normal(0, 2, (3, 1, 1, 1)).astype(np.float32)
    # ventricles: the map is zoomed about a point between their bodies
    zoom = rng.uniform(-0.25, 0.45)
    zoom *= 1.0 if registration_rng is None else registration_rng.uniform(*REGISTERED_VENTRICLES)
    hub, radius = (np.array(v, np.float32).reshape(3, 1, 1, 1) for v in ((0, -3, 8), (22, 40, 22)))
    points -= zoom * (points - hub) * np.exp(-(((points - hub) / radius) ** 2).sum(0) / 2)
    for node_mm, size_mm in DEFORMATIONS_MM.items():
        recovered, error = 1.0, 0.0
        if registration_rng is not None:
            recovered, error = (registration_rng.uniform(*bounds) for bounds in REGISTERED[node_mm])
        for axis in range(3):
            field = deformation * size_mm * smooth_field(rng, grid.positions_mm, node_mm, EXTENT_MM)
            points[axis] += recovered * field
            if error:
                points[axis] += error * size_mm * smooth_field(registration_rng, grid.positions_mm, node_mm, EXTENT_MM)
    return points + np.array(ATLAS_CENTRE_VOX, np.float32).reshape(3, 1, 1, 1)
