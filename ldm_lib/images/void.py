"""Find void inside the brain that no mask covers: a mask that lies elsewhere than the region it was made for."""

from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box, face_neighbours
from ldm_lib.images.volume import Volume

BLOCK_MM = 4.0
LEAST_ML = 1.0  # cubes of 4 mm that a skull-strip left void inside 31 real brains: at most 0.5 mL
CUBE = 3  # blocks along the edge of what counts at the brain's surface; fissures of real brains hold none of 12 mm
FITTING = 0.5  # fraction of a mask's neighbours that are brain, if it ends where the void ends


def require_void_covered(source: Volume, mask: np.ndarray, *, where: Path, warnings: list[str]) -> None:
    """Warn if there is void inside the brain outside the mask; InputError if it is more than the mask covers.

    Inside means between voxels of the brain along all three axes, or, for large regions at its surface, along two.
    """
    void = source.voxels == 0
    if void[~mask].all():
        return
    edges = [max(2, round(BLOCK_MM / mm)) for mm in source.spacing_mm]
    box = bounding_box(~void & ~mask)
    empty = _blocks(void[box] & ~mask[box], edges, all_of=True)
    brain = _blocks(~void[box] & ~mask[box], edges, all_of=False)
    sides = sum(_between(brain, axis).astype(int) for axis in range(3))
    found = (empty & (sides == 3)) | _opened(empty & (sides >= 2))
    count = int(found.sum() * np.prod(edges))
    if count * np.prod(source.spacing_mm) / 1000 < LEAST_ML:
        return
    middle = tuple(int(c * e + e / 2 + s.start) for c, e, s in zip(np.argwhere(found).mean(0), edges, box, strict=True))
    inside = sides >= 2
    for axis, edge in enumerate(edges):
        inside = np.repeat(inside, edge, axis)
    inside = inside[tuple(slice(n) for n in void[box].shape)]
    covered = int(np.count_nonzero(void[box] & mask[box] & inside))
    text = (
        f"about {count} void voxels inside the brain, around {middle}, are not under the mask, which covers {covered}; "
        f"{np.count_nonzero(mask & ~void)} of {np.count_nonzero(mask)} voxels under it are not void"
    )
    around = face_neighbours(mask)
    if count > covered and (not void[mask].all() or (~void[around]).mean() < FITTING):
        raise InputError(
            text, where=where, fix="check that mask and image belong together, and that neither is flipped"
        )
    warnings.append(f"{text}; what it does not cover is read as air")


def _blocks(region: np.ndarray, edges: list[int], *, all_of: bool) -> np.ndarray:
    """Return which blocks of a region (x, y, z) are full, or hold a voxel of it; the last ones may be smaller."""
    padded = np.pad(region, [(0, -n % e) for n, e in zip(region.shape, edges, strict=True)], constant_values=False)
    shape = [n for size, edge in zip(padded.shape, edges, strict=True) for n in (size // edge, edge)]
    reduce = np.all if all_of else np.any
    return reduce(padded.reshape(shape), axis=(1, 3, 5))


def _between(region: np.ndarray, axis: int) -> np.ndarray:
    """Return what has some of a region on both sides along an axis."""
    before = np.maximum.accumulate(region, axis)
    return before & np.flip(np.maximum.accumulate(np.flip(region, axis), axis), axis)


def _opened(region: np.ndarray) -> np.ndarray:
    """Return what lies in a cube of CUBE blocks along its edge within a region: its morphological opening."""
    opened = np.pad(region, CUBE)
    for reduce, sign in ((np.all, -1), (np.any, 1)):
        for axis in range(3):
            opened = reduce([np.roll(opened, sign * step, axis) for step in range(CUBE)], axis=0)
    return opened[CUBE:-CUBE, CUBE:-CUBE, CUBE:-CUBE]
