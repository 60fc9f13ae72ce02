"""Make inpainting masks by the rules of the BraTS Local Synthesis challenge (Kofler et al. 2023, arXiv 2305.08992)."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box

UNHEALTHY_MARGIN_MM = 5.0  # around a tumour's segmentation
MIN_DISTANCE_MM, MIN_INSIDE = 5.0, 0.75  # of a healthy mask: from the unhealthy one, and its fraction in the brain
ROTATIONS, PLACES_PER_ROTATION = 40, 60  # attempts before placing a healthy mask fails


def dilate_mm(mask: np.ndarray, radius_mm: float, spacing_mm: float | Sequence[float]) -> np.ndarray:
    """Dilate a mask (x, y, z): True for each voxel whose centre is at most `radius_mm` from that of a mask voxel."""
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    out = mask != 0
    if not out.any():
        return out
    box = bounding_box(out, np.ceil(radius_mm / h).astype(int))
    # with a tolerance for rounding: 3 steps of 1.1 mm are 3.3 mm
    out[box] = ndimage.distance_transform_edt(~out[box], sampling=h) <= radius_mm + 1e-6
    return out


def shrink_mm(mask: np.ndarray, radius_mm: float, spacing_mm: float | Sequence[float]) -> np.ndarray:
    """Erode a mask, as the inverse of `dilate_mm`: keep voxels farther than `radius_mm` from its outside.

    If none would be left, the voxels farthest from the outside stay; bool, same shape.
    """
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    depth = ndimage.distance_transform_edt(np.pad(mask != 0, 1), sampling=h)[1:-1, 1:-1, 1:-1]
    return (mask != 0) & (depth > min(radius_mm + 1e-6, depth.max() * (1 - 1e-6)))


def healthy_mask(
    brain: np.ndarray,
    unhealthy: np.ndarray,
    donor: np.ndarray,
    rng: np.random.Generator,
    *,
    spacing_mm: float | Sequence[float],
    scale: tuple[float, float] = (0.6, 1.1),
) -> np.ndarray:
    """Place a rotated and scaled copy of another patient's tumour where this patient is healthy: bool, never empty.

    Args:
        brain: (x, y, z), not 0 inside the brain.
        unhealthy: (x, y, z), not 0 in this patient's tumour with its margin; may be empty.
        donor: tumour of another patient, (x, y, z) in voxels of the same size.
        spacing_mm: voxel size, one number or three.
        scale: smallest and largest factor on the donor's diameter.

    Raises:
        InputError: brain or donor is empty, or no place was found.
    """
    for name, mask in (("brain", brain), ("donor", donor)):
        if not np.any(mask):
            raise InputError("the mask is empty", where=name, fix="give one with at least one voxel")
    brain = brain != 0
    h = np.broadcast_to(np.asarray(spacing_mm, dtype=float), (3,))
    forbidden = dilate_mm(unhealthy, MIN_DISTANCE_MM, h)
    for place, shape in _candidates(brain, donor, rng, h, scale):
        if not forbidden[place][shape].any() and brain[place][shape].mean() >= MIN_INSIDE:
            out = np.zeros(brain.shape, bool)
            out[place] = shape
            return out
    raise InputError(
        f"no place for a healthy mask in {ROTATIONS} rotations of {PLACES_PER_ROTATION} places: the donor has "
        f"{np.count_nonzero(donor)} voxels, the brain {brain.sum()}, of which {(brain & ~forbidden).sum()} "
        f"lie more than {MIN_DISTANCE_MM:g} mm from the unhealthy mask",
        fix="take a smaller donor or a smaller scale",
    )


def void(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a copy of the image (x, y, z) with 0 under the mask; dtype and all other voxels stay."""
    out = image.copy()
    out[mask != 0] = 0
    return out


def _rotated(donor: np.ndarray, rng: np.random.Generator, h: np.ndarray, scale: float) -> np.ndarray:
    """Rotate the donor's bounding box about a random axis by a random angle and scale it; at least one voxel."""
    # a rim of zeros, so that interpolation reaches the outer half of the outermost voxels
    shape = np.pad((donor != 0)[bounding_box(donor != 0)], 1)
    # QR of a normal matrix is uniform over rotations once the signs are fixed; it may mirror, as tumours do
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    turn = (q * np.sign(np.diag(r))) / scale
    matrix = turn * h[None, :] / h[:, None]
    half_mm = np.linalg.norm(np.array(shape.shape) * h) / 2 * scale
    size = 2 * np.ceil(half_mm / h).astype(int) + 1
    offset = (np.array(shape.shape) - 1) / 2 - matrix @ ((size - 1) / 2)
    soft = ndimage.affine_transform(shape.astype(np.float32), matrix, offset, output_shape=tuple(size), order=1)
    rotated = soft >= min(0.5, float(soft.max()))
    return rotated[bounding_box(rotated)]


def _candidates(
    brain: np.ndarray, donor: np.ndarray, rng: np.random.Generator, h: np.ndarray, scale: tuple[float, float]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield rotated copies of the donor at places drawn from the brain's box: the place's box and the copy."""
    bounds = bounding_box(brain)
    low, extent = np.array([b.start for b in bounds]), np.array([b.stop - 1 - b.start for b in bounds])
    for _ in range(ROTATIONS):
        copy = _rotated(donor, rng, h, rng.uniform(*scale))
        for fraction in rng.uniform(size=(PLACES_PER_ROTATION, 3)):
            start = np.rint(low + fraction * extent - (np.array(copy.shape) - 1) / 2).astype(int)
            stop = start + copy.shape
            if (start >= 0).all() and (stop <= brain.shape).all():
                yield tuple(slice(a, b) for a, b in zip(start, stop, strict=True)), copy
