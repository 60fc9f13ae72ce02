"""Read the bytes of NIfTI files, check their headers, and write such files.

A bad file is rejected as early as possible: by its name and its first bytes, by the size that its header claims before
memory is taken for it, and by a gzip stream that ends early or fails its checksum.
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
from ldm_lib.geometry import axis_codes

SUFFIXES = (".nii.gz", ".nii")
MAX_VOXELS = 1 << 27  # a scan of 0.5 mm voxels has 72 million; each needs tens of bytes while it is processed
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


def require_results_writable(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Raise InputError if a result cannot be written, is not named as NIfTI, or would overwrite one of the inputs."""
    given = {path.resolve() for path in inputs}
    for path in outputs:
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"an output must end in {' or '.join(SUFFIXES)}", where=path, fix="name it so")
        require_writable(path)
        if path.resolve() in given:
            raise InputError("is one of the inputs", where=path, fix="name another output")


def require_file(path: Path) -> None:
    """Raise InputError if a path is not a regular file named as NIfTI; nothing is read."""
    name = path.name.lower()
    if path.is_symlink() and not path.exists():
        cause, fix = f"broken link to {path.readlink().name}", "restore its target"
    elif not path.exists():
        cause, fix = "no such file", "check the path and the case's name"
    elif path.is_dir():
        cause, fix = "is a directory, not a NIfTI file", "put the file itself there"
    elif not path.is_file():  # reading a pipe would block
        cause, fix = "not a regular file", "put a file there"
    elif not name.endswith(SUFFIXES):
        what = "a pair of .hdr and .img, as Analyze has, may lack its orientation; " * name.endswith((".hdr", ".img"))
        cause, fix = f"{what}not named {' or '.join(SUFFIXES)}", "convert it to single-file NIfTI (.nii.gz)"
    else:
        return
    raise InputError(cause, where=path, fix=fix)


def read_bytes(path: Path) -> tuple[nib.Nifti1Header, bytearray]:
    """Read a NIfTI file to its end: the header, unchecked, and the unpacked content.

    Raises:
        InputError: not a NIfTI file, damaged, or with more voxels or bytes than a scan can have.
    """
    content, header, claimed = bytearray(), None, 0
    try:
        require_file(path)
        with path.open("rb") as stream:
            start = stream.read(512)
        _require_kind(start, packed=path.name.lower().endswith(".gz"))
        with gzip.open(path) if start.startswith(_GZIP) else path.open("rb") as stream:
            while piece := stream.read1(_CHUNK):
                content += piece
                if header is None and len(content) >= _LONGEST_HEADER:
                    header = _parse_header(content)
                    claimed = _claimed_bytes(header)
                if len(content) > claimed + _SLACK:
                    raise InputError(f"holds far more than the {claimed} bytes it claims", fix=AGAIN)
    except EOFError as error:
        size = f"{len(content)} bytes" + (f" of {claimed} and a header" if claimed else "")
        raise InputError(f"gzip ends early (got {size})", fix=AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        cause = "checksum mismatch" if "check" in str(error).lower() else "damaged gzip stream"
        if "Not a gzipped file" in str(error):
            cause = "bytes that are not gzip follow the gzip stream"
        raise InputError(f"{cause} ({error})", fix=AGAIN) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", fix="check its name and rights") from error
    return header or _parse_header(content), content


def _require_kind(start: bytes, *, packed: bool) -> None:
    """Raise InputError if by its first bytes a file is neither NIfTI nor gzip."""
    if not start:
        raise InputError("empty (0 bytes)", fix="download it again")
    for beginning, cause, fix in _STARTS:
        if start.lstrip().startswith(beginning):
            raise InputError(cause, fix=fix)
    if packed and not start.startswith(_GZIP):
        raise InputError("not gzip", fix="rename it to .nii, or download it again")


def _parse_header(content: bytes | bytearray) -> nib.Nifti1Header:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(bytes(content[:_LONGEST_HEADER])):
            return kind(bytes(content[: kind.sizeof_hdr]), check=False)
    raise InputError("no NIfTI header", fix="convert it to single-file NIfTI (.nii.gz)")


def _claimed_bytes(header: nib.Nifti1Header) -> int:
    """Return how many bytes of voxels a header claims; InputError for more than MAX_VOXELS voxels."""
    voxels = math.prod(header_shape(header))
    claimed = voxels * header_dtype(header).itemsize
    if voxels > MAX_VOXELS:
        cause = f"claims {claimed / 1e9:.1f} GB: {voxels} voxels; at most {MAX_VOXELS} are read"
        raise InputError(cause, fix=AGAIN)
    return claimed


def header_shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return the shape (x, y, z) that a header claims; further axes of length 1 are dropped."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"dim[0] is {axes}: not a number of axes", fix=AGAIN)
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise InputError(f"an axis without voxels: shape {shape}", fix=AGAIN)
    if len(shape) > 3 and math.prod(shape[3:]) != 1:
        raise InputError(f"{math.prod(shape[3:])} volumes, need 1", fix="split the series")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"shape {shape} is not 3D", fix="give the whole volume")
    return shape[:3]


