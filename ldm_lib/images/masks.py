"""Read what belongs to an image: masks on its grid, and label and concentration maps that are resampled to it."""

from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import bounding_box, face_neighbours
from ldm_lib.images.grid import EXACT_MM, RESAMPLE, has_grid_of, on_grid_of, reordered
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import Volume, read_volume

MASK_TOLERANCE = 1e-3
INVERTED_MASK = 0.8
LARGEST_MASK = 0.2  # fraction of the head; the challenge's largest masks cover a fifth


def require_in_brain(
    mask: np.ndarray, voided: np.ndarray, target: np.ndarray | None, *, where: Path, warnings: list[str]
) -> None:
    """Raise InputError for a mask that looks inverted, and for one without brain where the ground truth is known.

    A large mask, and one without brain around it, is a warning.
    """
    if target is not None and not (target[mask] > 0).any():
        raise InputError(f"0 % of its {int(mask.sum())} voxels lie in the brain: there is nothing to learn or to score",
                         where=where, fix="check that mask and image belong together")  # fmt: skip
    fraction = mask.sum() / (mask.sum() + np.count_nonzero(voided))
    if fraction > INVERTED_MASK:
        cause = f"the mask covers {fraction:.0%} of the head: it looks inverted"
        raise InputError(cause, where=where, fix="exchange its 0 and 1: 1 marks the voxels to inpaint")
    if fraction > LARGEST_MASK:
        warnings.append(f"the mask covers {fraction:.0%} of the head: little context is left to inpaint it from")
    if not (voided[face_neighbours(mask)] > 0).any():
        warnings.append(f"0 % of the voxels around the mask ({int(mask.sum())} voxels) lie in the brain")


def read_mask(
    path: str | Path,
    like: Volume,
    read_options: ReadOptions = READ_STRICTLY,
    *,
    labelled: bool = True,
    allow_empty: bool = False,
    warnings: list[str] | None = None,
) -> np.ndarray:
    """Read a binary mask on the grid of `like`: bool (x, y, z), True = voxels to inpaint (0/1 or 0/255 on disk).

    A mask whose axes are in another order is reordered to that of `like`.

    Args:
        labelled: the file may be a segmentation, whose labels `read_options` names.
        allow_empty: no voxel needs to be set.
        warnings: what is odd but usable is appended.

    Raises:
        InputError: another grid, values that are not binary, or no voxel set.
    """
    warnings, volume = [] if warnings is None else warnings, read_volume(path, read_options)
    voxels = mask_on_grid_of(volume, like, read_options, warnings)
    labels = read_options.labels if labelled else ()
    if labels:
        mask = np.isin(voxels, labels)
        warnings.append(f"{volume.path.name}: the labels {', '.join(map(str, labels))} are the mask")
    else:
        mask = voxels == 1
        if np.count_nonzero(voxels) != np.count_nonzero(mask):
            mask = _as_binary(voxels, volume.path, warnings, labelled=labelled)
    if not mask.any() and not allow_empty:
        fix = "mark the voxels to inpaint with 1"
        if labels and voxels.any():
            held = ", ".join(f"{value:g}" for value in np.unique(voxels)[:6] if value)
            fix = f"name labels that it holds ({held}), not {', '.join(map(str, labels))}"
        raise InputError(f"the mask is empty (0 of {mask.size} voxels)", where=path, fix=fix)
    return mask


def mask_on_grid_of(volume: Volume, like: Volume, read_options: ReadOptions, warnings: list[str]) -> np.ndarray:
    """Return the voxels of a mask in the order of `like`; one on another grid is resampled if that is requested.

    Raises:
        InputError: another grid, and no such request.
    """
    if read_options.resample_mask and not has_grid_of(reordered(volume, like), like):
        return _resampled_to(volume, like, order=0, warnings=warnings)
    warnings += volume.named_warnings
    fix = f"{RESAMPLE}, or let it be resampled with --resample-mask"
    return on_grid_of(volume, like, warnings, fix=fix).voxels


def _as_binary(voxels: np.ndarray, path: Path, warnings: list[str], *, labelled: bool) -> np.ndarray:
    """Convert a mask of 0 and 255, or of values near 0 and 1."""
    values = np.unique(voxels)
    levels = np.rint(values)  # a tool that saves 0 and 1 as scaled integers returns 0.00001 and 0.99999
    if np.abs(values - levels).max() > MASK_TOLERANCE or not (set(levels) <= {0, 1} or set(levels) <= {0, 255}):
        shown = ", ".join(f"{v:g}" for v in values[:6]) + (", ..." if values.size > 6 else "")
        kind = "looks interpolated" if values[-1] <= 1 else "looks like an image"
        fix = "store 0 outside the mask and 1 inside"
        if values.size < 10 and (values == levels).all():
            kind = f"labels {{{', '.join(f'{v:g}' for v in values if v)}}}: looks like a tumour segmentation"
            if labelled and values[-1] > 0:
                fix += f", or name the labels to inpaint: --mask-labels {','.join(f'{v:g}' for v in values if v > 0)}"
        raise InputError(f"not binary: {values.size} values ({shown}), {kind}", where=path, fix=fix)
    if levels[-1] == 255:
        warnings.append(f"{path.name}: 255 read as 1")
    return voxels > 0.5


def dilated(mask: np.ndarray, voxels: int) -> np.ndarray:
    """Grow a mask (x, y, z) by a ball of this radius in voxels; a radius of 1 adds the neighbours at the faces."""
    if not voxels:
        return mask
    from scipy import ndimage  # it takes 0.4 s to load, and few masks grow

    grown, box = mask.copy(), bounding_box(mask, voxels)
    grown[box] = ndimage.distance_transform_edt(~mask[box]) <= voxels
    return grown


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
    healthy, unhealthy = (
        read_mask(path, like, read_options, labelled=False, allow_empty=empty, warnings=warnings) if path else None
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
    warnings, turned = [] if warnings is None else warnings, reordered(volume, like)
    warnings += volume.named_warnings
    voxels = turned.voxels
    if not has_grid_of(turned, like, EXACT_MM):
        from scipy import ndimage  # it takes 0.4 s to load, and few maps need it

        to_map = np.linalg.solve(volume.affine, like.affine)
        options = {"output_shape": like.shape, "mode": "constant", "prefilter": False}
        covered = ndimage.affine_transform(np.ones(volume.shape, np.float32), to_map, order=0, **options).mean()
        if not covered:
            centres = [v.affine @ [*((np.array(v.shape) - 1) / 2), 1] for v in (volume, like)]
            apart_mm = np.linalg.norm(centres[0] - centres[1])
            raise InputError(f"does not overlap {like.path.name}: their centres lie {apart_mm:.0f} mm apart",
                             where=volume.path, fix="check the map's affine, or register it first")  # fmt: skip
        voxels = ndimage.affine_transform(volume.voxels, to_map, order=order, **options)
        name = "/".join(volume.path.parts[-2:])  # the maps of a case differ only in their folder
        warnings.append(f"{name}: resampled from its grid {volume.shape} {volume.orientation} to the image's by its "
                     f"affine; it covers {covered:.0%} of the image")  # fmt: skip
    return voxels
