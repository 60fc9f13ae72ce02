"""Read 3D images from NIfTI and MGH files, check that they are plausible, and write results with the source's header.

A `Volume` holds the raw voxels and the bytes in front of them, so that a result differs from its source in the voxels
under the mask and in nothing else: same header, extensions, byte order, slope and intercept. A result in the other
format keeps voxels and affine.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np

from ldm_lib.errors import InputError, located
from ldm_lib.files import expand_path
from ldm_lib.geometry import axis_codes
from ldm_lib.images import mgh, nifti
from ldm_lib.images.image_files import AGAIN, is_mgh, read_bytes, require_exact, write_bytes
from ldm_lib.images.options import READ_STRICTLY, ReadOptions

MOST_BELOW = 0.01  # voxels darker than the background, for one that is brighter
LEAST_BACKGROUND = 0.5  # fraction of the voxels at the border that have one value
SPIKE = 10.0  # times the scale; the brightest voxel of real brains is at 1.2 to 1.7 times it
LARGEST_BRAIN_L = 2.5  # with its CSF; real ones measured 1.2 and 1.6, heads with skull and neck have 4 and more
BRATS_MM = (240, 240, 155)  # field of view along the axes of LPS
LARGEST_ANISOTROPY = 1.5  # longest over shortest edge of a voxel


@dataclass(frozen=True)
class Volume:
    """Hold one 3D image as it is stored on disk."""

    path: Path
    raw: np.ndarray  # stored voxels (x, y, z) in the file's own dtype and byte order, before slope and intercept
    preamble: bytes  # header and extensions, as read or as a result is to have them
    affine: np.ndarray  # (4, 4) voxel indices to millimetres, RAS+ world
    slope: float  # voxel = raw * slope + intercept
    intercept: float
    warnings: tuple[str, ...] = ()  # what is odd about the file but does not forbid its use
    nan_as_zero: bool = False  # NaN counts as 0 in `voxels`
    trailer: bytes = b""  # what follows the voxels
    background: float = 0.0  # value in the file's units from which `voxels` count, already subtracted from `intercept`
    air: np.generic | None = None  # stored value of air that is 0 in `voxels`, though darker voxels exist

    @cached_property
    def voxels(self) -> np.ndarray:
        """(x, y, z) float32 in the file's scaled units."""
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is rejected
            if (self.slope, self.intercept) == (1.0, 0.0):
                voxels = self.raw.astype(np.float32)
            else:
                voxels = (self.raw * np.float64(self.slope) + self.intercept).astype(np.float32)
        if self.nan_as_zero:
            voxels[np.isnan(voxels)] = 0
        if self.air is not None:
            voxels[self.raw == self.air] = 0
        return voxels

    @property
    def named_warnings(self) -> list[str]:
        """`warnings`, each with the file's name."""
        return [f"{self.path.name}: {warning}" for warning in self.warnings]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(x, y, z)."""
        return self.raw.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0).round(6))

    @property
    def orientation(self) -> str:
        """Three letters, the directions in which the voxel axes grow, such as "LPS"."""
        return axis_codes(self.affine)

    @property
    def mean_spacing_mm(self) -> float:
        """Geometric mean of the voxel's edges."""
        return float(np.prod(self.spacing_mm)) ** (1 / 3)

    @property
    def lateral_axis(self) -> int:
        """The axis between left and right."""
        return next(axis for axis, code in enumerate(self.orientation) if code in "LR")

    @property
    def grid(self) -> str:
        """Shape and voxel size in words, such as "240x240x155, 1x1x1 mm"."""
        return ", ".join("x".join(f"{n:g}" for n in values) for values in (self.shape, self.spacing_mm)) + " mm"

    def __repr__(self) -> str:
        return f"Volume({self.path.name!r}, {self.grid}, {self.orientation}, {self.raw.dtype})"


def read_volume(path: str | Path, read_options: ReadOptions = READ_STRICTLY) -> Volume:
    """Read one 3D scalar image (.nii, .nii.gz, .mgh or .mgz) and check it.

    Raises:
        InputError: the file is missing, unreadable, damaged, not a 3D scalar image, has no usable orientation,
            or holds a voxel that is not finite or that float32 cannot represent.
    """
    path = expand_path(path)
    with located(path):
        kind = _format(path)
        content = read_bytes(path, kind.claimed_bytes, header_bytes=kind.HEADER_BYTES)
        return _finite(_parsed(path, content, read_options), read_options)


