"""Read what belongs to an image: masks on its grid, and label and concentration maps that are resampled to it."""

from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box
from ldm_lib.images.affines import corner_distance_mm
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import GRID_TOLERANCE_MM, Volume, read_volume, require_same_grid

MASK_TOLERANCE = 1e-3
LARGEST_MASK = 0.2  # fraction of the head; the challenge's largest masks cover a fifth


def require_in_brain(
    mask: np.ndarray, voided: np.ndarray, target: np.ndarray | None, *, where: Path, warnings: list[str]
) -> None:
    """Raise InputError if the ground truth is known and no brain is under the mask; warn if none is around it."""
    if target is not None and not (target[mask] > 0).any():
        raise InputError(f"0 % of its {int(mask.sum())} voxels lie in the brain: there is nothing to learn or to score",
                         where=where, fix="check that mask and image belong together")  # fmt: skip
    if (fraction := mask.sum() / (mask.sum() + np.count_nonzero(voided))) > LARGEST_MASK:
        warnings.append(f"the mask covers {fraction:.0%} of the head: little context is left to inpaint it from")
    box = bounding_box(mask, 1)
    around = np.zeros_like(mask[box])  # the faces' neighbours, by numpy because scipy.ndimage takes 0.4 s to load
    for axis in range(3):
        inside, neighbours = np.moveaxis(mask[box], axis, 0), np.moveaxis(around, axis, 0)
        neighbours[1:] |= inside[:-1]
        neighbours[:-1] |= inside[1:]
    if not (voided[box][around & ~mask[box]] > 0).any():
        warnings.append(f"0 % of the voxels around the mask ({int(mask.sum())} voxels) lie in the brain")


def read_mask(
    path: str | Path,
    like: Volume,
    read_options: ReadOptions = READ_STRICTLY,
    *,
    allow_empty: bool = False,
    warnings: list[str] | None = None,
) -> np.ndarray:
    """Read a binary mask on the grid of `like`: bool (x, y, z), True = voxels to inpaint (0/1 or 0/255 on disk).

    What is odd but usable is appended to `warnings`.

    Raises:
        InputError: another grid, values that are not binary, or no voxel set.
    """
    volume = read_volume(path, read_options.model_copy(update={"nan_as_zero": False}))
    require_same_grid(volume, like)
    warnings, voxels = [] if warnings is None else warnings, volume.voxels
    warnings += volume.named_warnings
    if read_options.labels:
        mask, labels = np.isin(voxels, read_options.labels), ", ".join(map(str, read_options.labels))
        warnings.append(f"{volume.path.name}: the labels {labels} are the mask")
    else:
        mask = voxels == 1
        if np.count_nonzero(voxels) != np.count_nonzero(mask):
            mask = _as_binary(volume, warnings)
    if not mask.any() and not allow_empty:
        fix = "mark the voxels to inpaint with 1"
        if read_options.labels and voxels.any():
            held = ", ".join(f"{value:g}" for value in np.unique(voxels)[:6] if value)
            fix = f"name labels that it holds ({held}), not {', '.join(map(str, read_options.labels))}"
        raise InputError(f"the mask is empty (0 of {mask.size} voxels)", where=path, fix=fix)
    return mask


def _as_binary(volume: Volume, warnings: list[str]) -> np.ndarray:
    """Convert a mask of 0 and 255, or of values near 0 and 1."""
    values = np.unique(volume.voxels)
    levels = np.rint(values)  # a tool that saves 0 and 1 as scaled integers returns 0.00001 and 0.99999
    if np.abs(values - levels).max() > MASK_TOLERANCE or not (set(levels) <= {0, 1} or set(levels) <= {0, 255}):
        shown = ", ".join(f"{v:g}" for v in values[:6]) + (", ..." if values.size > 6 else "")
        kind = "looks interpolated" if values[-1] <= 1 else "looks like an image"
        fix = "store 0 outside the mask and 1 inside"
        if values.size < 10 and (values == levels).all():
            kind = f"labels {{{', '.join(f'{v:g}' for v in values if v)}}}: looks like a tumour segmentation"
            fix += f", or name the labels to inpaint: --mask-labels {','.join(f'{v:g}' for v in values if v > 0)}"
        raise InputError(f"not binary: {values.size} values ({shown}), {kind}", where=volume.path, fix=fix)
    if levels[-1] == 255:
        warnings.append(f"{volume.path.name}: 255 read as 1")
    return volume.voxels > 0.5


