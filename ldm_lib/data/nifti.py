"""Read and write the bytes of NIfTI files, and check their headers before a voxel is used.

The order of the checks spends nothing on a bad file: it is a regular file, of a kind that can be read, its header
claims a size that a head can have, and the (gzip) stream reaches its end with the right checksum.
"""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.files import replacing, require_writable

SUFFIXES = (".nii.gz", ".nii")
MAX_VOXELS = 1 << 27  # a head at half a millimetre has 72 million; each needs tens of bytes while it is processed
AGAIN = "download or export the file again"
EXPORT = "export it with its scanner orientation"
FREE_TEXT = ("descrip", "db_name", "aux_file", "intent_name", "data_type")
_LONGEST_HEADER = nib.Nifti2Header.sizeof_hdr
_SLACK = 16 << 20  # bytes that header, extensions and what follows the voxels may take
_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"
_SOFTWARE = re.compile(  # name and version of a program; any other text may name a patient
    rb"(FSL|SPM|ITK|ANTs|AFNI|FreeSurfer|NiftyReg|dcm2niix|nibabel)?[ _v]*\d+(\.\d+)+(:[0-9a-f]+)?|SPM compatible"
)
_STARTS = (  # how files begin that are often found in the place of a volume
    (b"<", "an HTML page, not NIfTI", "log in to Synapse and download it again"),
    (b"version https://git-lfs", "a git-LFS pointer, not the file", "run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file", "run `git annex get`"),
)


def stem(path: Path) -> str:
    """Return a file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def require_volume_writable(path: str | Path) -> None:
    """Raise InputError if no volume can be written to a path: wrong ending, or as `require_writable`."""
    if not str(path).lower().endswith(SUFFIXES):
        raise InputError(f"an output must end in {' or '.join(SUFFIXES)}", where=path, fix="name it so")
    require_writable(path)


def require_results_writable(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise InputError if a result cannot be written, or would overwrite one of the inputs."""
    given = {path.resolve() for path in inputs}
    for path in outputs:
        require_volume_writable(path)
        if path.resolve() in given:
            raise InputError("is one of the inputs", where=path, fix="name another output")


def require_file(path: Path) -> None:
    """Raise InputError if a path is not a regular file named as NIfTI; nothing is read."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"broken link to {path.readlink().name}", where=path, fix="restore its target")
    if not path.exists():
        raise InputError("no such file", where=path, fix="check the path and the case's name")
    if path.is_dir():
        raise InputError("is a directory, not a NIfTI file", where=path, fix="put the file itself there")
    if not path.is_file():  # reading a pipe would block
        raise InputError("not a regular file", where=path, fix="put a file there")
    if path.suffix.lower() in (".hdr", ".img"):
        raise InputError("a pair of .hdr and .img, as Analyze has, may lack its orientation", where=path,
                         fix="convert it to single-file NIfTI (.nii.gz)")  # fmt: skip
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"not named {' or '.join(SUFFIXES)}", where=path, fix="convert it to NIfTI")


def read_bytes(path: Path) -> tuple[nib.Nifti1Header, bytearray]:
    """Read a NIfTI file to its end: the header, unchecked, and the unpacked content.

    Raises:
        InputError: not a NIfTI file, damaged, or larger than its header claims or a head can be.
    """
    content, header, claimed = bytearray(), None, 0
    try:
        require_file(path)
        with path.open("rb") as stream:
            start = stream.read(512)
            _require_kind(start, path)
        with gzip.open(path) if start.startswith(_GZIP) else path.open("rb") as stream:
            while piece := stream.read1(_CHUNK):
                content += piece
                if header is None and len(content) >= _LONGEST_HEADER:
                    header = _parse_header(content, path)
                    claimed = _claimed_bytes(header, path)
                if len(content) > claimed + _SLACK:
                    raise InputError(f"holds far more than the {claimed} bytes it claims", where=path, fix=AGAIN)
    except EOFError as error:
        size = f"{len(content)} bytes" + (f" of {claimed} and a header" if claimed else "")
        raise InputError(f"gzip ends early (got {size})", where=path, fix=AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        cause = "checksum mismatch" if "check" in str(error).lower() else "damaged gzip stream"
        if "Not a gzipped file" in str(error):
            cause = "bytes that are not gzip follow the gzip stream"
        raise InputError(f"{cause} ({error})", where=path, fix=AGAIN) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="check its name and rights") from error
    return header or _parse_header(content, path), content


def _require_kind(start: bytes, path: Path) -> None:
    """Raise InputError if by its first bytes a file is neither NIfTI nor gzip."""
    if not start:
        raise InputError("empty (0 bytes)", where=path, fix="download it again")
    for beginning, cause, fix in _STARTS:
        if start.lstrip().startswith(beginning):
            raise InputError(cause, where=path, fix=fix)
    if path.name.lower().endswith(".gz") and not start.startswith(_GZIP):
        raise InputError("not gzip", where=path, fix="rename it to .nii, or download it again")


def _parse_header(content: bytes | bytearray, path: Path) -> nib.Nifti1Header:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(bytes(content[:_LONGEST_HEADER])):
            return kind(bytes(content[: kind.sizeof_hdr]), check=False)
    raise InputError("no NIfTI header", where=path, fix="convert it to single-file NIfTI (.nii.gz)")


def _claimed_bytes(header: nib.Nifti1Header, path: Path) -> int:
    """Return how many bytes of voxels a header claims; more than a head can have are rejected."""
    voxels = math.prod(header_shape(header, path))
    claimed = voxels * header_dtype(header, path).itemsize
    if voxels > MAX_VOXELS:
        cause = f"claims {claimed / 1e9:.1f} GB: {voxels} voxels; at most {MAX_VOXELS} are read"
        raise InputError(cause, where=path, fix=AGAIN)
    return claimed


def header_shape(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    """Return the shape (x, y, z) that a header claims; further axes of length 1 are dropped."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"dim[0] is {axes}: not a number of axes", where=path, fix=AGAIN)
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise InputError(f"an axis without voxels: shape {shape}", where=path, fix=AGAIN)
    if len(shape) > 3 and math.prod(shape[3:]) != 1:
        raise InputError(f"{math.prod(shape[3:])} volumes, need 1", where=path, fix="split the series")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"shape {shape} is not 3D", where=path, fix="give the whole volume")
    return shape[:3]


