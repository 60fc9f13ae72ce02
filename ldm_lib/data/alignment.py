"""Bring a scan of any grid and orientation to the BraTS grid: turned and moved rigidly, with its size kept."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import linalg, ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.registration import Registration
from ldm_lib.anatomy.synthetic_brain import ATLAS_CENTRE_VOX, CENTRE_MM, Grid, as_volume
from ldm_lib.geometry import blur_for

MIN_INSIDE = 0.5  # fraction of a target voxel that is brain, from which on it counts as brain


@dataclass(frozen=True)
class Alignment:
    """Hold a scan on the BraTS grid, and how it came there."""

    image: np.ndarray  # float32 (x, y, z), source units, above 0 in the brain and exactly 0 outside
    rigid: np.ndarray  # (4, 4) from the scan's world to the grid's (RAS, mm)
    registration: Registration  # of the atlas to `image`
    outside: float  # fraction of the brain's voxels that the grid cuts off

    @property
    def turned_degrees(self) -> float:
        """Angle by which the head was turned."""
        return float(np.degrees(Rotation.from_matrix(self.rigid[:3, :3]).magnitude()))


def align(image: np.ndarray, registration: Registration, grid: Grid) -> Alignment:
    """Turn and move a scan to the BraTS grid and resample it once.

    Args:
        image: (x, y, z) on the grid of the registration's patient, above 0 in the brain and 0 outside.
        registration: of the atlas to this scan.
        grid: the BraTS field of view in voxels of some size.
    """
    rigid = rigid_map(registration, grid)
    from_grid = np.linalg.solve(rigid, grid.affine)  # voxel of the grid -> scan's world
    moved = resample_brain(image, registration.affine, from_grid, grid)
    no_mask = np.zeros(grid.shape, bool)
    placed = replace(registration, affine=from_grid, image=moved, mask=no_mask)
    brain = np.argwhere(image > 0)
    position = _transformed(np.linalg.solve(from_grid, registration.affine), brain.T)
    cut = ((position < -0.5) | (position > np.array(grid.shape)[:, None] - 0.5)).any(0)
    return Alignment(moved, rigid, placed, float(cut.mean()))


def rigid_map(registration: Registration, grid: Grid) -> np.ndarray:
    """Return the rigid part of a registration's affine map, (4, 4) from the scan's world to that of the grid.

    The rotation is the orthogonal factor of the polar decomposition, the rotation nearest to the affine map (Higham
    1986, SIAM J Sci Stat Comput 7:1160). The point that the affine map takes to the atlas's centre comes to the place
    that this centre has in the grid.
    """
    to_scan = np.linalg.inv(registration.start)  # from the atlas
    rotation, _ = linalg.polar(np.linalg.inv(to_scan[:3, :3]))
    centre = (to_scan @ registration.atlas.affine @ [*ATLAS_CENTRE_VOX, 1])[:3]
    target = (grid.affine @ [*(np.array(CENTRE_MM) / grid.spacing_mm - 0.5), 1])[:3]
    rigid = np.eye(4)
    rigid[:3, :3], rigid[:3, 3] = rotation, target - rotation @ centre
    return rigid


def resample_brain(image: np.ndarray, affine: np.ndarray, from_grid: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample a skull-stripped scan by cubic splines: float32 (x, y, z), above 0 in the brain, exactly 0 outside.

    Air is filled with the nearest brain voxel first, so that the brain's edge neither darkens nor rings.

    Args:
        image: (x, y, z), above 0 in the brain and 0 outside.
        affine: voxel of the scan to world (RAS, mm).
        from_grid: voxel of the grid to the same world.
    """
    spacing_mm, brain = np.linalg.norm(affine[:3, :3], axis=0), image > 0
    nearest = ndimage.distance_transform_edt(~brain, spacing_mm, return_distances=False, return_indices=True)
    filled, weight = image[tuple(nearest)].astype(np.float32), brain.astype(np.float32)
    sigma = blur_for(grid.spacing_mm / spacing_mm)
    if any(sigma):
        filled, weight = (ndimage.gaussian_filter(volume, sigma) for volume in (filled, weight))
    to_scan = np.linalg.solve(affine, from_grid)
    inside = ndimage.affine_transform(weight, to_scan, output_shape=grid.shape, order=1) >= MIN_INSIDE
    points = _transformed(to_scan, np.argwhere(inside).T)
    values = ndimage.map_coordinates(filled, points, order=3, mode="nearest")
    return as_volume(inside, np.maximum(values, image[brain].min()))


def _transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a (4, 4) matrix to points (3, n)."""
    return matrix[:3, :3] @ points + matrix[:3, 3:]
