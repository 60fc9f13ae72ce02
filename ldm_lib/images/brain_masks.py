"""Read the brain mask of a whole head, and cut a mask of voxels to inpaint to the brain."""

from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box
from ldm_lib.images.masks import mask_on_grid_of
from ldm_lib.images.options import ReadOptions
from ldm_lib.images.skull_strip import OTHERWISE, brain_of_head
from ldm_lib.images.volume import LARGEST_BRAIN_L, Volume, read_volume

LEAST_BRAIN_ML = 300.0  # newborns have about 350
RIM_MM = 20.0  # width of the brain around a mask that shows where the brain's surface was
SURE = 0.5  # of a map of probabilities
BRIGHT = 0.1  # of the intensity scale; noise around stripped brains is darker, 3.5 litres of a head are brighter
CUT = 0.05  # of a face of the box around an image; a neck, or a cheek, fills 0.07 to 0.16, stripped brains up to 0.02


def read_brain(
    path: Path | None, like: Volume, mask: np.ndarray, read_options: ReadOptions, warnings: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Read a brain mask and return the brain and the part of a mask that lies in it, both bool (x, y, z).

    Without a path the brain mask is made from the head, `like`. A lesion that a tool left out of the brain is part of
    it (`completed_brain`). How much of the mask lies outside is appended to `warnings`.

    Raises:
        InputError: a file that is rejected, or no voxel of the mask in the brain.
    """
    found = read_brain_mask(path, like, read_options, warnings) if path else _made_brain(like, mask, warnings)
    brain = completed_brain(found, mask, like.spacing_mm)
    inside, total_ml = mask & brain, _ml(mask, like)
    if not inside.any():
        raise InputError(f"0 % of the mask's {int(mask.sum())} voxels ({total_ml:.1f} mL) lie in this brain mask",
                         where=path or like.path,
                         fix="check that brain mask, mask and image belong together")  # fmt: skip
    if (left_ml := _ml(mask & ~brain, like)) > 0:
        warnings.append(f"{left_ml:.1f} of the mask's {total_ml:.1f} mL lie outside the brain; they stay as they are")
    return brain, inside


def require_stripped(voided: np.ndarray, source: Volume, scale: float) -> None:
    """Raise InputError for a whole head: litres of it are bright, and a side of the image, but not every one, cuts it.

    A stripped brain with noise around it passes, and so does an image whose air is bright.
    """
    bright = voided > BRIGHT * scale
    bright_l = float(np.count_nonzero(bright) * np.prod(source.spacing_mm)) / 1e6
    if bright_l <= LARGEST_BRAIN_L:
        return
    box = bright[bounding_box(voided != 0)]
    cut = [np.take(box, end, axis).mean() for axis in range(3) for end in (0, -1)]
    if min(cut) < 0.5 and max(cut) > CUT:
        cause = f"not skull-stripped: {bright_l:.1f} litres are bright, a brain has at most {LARGEST_BRAIN_L:g}"
        raise InputError(cause, where=source.path, fix="let its brain mask be made with --skull-strip, or "
                         "give it with `ldm inpaint --brain-mask FILE`")  # fmt: skip


def _made_brain(head: Volume, mask: np.ndarray, warnings: list[str]) -> np.ndarray:
    brain = brain_of_head(head, mask)
    if not LEAST_BRAIN_ML <= (brain_ml := _ml(brain, head)) <= 1000 * LARGEST_BRAIN_L:
        cause = f"deepbet finds {brain_ml:.0f} mL of brain; allowed: {LEAST_BRAIN_ML:g} to {1000 * LARGEST_BRAIN_L:g}"
        raise InputError(cause, where=head.path, fix=OTHERWISE)
    warnings.append(f"no brain mask given, made with deepbet: {brain_ml:.0f} mL")
    return brain


def read_brain_mask(path: Path, like: Volume, read_options: ReadOptions, warnings: list[str]) -> np.ndarray:
    """Read a brain mask on the grid of `like`, bool (x, y, z): what is above 0, or at least 0.5 in probabilities.

    So a skull-stripped image and a map of labels are brain masks, too.

    Raises:
        InputError: another grid, no voxel set, or less than `LEAST_BRAIN_ML`.
    """
    voxels = mask_on_grid_of(read_volume(path, read_options), like, read_options, warnings)
    brain = voxels >= SURE if voxels.max() <= 1 else voxels > 0
    if (brain_ml := _ml(brain, like)) < LEAST_BRAIN_ML:
        cause = f"the brain mask covers {brain_ml:.3g} mL, less than any brain ({LEAST_BRAIN_ML:g} mL)"
        raise InputError(cause if brain.any() else f"the brain mask is empty (0 of {brain.size} voxels)", where=path,
                         fix="mark the whole brain with 1")  # fmt: skip
    return brain


def completed_brain(brain: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Add to a brain (x, y, z) what it encloses, and what its convex hull around a mask covers of that mask.

    Tools for brain extraction leave out lesions, those at the surface, too. The hull is that of the brain in the mask's
    bounding box, widened by `RIM_MM`.
    """
    from scipy import ndimage  # it takes 0.4 s to load
    from scipy.spatial import ConvexHull, Delaunay, QhullError

    brain = ndimage.binary_fill_holes(brain)
    box = bounding_box(mask, np.ceil(RIM_MM / np.array(spacing_mm)).astype(int))
    near, asked = brain[box], mask[box] & ~brain[box]
    points = np.argwhere(near & ~ndimage.binary_erosion(near)) * spacing_mm
    try:
        corners = points[ConvexHull(points).vertices] if asked.any() and len(points) else None
    except QhullError:  # too few points, or flat
        corners = None
    if corners is not None:
        near[asked] = Delaunay(corners).find_simplex(np.argwhere(asked) * spacing_mm) >= 0
    return brain


def _ml(region: np.ndarray, like: Volume) -> float:
    return float(np.count_nonzero(region) * np.prod(like.spacing_mm) / 1000)
