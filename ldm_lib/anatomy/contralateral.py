"""Reflect a scan across its mid-sagittal plane: what the other hemisphere shows at the place of the mask.

The plane is where the visible brain correlates best with its mirror image. Hemispheres are alike in the size of their
ventricles, in deep nuclei and in large sulci, so that the visible one informs about the masked one.
"""

import numpy as np
import torch
from scipy import optimize
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.deformation import interpolate, voxels
from ldm_lib.geometry import block_mean, bounding_box

COARSE_MM = 4.0  # voxels on which the plane is found
SIMPLEX = (6.0, 6.0, 4.0)  # first steps of the search: degrees about the second and third axis, and mm
LEAST_POINTS = 50  # visible on both sides; with fewer, the plane is the middle of the brain
REACH_MM = 48.0  # around the box of the mask, within which the other hemisphere is shown


def midsagittal_reflection(image: np.ndarray, mask: np.ndarray, *, spacing_mm: float) -> np.ndarray:
    """Find the mid-sagittal plane of a brain, and return the reflection across it, voxel to voxel (4, 4).

    Args:
        image: (x, y, z), x along left and right, 0 in air; voxels under the mask are not read.
        mask: (x, y, z) bool.
        spacing_mm: edge of an isotropic voxel.
    """
    step = max(1, round(COARSE_MM / spacing_mm))
    padding = [(0, -n % step) for n in image.shape]
    volumes = mask, (image > 0) | mask, np.where(mask, 0, image)
    hidden, brain, values = (block_mean(np.pad(volume, padding), step) for volume in volumes)
    both = torch.from_numpy(np.stack([values, (hidden > 0).astype(np.float32)]))[None]
    points = np.argwhere((brain > 0) & (hidden == 0)).T
    extent = np.argwhere(brain > 0)
    centre = (extent.min(0) + extent.max(0)) / 2 if len(extent) else (np.array(brain.shape) - 1) / 2
    own, positions = values[tuple(points)], torch.from_numpy(points.astype(np.float32))[..., None, None]

    def misfit(parameters: np.ndarray) -> float:
        matrix = _reflection(parameters, centre, step * spacing_mm)
        other, behind = interpolate(both, positions, matrix)[0, ..., 0, 0].numpy()
        shown = behind < 1e-3
        if shown.sum() < LEAST_POINTS or not (own[shown].std() and other[shown].std()):
            return 0.0
        return -float(np.corrcoef(own[shown], other[shown])[0, 1])

    simplex = np.vstack([np.zeros(3), np.diag(SIMPLEX)])
    options = {"initial_simplex": simplex, "xatol": 0.05, "fatol": 1e-5, "maxiter": 200}
    found = optimize.minimize(misfit, np.zeros(3), method="Nelder-Mead", options=options)
    coarse = _reflection(found.x if found.fun < 0 else np.zeros(3), centre, step * spacing_mm)
    to_fine = np.diag([step, step, step, 1.0])
    to_fine[:3, 3] = (step - 1) / 2
    return to_fine @ coarse @ np.linalg.inv(to_fine)


def _reflection(parameters: np.ndarray, centre: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Return the reflection (4, 4) across a plane: two angles in degrees, and its distance from the centre in mm."""
    normal = Rotation.from_euler("yz", parameters[:2], degrees=True).apply([1.0, 0, 0])
    matrix = np.eye(4)
    matrix[:3, :3] -= 2 * np.outer(normal, normal)
    matrix[:3, 3] = 2 * (normal @ centre + parameters[2] / spacing_mm) * normal
    return matrix


def contralateral_image(estimate: np.ndarray, mask: np.ndarray, *, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mirror image of a scan around its mask, and where it is known.

    Args:
        estimate: (x, y, z), a scan whose masked region is filled; its values stay where the mirror image is hidden.
        mask: (x, y, z) bool.
        spacing_mm: edge of an isotropic voxel.

    Returns:
        float32 and bool (x, y, z): the other hemisphere where it is visible, within `REACH_MM` of the box of the mask;
        the estimate and False elsewhere.
    """
    values, known = estimate.astype(np.float32), np.zeros(mask.shape, bool)
    if not mask.any():
        return values, known
    voided = np.where(mask, 0, values)
    matrix = midsagittal_reflection(voided, mask, spacing_mm=spacing_mm)
    reached = bounding_box(mask, int(np.ceil(REACH_MM / spacing_mm)))
    known[reached] = True  # air is
    brain = bounding_box((values > 0) | mask, 1)
    box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(reached, brain, strict=True))
    both = torch.from_numpy(np.stack([voided, mask.astype(np.float32)]))[None]
    positions = voxels(mask[box].shape, [side.start for side in box])
    other, hidden = interpolate(both, positions, matrix)[0].numpy()
    known[box] = hidden < 0.5
    values[box] = np.where(known[box], other / np.maximum(1 - hidden, 0.5), values[box])
    return values, known
