"""NIfTI in and out: every file passes one gate, and what is written keeps the source's header byte for byte.

A `Volume` remembers the raw voxels and the bytes in front of them, so that an output differs from its source in the
voxels of the hole and in nothing else: same header, extensions, byte order, slope and intercept.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ldm_lib.errors import InputError
from ldm_lib.nifti import (
    header_affine,
    header_dtype,
    header_oddities,
    header_shape,
    parse_header,
    read_bytes,
    scaling,
    voxel_offset,
    write_bytes,
)

GRID_TOLERANCE_MM = 1e-3
MASK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Volume:
    """One 3D image as it stands on disk.

    Attributes:
        path: the file it came from.
        raw: stored voxels (x, y, z) in the file's own dtype and byte order, before slope and intercept.
        preamble: header and extensions, exactly as read.
        affine: (4, 4) voxel indices to millimetres, RAS+ world.
        slope, intercept: voxel = raw * slope + intercept.
        warnings: what is odd about the file but does not forbid its use.
    """

    path: Path
    raw: np.ndarray
    preamble: bytes
    affine: np.ndarray
    slope: float
    intercept: float
    warnings: tuple[str, ...] = ()

    @cached_property
    def voxels(self) -> np.ndarray:
        """(x, y, z) float32 in the file's scaled units."""
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused
            if (self.slope, self.intercept) == (1.0, 0.0):
                return self.raw.astype(np.float32)
            return (self.raw * np.float64(self.slope) + self.intercept).astype(np.float32)

    @property
    def named_warnings(self) -> list[str]:
        """`warnings`, each with the file's name."""
        return [f"{self.path.name}: {warning}" for warning in self.warnings]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.raw.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0).round(6))

    @property
    def orientation(self) -> str:
        """Three letters, the directions in which the voxel axes grow, such as "LPS"."""
        return "".join(nib.aff2axcodes(self.affine))


def read_volume(path: str | Path) -> Volume:
    """Read one 3D scalar NIfTI file (.nii or .nii.gz) through the gate.

    Raises:
        InputError: the file is missing, unreadable, damaged, not a 3D scalar NIfTI, has no usable orientation,
            or holds a voxel that is not finite.
    """
    path = Path(path)
    content, trailing = read_bytes(path)
    header = parse_header(content, path)
    shape, dtype = header_shape(header, path), header_dtype(header, path)
    affine = header_affine(header, path)
    warnings = header_oddities(header, affine, path)
    offset, n_bytes = voxel_offset(header, content, path), math.prod(shape) * dtype.itemsize
    held = len(content) - offset
    if held < n_bytes:
        raise InputError(
            f"expected {n_bytes} bytes of voxels, got {held}", where=path, fix="download or export the file again"
        )
    if surplus := held - n_bytes + trailing:
        warnings.append(f"{surplus} bytes after the last voxel are ignored")
    slope, intercept = scaling(header, path, warnings)
    raw = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
    volume = Volume(path, raw, content[:offset], affine, slope, intercept, tuple(warnings))
    _refuse_non_finite(volume)
    return volume


def read_image(path: str | Path) -> Volume:
    """`read_volume`, and refuse an image without contrast (all voxels equal, or none above zero)."""
    volume = read_volume(path)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    if low == high:
        cause = "the image is empty" if high == 0 else f"no contrast (min = max = {high:g})"
        raise InputError(cause, where=path, fix="give a skull-stripped T1n volume")
    if high <= 0:
        raise InputError(
            f"no voxel above 0 (max {high:g})", where=path, fix="check the slope and the units of the export"
        )
    return volume


def read_mask(
    path: str | Path, like: Volume, *, allow_empty: bool = False, warnings: list[str] | None = None
) -> np.ndarray:
    """Read a binary mask on the grid of `like`: bool (x, y, z), True = fill this (0/1 or 0/255 on disk).

    Args:
        warnings: what is odd but usable is appended here.

    Raises:
        InputError: another grid, values that are not binary, or no voxel set.
    """
    volume = read_volume(path)
    require_same_grid(volume, like)
    if warnings is not None:
        warnings += volume.named_warnings
    values = np.unique(volume.voxels)
    levels = np.rint(values)  # a tool that saves 0 and 1 as scaled integers returns 0.00001 and 0.99999
    if np.abs(values - levels).max() > MASK_TOLERANCE or not (set(levels) <= {0, 1} or set(levels) <= {0, 255}):
        shown = ", ".join(f"{v:g}" for v in values[:6]) + (", ..." if values.size > 6 else "")
        kind = "looks like a segmentation" if values.size < 10 else "looks interpolated"
        raise InputError(
            f"not binary: {values.size} values ({shown}), {kind}",
            where=path,
            fix="store 0 outside the hole and 1 inside",
        )
    if levels[-1] == 255 and warnings is not None:
        warnings.append(f"{volume.path.name}: 255 read as 1")
    mask = volume.voxels > 0.5
    if not mask.any() and not allow_empty:
        raise InputError(
            f"the mask is empty (0 of {mask.size} voxels)", where=path, fix="mark the voxels to fill with 1"
        )
    return mask


def read_labels(
    path: str | Path, like: Volume, allowed: tuple[int, ...], *, warnings: list[str] | None = None
) -> np.ndarray:
    """Read a label map: uint8 (x, y, z) on the grid of `like`, every value one of `allowed`.

    A map on another grid is brought to it by its affine, nearest neighbour, with a warning.
    """
    volume = read_volume(path)
    values, counts = np.unique(volume.voxels, return_counts=True)
    strange = ~np.isin(values, allowed)
    if strange.any():
        shown = ", ".join(f"{v:g} ({n} voxels)" for v, n in zip(values[strange][:4], counts[strange][:4], strict=True))
        raise InputError(f"labels {shown} are not among {allowed}", where=path, fix="relabel it: 1 CSF, 2 GM, 3 WM")
    return _brought_to(volume, like, order=0, warnings=warnings).astype(np.uint8)