def header_dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    """Return the stored voxel type: an integer or a float of at most 8 bytes, in the file's byte order."""
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise InputError(f"unknown datatype code {int(header['datatype'])}", where=path, fix=AGAIN) from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "RGB" if dtype.names else dtype
        raise InputError(f"voxels of type {kind}, need a scalar, one real number each", where=path,
                         fix="export the intensities")  # fmt: skip
    return dtype


def header_affine(header: nib.Nifti1Header, path: Path, assume: str = "") -> np.ndarray:
    """Return the (4, 4) matrix from voxel indices to millimetres: the sform, else the qform, else that of `assume`.

    Raises:
        InputError: no orientation, or axes that are not invertible and orthogonal.
    """
    if int(header["sform_code"]) not in range(6) or int(header["qform_code"]) not in range(6):
        raise InputError("orientation codes outside 0..5", where=path, fix=EXPORT)
    stated = header["sform_code"] or header["qform_code"]
    if not (stated or assume):
        raise InputError("no orientation: sform and qform codes are both 0", where=path,
                         fix=f"{EXPORT}, or state it with --assume-orientation LPS")  # fmt: skip
    try:
        affine = header.get_best_affine() if stated else _assumed_affine(header, assume)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"qform quaternion invalid ({error})", where=path, fix=EXPORT) from error
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-3 or abs(np.linalg.det(axes)) < 1e-6:
        raise InputError("its affine is not finite and invertible", where=path, fix=EXPORT)
    cosines = np.abs(axes.T @ axes / np.outer(lengths, lengths) - np.eye(3)).max()
    if cosines > 1e-2:
        raise InputError(f"sheared axes (cosine {cosines:.2f})", where=path, fix="resample it first")
    return affine


