"""The bytes of a NIfTI file: what must hold before a voxel is believed, and how bytes reach the disk.

The checks run in an order that spends nothing on a bad file: is it a file, what kind, what does its header claim, does
the stream reach its end with the right checksum. Nothing is allocated on a header's word alone.
"""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.files import replacing

SUFFIXES = (".nii.gz", ".nii")
MAX_BYTES = 2 << 30  # a 1 mm float64 head takes 70 MB; what claims thirty times as much is not one
_SLACK = MAX_BYTES // 64  # headers, extensions, stray bytes behind the voxels
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_HEADER = nib.Nifti2Header.sizeof_hdr  # the longer of the two kinds
_AGAIN = "download or export the file again"


def stem(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def require_writable(path: str | Path) -> None:
    """Refuse an output path early: wrong ending, no such folder, or a folder that takes no file."""
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"an output must end in {' or '.join(SUFFIXES)}", where=path)
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise InputError("is a directory", where=path, fix="name a file")
        if not path.parent.is_dir():
            raise InputError("its folder does not exist", where=path, fix=f"mkdir -p '{path.parent}'")
        probe.unlink(missing_ok=True)  # left by a crash, or a link that someone planted
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror})", where=path, fix="choose a folder you may write to"
        ) from error


def read_bytes(path: Path) -> tuple[bytes, int]:
    """The unpacked content, and how many packed bytes follow the last gzip member."""
    try:
        _require_file(path)
        packed = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="check its name and rights") from error
    if not packed:
        raise InputError("empty (0 bytes)", where=path, fix="download it again")
    if packed.startswith(_GZIP):
        return _gunzip(packed, path)
    start = packed[:512].lstrip()
    if start.startswith(b"<"):
        raise InputError("an HTML page, not NIfTI", where=path, fix="log in and download it again")
    if start.startswith(b"version https://git-lfs"):
        raise InputError("a git-LFS pointer, not the file", where=path, fix="run `git lfs pull`")
    if start.startswith(b"/annex/objects/"):
        raise InputError("a git-annex pointer, not the file", where=path, fix="run `git annex get`")
    if path.name.lower().endswith(".gz"):
        raise InputError("not gzip", where=path, fix="rename it to .nii, or download it again")
    return packed, 0


def _require_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise InputError(f"broken link to {path.readlink()}", where=path, fix="restore its target")
    if not path.exists():
        raise InputError("no such file", where=path, fix="check the path and the case's name")
    if path.is_dir():
        raise InputError("is a directory, not a NIfTI file", where=path)
    if not path.is_file():  # a pipe would be waited for
        raise InputError("not a regular file", where=path)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"not named {' or '.join(SUFFIXES)}", where=path, fix="convert it to NIfTI")
    if (size := path.stat().st_size) > MAX_BYTES + _SLACK:
        raise InputError(f"holds {size / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.1f} GB are read", where=path)


def _gunzip(packed: bytes, path: Path) -> tuple[bytes, int]:
    """Unpack to the stream's end, so that its checksum is read, and never beyond what the header claims."""
    content, claimed, waiting, stream = bytearray(), 0, packed, zlib.decompressobj(31)
    try:
        while waiting:
            content += stream.decompress(waiting, _CHUNK)
            waiting = stream.unconsumed_tail
            if stream.eof and stream.unused_data.startswith(_GZIP):  # written in blocks, as bgzip does
                waiting, stream = stream.unused_data, zlib.decompressobj(31)
            if not claimed and len(content) >= _HEADER:
                claimed = _claimed_bytes(bytes(content[:_HEADER]), path)
            if len(content) > (claimed or MAX_BYTES) + _SLACK:
                raise InputError(f"unpacks to far more than the {claimed} bytes it claims", where=path, fix=_AGAIN)
    except zlib.error as error:
        cause = "checksum mismatch" if "check" in str(error) else "damaged gzip stream"
        raise InputError(f"{cause} ({error})", where=path, fix=_AGAIN) from error
    if not stream.eof:
        of = f" of {claimed} and a header" if claimed else ""
        raise InputError(f"gzip ends early (got {len(content)} bytes{of})", where=path, fix=_AGAIN)
    return bytes(content), len(stream.unused_data)


def parse_header(content: bytes, path: Path) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header at the start of the content, in its own byte order, unchecked."""
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(content[:_HEADER]):
            return kind(content[: kind.sizeof_hdr], check=False)
    raise InputError("no NIfTI header", where=path, fix="convert it to single-file NIfTI (.nii.gz)")


def _claimed_bytes(content: bytes, path: Path) -> int:
    header = parse_header(content, path)
    claimed = math.prod(header_shape(header, path)) * header_dtype(header, path).itemsize
    if claimed > MAX_BYTES:
        raise InputError(
            f"claims {claimed / 1e9:.1f} GB of voxels; at most {MAX_BYTES / 1e9:.1f} GB are read",
            where=path,
            fix=_AGAIN,
        )
    return claimed


def header_shape(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    """(x, y, z); further axes of length 1 are dropped."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"dim[0] is {axes}: not a number of axes", where=path, fix=_AGAIN)
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise InputError(f"an axis without voxels: shape {shape}", where=path, fix=_AGAIN)
    if len(shape) > 3 and math.prod(shape[3:]) != 1:
        raise InputError(f"{math.prod(shape[3:])} volumes, need 1", where=path, fix="split the series")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"shape {shape} is not 3D", where=path, fix="give the whole volume")
    return shape[:3]