def header_dtype(header: nib.Nifti1Header) -> np.dtype:
    """Return the stored voxel type: an integer or a float of at most 8 bytes, in the file's byte order."""
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise InputError(f"unknown datatype code {int(header['datatype'])}", fix=AGAIN) from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "RGB" if dtype.names else dtype
        raise InputError(f"voxels of type {kind}, need one real number each", fix="export the intensities")
    return dtype


def header_affine(header: nib.Nifti1Header, assume: str = "") -> np.ndarray:
    """Return the (4, 4) matrix from voxel indices to millimetres: the sform, else the qform; `assume` goes before both.

    Raises:
        InputError: no orientation, or axes that are not invertible and orthogonal.
    """
    if int(header["sform_code"]) not in range(6) or int(header["qform_code"]) not in range(6):
        raise InputError("orientation codes outside 0..5", fix=EXPORT)
    stated = header["sform_code"] or header["qform_code"]
    if not (stated or assume):
        fix = f"{EXPORT}, or state it with --assume-orientation LPS"
        raise InputError("no orientation: sform and qform codes are both 0", fix=fix)
    try:
        affine = _assumed_affine(header, assume) if assume else header.get_best_affine()
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"qform quaternion invalid ({error})", fix=EXPORT) from error
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-3 or abs(np.linalg.det(axes)) < 1e-6:
        raise InputError("its affine is not finite and invertible", fix=EXPORT)
    cosines = np.abs(axes.T @ axes / np.outer(lengths, lengths) - np.eye(3)).max()
    if cosines > 1e-2:
        raise InputError(f"sheared axes (cosine {cosines:.2f})", fix="resample it first")
    return affine


def _assumed_affine(header: nib.Nifti1Header, orientation: str) -> np.ndarray:
    """Return the affine of an orientation: voxel sizes from pixdim, the volume's centre at the world's origin."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(orientation)):
        affine[int(axis), column] = sign * abs(float(header["pixdim"][1 + column]))
    affine[:3, 3] = -affine[:3, :3] @ ((header["dim"][1:4] - 1) / 2)
    return affine


def stated_orientation(header: nib.Nifti1Header) -> str:
    """Return the orientation that a header states, such as "RAS"; empty if it states none or one that is invalid."""
    try:
        return axis_codes(header_affine(header))
    except InputError:
        return ""


def header_warnings(header: nib.Nifti1Header, affine: np.ndarray) -> list[str]:
    """List what is odd about a header but does not forbid its use; InputError for other units than millimetres."""
    if unit := {1: "metre", 3: "micron"}.get(int(header["xyzt_units"]) & 7):
        raise InputError(f"its unit of length is the {unit}, need mm", fix="export it in millimetres")
    pixdim, spacing_mm = header["pixdim"][1:4], np.linalg.norm(affine[:3, :3], axis=0)
    stated, used = (f"({', '.join(f'{n:g}' for n in sizes)})" for sizes in (pixdim, spacing_mm))
    if not np.isfinite(pixdim).all():
        raise InputError(f"pixdim {stated} is not finite", fix=AGAIN)
    warnings = []
    if int(header["sizeof_hdr"]) != header.sizeof_hdr:
        warnings.append(f"sizeof_hdr is {int(header['sizeof_hdr'])}, must be {header.sizeof_hdr}")
    if int(header["bitpix"]) != 8 * header.get_data_dtype().itemsize:
        warnings.append(f"bitpix {int(header['bitpix'])} contradicts the datatype {header.get_data_dtype()}")
    if not np.allclose(pixdim, spacing_mm, rtol=1e-3):
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


def voxel_offset(header: nib.Nifti1Header, content: bytearray, warnings: list[str]) -> int:
    """Return where the voxels begin, after the header and its extensions."""
    offset, first = float(header["vox_offset"]), int(header.single_vox_offset)
    if not math.isfinite(offset) or not first <= offset <= len(content):
        cause = f"vox_offset {offset:g} is not inside the file ({first} to {len(content)} bytes)"
        raise InputError(cause, fix=AGAIN)
    if content[first - 4] and offset >= first + 8:
        (size,) = struct.unpack_from(f"{header.endianness}i", content, first)
        if not 8 <= size <= offset - first:
            cause = f"a header extension claims {size} bytes, {int(offset) - first} are there"
            raise InputError(cause, fix=AGAIN)
        warnings.append(_free_text(f"extensions of {int(offset) - first} bytes"))
    return int(offset)


def scrubbed(header: nib.Nifti1Header) -> bytes:
    """Return the bytes in front of the voxels without free text and without extensions."""
    bare = header.copy()
    for name in set(FREE_TEXT) & set(bare.keys()):
        bare[name] = b""
    bare["vox_offset"] = header.single_vox_offset
    return bare.binaryblock.ljust(header.single_vox_offset, b"\0")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a packed or plain file completely or not at all."""
    require_results_writable([path])
    packed = gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content
    try:
        with replacing(path) as partial:
            partial.write_bytes(packed)
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=path, fix="check space and rights") from error
    return path