def read_parts(
    healthy_path: Path | None,
    unhealthy_path: Path | None,
    mask: np.ndarray,
    like: Volume,
    read_options: ReadOptions,
    *,
    warnings: list[str],
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read the healthy and the unhealthy part of a mask, which must be disjoint and cover it; None without a file."""
    read_options = read_options.model_copy(update={"mask_labels": ""})
    healthy, unhealthy = (
        read_mask(path, like, read_options, allow_empty=empty, warnings=warnings) if path else None
        for path, empty in ((healthy_path, False), (unhealthy_path, True))
    )
    first, second = (np.zeros((1, 1, 1), bool) if part is None else part for part in (healthy, unhealthy))
    whole = mask if healthy is None or unhealthy is None else first | second
    for what, voxels in (
        ("of mask-healthy lie outside the mask", first & ~mask),
        ("are both healthy and unhealthy", first & second),
        ("differ between the mask and healthy + unhealthy", mask != whole),
    ):
        if wrong := int(np.count_nonzero(voxels)):
            fix = "make the masks of one case together"
            raise InputError(f"{wrong} voxels {what}", where=healthy_path, fix=fix)
    return healthy, unhealthy


def read_labels(
    path: str | Path,
    like: Volume,
    allowed: tuple[int, ...],
    read_options: ReadOptions = READ_STRICTLY,
    *,
    warnings: list[str] | None = None,
) -> np.ndarray:
    """Read a label map: uint8 (x, y, z) on the grid of `like`, every value one of `allowed`.

    A map on another grid is resampled to it by nearest neighbour, with a warning.
    """
    volume = read_volume(path, read_options)
    require_labels(volume.voxels, allowed, path)
    return _resampled_to(volume, like, order=0, warnings=warnings).astype(np.uint8)


def read_unit_map(
    path: str | Path, like: Volume, read_options: ReadOptions = READ_STRICTLY, *, warnings: list[str] | None = None
) -> np.ndarray:
    """Read a map of concentrations: float32 (x, y, z) in [0, 1] on the grid of `like`.

    A map on another grid is resampled to it by linear interpolation, with a warning.
    """
    volume = read_volume(path, read_options)
    require_concentration(volume.voxels, path)
    return np.clip(_resampled_to(volume, like, order=1, warnings=warnings), 0, 1)


def require_labels(labels: np.ndarray, allowed: tuple[int, ...], where: object) -> np.ndarray:
    """Return the label map if all its values are allowed, else raise InputError."""
    values, counts = np.unique(labels, return_counts=True)
    strange = ~np.isin(values, allowed)
    if strange.any():
        shown = ", ".join(f"{v:g} ({n} voxels)" for v, n in zip(values[strange][:4], counts[strange][:4], strict=True))
        raise InputError(f"labels {shown} are not among {allowed}", where=where, fix="relabel it: 1 CSF, 2 GM, 3 WM")
    return labels


def require_concentration(values: np.ndarray, where: object) -> np.ndarray:
    """Return the map if all its values are in [0, 1], up to rounding, else raise InputError."""
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise InputError(f"values from {low:g} to {high:g}, must lie in [0, 1]", where=where, fix="give concentrations")
    return values


def _resampled_to(volume: Volume, like: Volume, *, order: int, warnings: list[str] | None) -> np.ndarray:
    """Return a map's voxels on the grid of `like`, by both affines; 0 outside the map."""
    warnings, voxels = [] if warnings is None else warnings, volume.voxels
    warnings += volume.named_warnings
    if volume.shape != like.shape or corner_distance_mm(volume.shape, volume.affine, like.affine) > GRID_TOLERANCE_MM:
        from scipy import ndimage  # it takes 0.4 s to load, and few maps need it

        to_map = np.linalg.solve(volume.affine, like.affine)
        options = {"output_shape": like.shape, "mode": "constant", "prefilter": False}
        covered = ndimage.affine_transform(np.ones(volume.shape, np.float32), to_map, order=0, **options).mean()
        if not covered:
            centres = [v.affine @ [*((np.array(v.shape) - 1) / 2), 1] for v in (volume, like)]
            apart_mm = np.linalg.norm(centres[0] - centres[1])
            raise InputError(f"does not overlap {like.path.name}: their centres lie {apart_mm:.0f} mm apart",
                             where=volume.path, fix="check the map's affine, or register it first")  # fmt: skip
        voxels = ndimage.affine_transform(voxels, to_map, order=order, **options)
        name = "/".join(volume.path.parts[-2:])  # the maps of a case differ only in their folder
        warnings.append(f"{name}: resampled from its grid {volume.shape} {volume.orientation} to the image's by its "
                     f"affine; it covers {covered:.0%} of the image")  # fmt: skip
    return voxels