def header_dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    """The stored voxel type, an integer or a float of at most 8 bytes, in the file's byte order."""
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise InputError(f"unknown datatype code {int(header['datatype'])}", where=path, fix=_AGAIN) from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(f"voxels of type {dtype}, need one real number each", where=path)
    return dtype


def header_affine(header: nib.Nifti1Header, path: Path) -> np.ndarray:
    """(4, 4) voxel indices to millimetres: the sform, else the qform; invertible, with orthogonal axes."""
    export = "export it with its scanner orientation"
    if int(header["sform_code"]) not in range(6) or int(header["qform_code"]) not in range(6):
        raise InputError("orientation codes outside 0..5", where=path, fix=export)
    if not (header["sform_code"] or header["qform_code"]):
        raise InputError("no orientation: sform and qform codes are both 0", where=path, fix=export)
    try:
        affine = header.get_best_affine()
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"qform quaternion invalid ({error})", where=path, fix=export) from error
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-3 or abs(np.linalg.det(axes)) < 1e-6:
        raise InputError("its affine is not finite and invertible", where=path, fix=export)
    cosines = np.abs(axes.T @ axes / np.outer(lengths, lengths) - np.eye(3)).max()
    if cosines > 1e-2:
        raise InputError(f"sheared axes (cosine {cosines:.2f})", where=path, fix="resample it first")
    return affine


def header_oddities(header: nib.Nifti1Header, affine: np.ndarray, path: Path) -> list[str]:
    """Fields that contradict the others, as warnings; refused where millimetres are in doubt."""
    unit = {1: "metre", 3: "micron"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"its unit of length is the {unit}, need mm", where=path, fix="export it in millimetres")
    found, spacing = header["pixdim"][1:4], np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(found).all():
        raise InputError(f"pixdim {_triple(found)} is not finite", where=path, fix=_AGAIN)
    warnings = []
    if int(header["sizeof_hdr"]) != header.sizeof_hdr:
        warnings.append(f"sizeof_hdr is {int(header['sizeof_hdr'])}, must be {header.sizeof_hdr}")
    if int(header["bitpix"]) != 8 * header.get_data_dtype().itemsize:
        warnings.append(f"bitpix {int(header['bitpix'])} contradicts the datatype {header.get_data_dtype()}")
    if not np.allclose(found, spacing, rtol=1e-3):
        warnings.append(f"pixdim {_triple(found)} contradicts the affine's {_triple(spacing)} mm, which are used")
    return warnings


def _triple(numbers: np.ndarray) -> str:
    return "(" + ", ".join(f"{n:g}" for n in numbers) + ")"


def voxel_offset(header: nib.Nifti1Header, content: bytes, path: Path) -> int:
    """Where the voxels begin, behind header and extensions, each of which must end before them."""
    offset, first = float(header["vox_offset"]), int(header.single_vox_offset)
    if not math.isfinite(offset) or not first <= offset <= len(content):
        raise InputError(
            f"vox_offset {offset:g} is not inside the file ({first} to {len(content)} bytes)", where=path, fix=_AGAIN
        )
    start = first
    while content[first - 4] and start + 8 <= offset:
        (size,) = struct.unpack_from(f"{header.endianness}i", content, start)
        if not 8 <= size <= offset - start:
            raise InputError(f"a header extension claims {size} bytes, {int(offset) - start} are there", where=path,
                             fix=_AGAIN)  # fmt: skip
        start += size
    return int(offset)


def scaling(header: nib.Nifti1Header, path: Path, warnings: list[str]) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or none at all means 1 and 0."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0
    if not math.isfinite(slope):
        warnings.append(f"scl_slope {slope} read as 1")
        return 1.0, 0.0
    if not math.isfinite(intercept) or abs(slope) < 1e-30:
        raise InputError(f"scl_slope {slope:g}, scl_inter {intercept:g}: not a usable range", where=path, fix=_AGAIN)
    return slope, intercept


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a packed or plain file whole or not at all, and read it back before it takes its name."""
    require_writable(path)
    packed = gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content
    try:
        with replacing(path) as partial:
            partial.write_bytes(packed)
            if partial.read_bytes() != packed:
                raise InputError("what was written does not read back", where=path, fix="check the disk")
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=path, fix="check space and rights") from error
    return path