def _assumed_affine(header: nib.Nifti1Header, orientation: str) -> np.ndarray:
    """Return the affine of an orientation: voxel sizes from pixdim, the volume's centre at the world's origin."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(orientation)):
        affine[int(axis), column] = sign * abs(float(header["pixdim"][1 + column]))
    affine[:3, 3] = -affine[:3, :3] @ ((header["dim"][1:4] - 1) / 2)
    return affine


def header_warnings(header: nib.Nifti1Header, affine: np.ndarray, path: Path) -> list[str]:
    """List what is odd about a header but does not forbid its use; InputError for other units than millimetres."""
    unit = {1: "metre", 3: "micron"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"its unit of length is the {unit}, need mm", where=path, fix="export it in millimetres")
    stated, used = ("(" + ", ".join(f"{n:g}" for n in sizes) + ")"
                    for sizes in (header["pixdim"][1:4], np.linalg.norm(affine[:3, :3], axis=0)))  # fmt: skip
    if not np.isfinite(header["pixdim"][1:4]).all():
        raise InputError(f"pixdim {stated} is not finite", where=path, fix=AGAIN)
    warnings = []
    if int(header["sizeof_hdr"]) != header.sizeof_hdr:
        warnings.append(f"sizeof_hdr is {int(header['sizeof_hdr'])}, must be {header.sizeof_hdr}")
    if int(header["bitpix"]) != 8 * header.get_data_dtype().itemsize:
        warnings.append(f"bitpix {int(header['bitpix'])} contradicts the datatype {header.get_data_dtype()}")
    if not np.allclose(header["pixdim"][1:4], np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-3):
        warnings.append(f"pixdim {stated} contradicts the affine's {used} mm, which are used")
    if header["sform_code"] and header["qform_code"]:
        warnings += _qform_warnings(header, affine)
    texts = {name: header[name].tobytes().rstrip(b"\0 ") for name in FREE_TEXT if name in header}
    if found := [name for name, text in texts.items() if text and not _SOFTWARE.fullmatch(text)]:
        warnings.append(_free_text(", ".join(found)))
    return warnings


def _qform_warnings(header: nib.Nifti1Header, sform: np.ndarray) -> list[str]:
    """Compare both orientations of a file: programs that read the qform may show it elsewhere, or mirrored."""
    try:
        qform = header.get_qform()
    except (nib.spatialimages.HeaderDataError, ValueError):
        return ["qform quaternion invalid; the sform is used"]
    apart_mm = corner_distance_mm(header["dim"][1:4], sform, qform)
    mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    if mirrored or (header["sform_code"] == header["qform_code"] and not apart_mm <= 1):
        return [f"sform and qform lie {apart_mm:.0f} mm apart{', mirrored' if mirrored else ''}; the sform is used"]
    return []


def corner_distance_mm(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """Return the largest distance between the corners of a grid and where another affine puts them."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm(corners @ (affine - other).T, axis=1).max())


def _free_text(what: str) -> str:
    return f"free text in the header ({what}) may name the patient; outputs keep it, unless --scrub-header"


def voxel_offset(header: nib.Nifti1Header, content: bytearray, path: Path, warnings: list[str]) -> int:
    """Return where the voxels begin, after header and extensions, each of which must end before them."""
    offset, first = float(header["vox_offset"]), int(header.single_vox_offset)
    if not math.isfinite(offset) or not first <= offset <= len(content):
        cause = f"vox_offset {offset:g} is not inside the file ({first} to {len(content)} bytes)"
        raise InputError(cause, where=path, fix=AGAIN)
    start = first
    while content[first - 4] and start + 8 <= offset:
        (size,) = struct.unpack_from(f"{header.endianness}i", content, start)
        if not 8 <= size <= offset - start:
            raise InputError(f"a header extension claims {size} bytes, {int(offset) - start} are there", where=path,
                             fix=AGAIN)  # fmt: skip
        start += size
    if start > first:
        warnings.append(_free_text(f"extensions of {start - first} bytes"))
    return int(offset)


def scrubbed(header: nib.Nifti1Header) -> bytes:
    """Return the bytes in front of the voxels without free text and without extensions."""
    bare = header.copy()
    for name in set(FREE_TEXT) & set(bare.keys()):
        bare[name] = b""
    bare["vox_offset"] = header.single_vox_offset
    return bare.binaryblock.ljust(header.single_vox_offset, b"\0")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a packed or plain file completely or not at all, and read it back before it takes its name."""
    require_volume_writable(path)
    packed = gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content
    try:
        with replacing(path) as partial:
            partial.write_bytes(packed)
            if partial.read_bytes() != packed:
                raise InputError("what was written does not read back", where=path, fix="check the disk")
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=path, fix="check space and rights") from error
    return path