def read_unit_map(path: str | Path, like: Volume, *, warnings: list[str] | None = None) -> np.ndarray:
    """Read a map of concentrations: float32 (x, y, z) in [0, 1] on the grid of `like`.

    A map on another grid is brought to it by its affine, linearly, with a warning.
    """
    volume = read_volume(path)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(f"values from {low:g} to {high:g}, must lie in [0, 1]", where=path, fix="give concentrations")
    return np.clip(_brought_to(volume, like, order=1, warnings=warnings), 0, 1)


def _brought_to(volume: Volume, like: Volume, *, order: int, warnings: list[str] | None) -> np.ndarray:
    """A map's voxels on the grid of `like`, as both affines tell; 0 where the map does not reach."""
    told = list(volume.named_warnings)
    voxels = volume.voxels
    if volume.shape != like.shape or _corner_distance_mm(volume, like) > GRID_TOLERANCE_MM:
        to_map = np.linalg.solve(volume.affine, like.affine)
        how = {"output_shape": like.shape, "mode": "constant", "prefilter": False}
        reached = ndimage.affine_transform(np.ones(volume.shape, np.float32), to_map, order=0, **how).mean()
        if not reached:
            raise InputError(
                f"does not overlap {like.path.name}: their centres lie {_apart_mm(volume, like):.0f} mm apart",
                where=volume.path,
                fix="check the map's affine, or register it first",
            )
        voxels = ndimage.affine_transform(voxels, to_map, order=order, **how)
        told.append(f"{volume.path.name}: brought from its grid {volume.shape} {volume.orientation} to the image's by "
                    f"its affine; it reaches {reached:.0%} of the image")  # fmt: skip
    if warnings is not None:
        warnings += told
    return voxels


def _apart_mm(volume: Volume, like: Volume) -> float:
    centres = [v.affine @ [*((np.array(v.shape) - 1) / 2), 1] for v in (volume, like)]
    return float(np.linalg.norm(centres[0] - centres[1]))


def require_same_grid(volume: Volume, like: Volume) -> None:
    """Refuse two files whose shapes or corner positions (beyond 1e-3 mm) differ."""
    if volume.shape != like.shape:
        raise InputError(
            f"shape {volume.shape}, but {like.path.name} has {like.shape}",
            where=volume.path,
            fix="resample it onto the image's grid",
        )
    distance = _corner_distance_mm(volume, like)
    if distance > GRID_TOLERANCE_MM:
        raise InputError(
            f"its corners lie {distance:.1f} mm from those of {like.path.name} "
            f"({volume.orientation} against {like.orientation})",
            where=volume.path,
            fix="resample it onto the image's grid",
        )


def _corner_distance_mm(volume: Volume, like: Volume) -> float:
    """How far the corners of one grid lie from where the other affine puts them."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.array(volume.shape) - 1
    return float(np.linalg.norm(corners @ (volume.affine - like.affine).T, axis=1).max())


def intensity_scale(voided: np.ndarray, mask: np.ndarray, *, where: object = "") -> float:
    """The divisor that normalises a case: 99.5th percentile of the voxels above 0 outside the mask, source units."""
    seen = voided[(voided > 0) & ~mask]
    if seen.size == 0:
        raise InputError(
            "no voxel above 0 outside the mask: nothing to learn the intensity scale from",
            where=where,
            fix="check that mask and image belong together",
        )
    return float(np.percentile(seen, 99.5))


def normalise(voxels: np.ndarray, scale: float) -> np.ndarray:
    """Source units to the network's float32: v / scale, negatives to 0, nothing clipped above."""
    return (np.maximum(voxels, 0) / scale).astype(np.float32)


def write_like(path: str | Path, source: Volume, voxels: np.ndarray, mask: np.ndarray) -> Path:
    """Write `source` with the voxels under `mask` replaced, and nothing else changed.

    Args:
        path: ends in .nii or .nii.gz; replaced atomically.
        source: gives header, dtype and every voxel outside the mask, bit for bit.
        voxels: (x, y, z) in the source's scaled units; rounded and saturated to its dtype.
        mask: (x, y, z) bool.

    Raises:
        InputError: a value to paste is not finite, or the file cannot be written or re-read.
    """
    values = (np.asarray(voxels, np.float64)[mask] - source.intercept) / source.slope
    if not np.isfinite(values).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(values))} filled voxels are not finite", where=path)
    whole = source.raw.dtype.kind in "iu"
    limits = np.iinfo(source.raw.dtype) if whole else np.finfo(source.raw.dtype)
    values = np.clip(np.rint(values) if whole else values, limits.min, limits.max)
    filled = source.raw.copy(order="F")
    filled[mask] = values.astype(source.raw.dtype)
    return write_bytes(Path(path), source.preamble + filled.tobytes(order="F"))


def write_map(path: str | Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write a new NIfTI of the array's own dtype (x, y, z), slope 1, intercept 0, scanner coordinates."""
    image = nib.Nifti1Image(np.asarray(voxels), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    return write_bytes(Path(path), image.to_bytes())


def _refuse_non_finite(volume: Volume) -> None:
    bad = ~np.isfinite(volume.voxels)
    if count := int(bad.sum()):
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            f"{count} voxels are not finite (in float32), the first at {first}",
            where=volume.path,
            fix="set the background to 0",
        )