def _parsed(path: Path, content: bytearray, read_options: ReadOptions) -> Volume:
    kind, warnings = _format(path), []
    stored = kind.layout(content, read_options, warnings)
    if (held := len(content) - stored.offset) < (n_bytes := stored.end - stored.offset):
        raise InputError(f"expected {n_bytes} bytes of voxels, got {held}", fix=AGAIN)
    if kind is nifti and len(content) > stored.end:
        warnings.append(f"{len(content) - stored.end} bytes after the last voxel are ignored")
    raw = np.frombuffer(content, stored.dtype, math.prod(stored.shape), stored.offset)
    raw = raw.reshape(stored.shape, order="F")
    raw.flags.writeable = False
    require_exact(raw)
    scaling = {"slope": stored.slope, "intercept": stored.intercept, "warnings": tuple(warnings)}
    return Volume(path, raw, stored.preamble, stored.affine, **scaling, trailer=stored.trailer)


def _format(path: Path) -> ModuleType:
    return mgh if is_mgh(path) else nifti


def _finite(volume: Volume, read_options: ReadOptions) -> Volume:
    """Return the volume, if all its voxels are finite or may be read as 0."""
    bad = ~np.isfinite(volume.voxels)
    if not (count := int(np.count_nonzero(bad))):
        return volume
    only_nan = count == int(np.isnan(volume.voxels).sum())
    if read_options.nan_as_zero and only_nan:
        return replace(volume, nan_as_zero=True, warnings=(*volume.warnings, f"{count} NaN voxels read as 0"))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    fix = "set the background to 0" + (", or let NaN be read as 0 with --nan-as-zero" if only_nan else "")
    raise InputError(f"{count} voxels are not finite (in float32), the first at {first}", fix=fix)


def read_image(path: str | Path, read_options: ReadOptions = READ_STRICTLY) -> Volume:
    """Read an image as `read_volume` does, and reject one without contrast (all voxels equal, or none above 0).

    Intensities count from the background, which is not 0 in z-scored and in signed images.
    """
    volume = read_volume(path, read_options)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    if low == high:
        cause = "the image is empty" if high == 0 else f"no contrast (min = max = {high:g})"
        raise InputError(cause, where=path, fix="give a skull-stripped T1n volume")
    volume = _from_background(volume)
    if volume.voxels.max() <= 0:
        fix = "check the slope and the units of the export"
        raise InputError(f"no voxel above 0 (max {high:g})", where=path, fix=fix)
    return volume


