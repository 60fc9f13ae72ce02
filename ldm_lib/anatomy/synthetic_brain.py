"""Synthetic brains: the MNI152 templates, bent at random, on a grid of any voxel size."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.tissue import CSF, smooth_field

EXTENT_MM = (240, 240, 155)  # the BraTS field of view
CENTRE_MM = (120.0, 126.0, 76.0)  # where the brain's centre lies in it, from the corner of voxel 0
ATLAS_CENTRE_VOX = (98, 117, 77)  # the middle of the MNI152 brain's bounding box
DEFORMATIONS_MM = {45: 2.8, 18: 1.9, 9: 0.8}  # distance of a smooth field's nodes -> its standard deviation
# A registration's share of each bend, from and to, and how large its own errors are beside it, likewise.
REGISTERED = {45: ((0.8, 1.05), (0.3, 0.3)), 18: ((0.1, 0.9), (0.0, 0.6)), 9: ((0.0, 0.0), (0.0, 0.5))}
REGISTERED_VENTRICLES = (0.6, 1.1)  # of their zoom
REGISTERED_ATROPHY = 0.4  # standard deviation of the logarithm of CSF's weight


class Grid(NamedTuple):
    """The field of view in voxels of one size; positions of their centres along x, y, z in mm from its corner."""

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
    """A healthy brain on a grid: `inside` bool x y z, and values of its voxels in that order."""

    inside: np.ndarray
    shares: np.ndarray  # of CSF, GM, WM (3, n), sum 1
    detail: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """uint8 x y z, 0 background, 1 CSF, 2 GM, 3 WM."""
        return as_volume(self.inside, CSF + self.shares.argmax(0), np.uint8)


def grid_of(spacing_mm: float) -> Grid:
    """The BraTS field of view in isotropic voxels of this size."""
    return Grid(tuple(int(np.ceil(e / spacing_mm)) for e in EXTENT_MM), float(spacing_mm))


def as_volume(inside: np.ndarray, values: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Values of the voxels inside, 0 outside: x y z."""
    volume = np.zeros(inside.shape, dtype)
    volume[inside] = values
    return volume


def make_brain(
    rng: np.random.Generator, grid: Grid, deformation: float, *, missed: np.random.Generator | None = None
) -> Brain:
    """Bend the atlas into one brain; coarse voxels are the means of eight of half their size.

    Args:
        rng: the brain is a function of its state, the same on every grid.
        deformation: factor on how far the atlas is bent.
        missed: draws what a registration of the atlas to this brain gets wrong; then that is returned, the atlas as it
            was brought there: most of the slow bends, some of the quicker ones, none of the quickest.
    """
    if grid.spacing_mm < 2:
        return deformed_atlas(rng, grid, deformation, missed=missed)
    fine = deformed_atlas(rng, Grid(tuple(2 * n for n in grid.shape), grid.spacing_mm / 2), deformation, missed=missed)
    filled = _block_sum(fine.inside, np.ones(1))
    inside = filled >= 4
    values = np.stack([_block_sum(fine.inside, v)[inside] for v in (*fine.shares, fine.detail)])
    values /= filled[inside]
    return Brain(inside, values[:3], values[3])


def _block_sum(inside: np.ndarray, values: np.ndarray) -> np.ndarray:
    x, y, z = (n // 2 for n in inside.shape)
    return as_volume(inside, values).reshape(x, 2, y, 2, z, 2).sum((1, 3, 5))


def deformed_atlas(
    rng: np.random.Generator, grid: Grid, deformation: float, *, missed: np.random.Generator | None = None
) -> Brain:
    """The atlas at the centre of each voxel, see `make_brain`."""
    points = _atlas_points(rng, grid, deformation, missed)
    brain, *maps = _atlas()
    brain = ndimage.map_coordinates(brain, points, order=1)
    inside = brain >= 0.5
    points, brain = points[:, inside], brain[inside]
    grey, white, detail = (ndimage.map_coordinates(m, points, order=1) for m in maps)
    sharpness, atrophy = rng.uniform(1.4, 2.4), rng.uniform(-0.7, 0.8)
    if missed is not None:  # the atlas knows nothing of the patient's own shares
        sharpness, atrophy = 1.0, missed.normal(0, REGISTERED_ATROPHY)
    shares = np.maximum(np.stack([brain - grey - white, grey, white]), 1e-3) ** sharpness
    shares[0] *= np.exp(atrophy)
    return Brain(inside, shares / shares.sum(0), detail)


@lru_cache(maxsize=1)
def _atlas() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """From the MNI152 head (RAS, 1 mm), x y z: brain, shares of GM and WM (the rest is CSF), T1 beyond these."""
    atlas = mni152()
    brain, (_, gm, wm) = atlas.brain, atlas.shares
    values = atlas.shares[:, brain]
    means = np.linalg.lstsq(values.T, atlas.t1[brain], rcond=None)[0]
    detail = np.zeros_like(atlas.t1)
    detail[brain] = np.clip(atlas.t1[brain] - means @ values, -0.12, 0.12)
    return brain.astype(np.float32), gm, wm, detail


def _atlas_points(
    rng: np.random.Generator, grid: Grid, deformation: float, missed: np.random.Generator | None
) -> np.ndarray:
    """Where in the atlas (voxels) each voxel of the grid takes its tissue from: float32 (3, x, y, z)."""
    x, y, z = (p - c for p, c in zip(grid.positions_mm, CENTRE_MM, strict=True))
    position = np.stack(np.meshgrid(-x, -y, z, indexing="ij")).astype(np.float32)
    turn = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    matrix = turn / (rng.uniform(0.90, 0.97) * rng.uniform(0.95, 1.05, 3))
    points = np.tensordot(matrix.astype(np.float32), position, axes=1)
    points += rng.normal(0, 2, (3, 1, 1, 1)).astype(np.float32)
    # ventricles: the map is zoomed about a point between their bodies
    zoom = rng.uniform(-0.25, 0.45) * (1.0 if missed is None else missed.uniform(*REGISTERED_VENTRICLES))
    hub, radius = (np.array(v, np.float32).reshape(3, 1, 1, 1) for v in ((0, -3, 8), (22, 40, 22)))
    points -= zoom * (points - hub) * np.exp(-(((points - hub) / radius) ** 2).sum(0) / 2)
    for node_mm, size_mm in DEFORMATIONS_MM.items():
        kept, own = 1.0, 0.0
        if missed is not None:
            kept, own = (missed.uniform(*bounds) for bounds in REGISTERED[node_mm])
        for axis in range(3):
            field = deformation * size_mm * smooth_field(rng, grid.positions_mm, node_mm, EXTENT_MM)
            points[axis] += kept * field
            if own:
                points[axis] += own * size_mm * smooth_field(missed, grid.positions_mm, node_mm, EXTENT_MM)
    return points + np.array(ATLAS_CENTRE_VOX, np.float32).reshape(3, 1, 1, 1)