def _from_background(volume: Volume) -> Volume:
    """Shift the intensities so that the background is 0: the value of most voxels at the border, and the darkest one.

    Only the intercept changes, so that results are written in the file's own range.
    """
    faces = [np.take(volume.raw, (0, -1), axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    stored = np.float64(values[counts.argmax()])
    background = float(stored * volume.slope + volume.intercept)
    if background == 0 or not np.isfinite(background) or counts.max() < LEAST_BACKGROUND * counts.sum():
        return volume
    voxels, void = volume.voxels, volume.raw == 0
    if np.count_nonzero((voxels < np.float32(background)) & ~void) > MOST_BELOW * np.count_nonzero(voxels > background):
        return volume
    note = f"the background is {background:g}, not 0: intensities are shifted for the model, and back in results"
    intercept = -float(stored * volume.slope)
    return replace(volume, intercept=intercept, background=background, warnings=(*volume.warnings, note))


def without_spikes(voxels: np.ndarray, scale: float) -> tuple[np.ndarray, int]:
    """Replace voxels (x, y, z) above `SPIKE` times the scale by the median of their neighbours, and count them.

    One such voxel, of a failed export or a bad sector, would otherwise spoil its whole surroundings in the network.
    """
    if voxels.max() <= SPIKE * scale:
        return voxels, 0
    spikes = np.argwhere(voxels > SPIKE * scale)
    around = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    places = np.clip(spikes[:, None] + around, 0, np.array(voxels.shape) - 1)
    out = voxels.copy()
    medians = np.median(voxels[tuple(np.moveaxis(places, -1, 0))], axis=1)
    out[tuple(spikes.T)] = np.minimum(medians, SPIKE * scale)  # a median among many spikes is one itself
    return out, len(spikes)


def image_warnings(voided: np.ndarray, source: Volume) -> list[str]:
    """List how an image, voided and in source units, differs from those that the models are made for."""
    warnings, spacing = [], np.array(source.spacing_mm)
    shape, sizes = "x".join(map(str, source.shape)), "x".join(f"{s:g}" for s in spacing)
    axes = [next(k for k, pair in enumerate(("LR", "PA", "SI")) if letter in pair) for letter in source.orientation]
    extent, usual = np.array(source.shape) * spacing, np.array(BRATS_MM)[axes]
    if (np.abs(extent - usual) > np.maximum(spacing, 1.5)).any():
        warnings.append(f"{shape} voxels of {sizes} mm are not BraTS's field of view of 240x240x155 mm: "
                        "out of training domain")  # fmt: skip
    if spacing.max() > LARGEST_ANISOTROPY * spacing.min():
        warnings.append(f"voxels of {sizes} mm are far from cubes: out of training domain")
    litres = float(np.count_nonzero(voided) * np.prod(spacing)) / 1e6
    if litres > LARGEST_BRAIN_L:
        warnings.append(f"{litres:.1f} litres are not 0, more than a brain: not skull-stripped, out of training domain")
    if negative := int(np.count_nonzero(voided < 0)):
        share = f"{100 * negative / np.count_nonzero(voided):.1f} % of the head"
        warnings.append(f"{negative} negative voxels ({share}), down to {voided.min():g}; read as 0")
    return warnings


def intensity_scale(voided: np.ndarray, mask: np.ndarray, *, where: object = "") -> float:
    """Return the divisor that normalises a case: 99.5th percentile of the voxels above 0 outside the mask."""
    seen = voided[(voided > 0) & ~mask]
    if seen.size == 0:
        inverted = "it looks inverted: exchange its 0 and 1" if mask.mean() > 0.5 else ""
        raise InputError("no voxel above 0 outside the mask: nothing to derive the intensity scale from", where=where,
                         fix=inverted or "check that mask and image belong together")  # fmt: skip
    return float(np.percentile(seen, 99.5))


def normalise(voxels: np.ndarray, scale: float) -> np.ndarray:
    """Convert source units to the network's float32: v / scale, negatives to 0, nothing clipped above."""
    return (np.maximum(voxels, 0) / scale).astype(np.float32)


def in_format_of(path: Path, source: Volume) -> Volume:
    """Return a volume as a file of this name holds it: itself, or, in the other format, with its voxels and affine.

    Types that the other format lacks become the next larger one, float64 and scaled integers float32.
    """
    kind, intercept = _format(path), source.intercept + source.background
    if kind is _format(source.path):
        return source
    raw = source.raw
    if (source.slope, intercept) != (1.0, 0.0):
        raw = (raw * np.float64(source.slope) + intercept).astype(np.float32)
    content = bytearray(kind.new_file(raw.astype(raw.dtype.newbyteorder("=")), source.affine))
    return replace(_parsed(path, content, READ_STRICTLY), intercept=-source.background, background=source.background)


def write_like(path: str | Path, source: Volume, voxels: np.ndarray, mask: np.ndarray) -> Path:
    """Write `source` with the voxels under `mask` replaced, and nothing else changed: the other bits are the same.

    Args:
        path: ends in .nii, .nii.gz, .mgh or .mgz; replaced atomically. For the other format see `in_format_of`.
        voxels: (x, y, z) in the source's scaled units; rounded and saturated to its dtype.

    Raises:
        InputError: a value to paste is not finite, or the file cannot be written or read back.
    """
    path = Path(path)
    source = in_format_of(path, source)
    values = (np.asarray(voxels, np.float64)[mask] - source.intercept) / source.slope
    if not np.isfinite(values).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(values))} inpainted voxels are not finite", where=path)
    whole = source.raw.dtype.kind in "iu"
    limits = np.iinfo(source.raw.dtype) if whole else np.finfo(source.raw.dtype)
    values = np.clip(np.rint(values) if whole else values, limits.min, limits.max)
    pasted = source.raw.copy(order="F")
    pasted[mask] = values.astype(source.raw.dtype)
    return write_bytes(path, source.preamble + pasted.tobytes(order="F") + source.trailer)


def write_map(path: str | Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write a new file of the array's own dtype (x, y, z), scanner coordinates; MGH may need a larger type."""
    return write_bytes(Path(path), _format(Path(path)).new_file(np.asarray(voxels), affine))
