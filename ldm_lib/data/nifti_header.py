"""What the header of a NIfTI file says, and which of it may be believed. No voxel is needed for that."""

import math
import re
import struct
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError

LONGEST = nib.Nifti2Header.sizeof_hdr  # of the two kinds of header
FARTHEST_MM = 1e5  # of an origin; beyond it float32 does not resolve the millimetres by which grids are compared
AGAIN = "download or export the file again"
FREE_TEXT = ("descrip", "db_name", "aux_file", "intent_name", "data_type")
SOFTWARE = re.compile(  # what programs sign with; anything else may name a patient
    rb"(FSL|SPM|ITK|ANTs|AFNI|FreeSurfer|NiftyReg|dcm2niix|nibabel)?[ _v]*\d+(\.\d+)+(:[0-9a-f]+)?|SPM compatible"
)


def parse_header(content: bytes, path: Path) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header at the start of the content, in its own byte order, unchecked."""
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(content[:LONGEST]):
            size = kind.sizeof_hdr
            orders = {"<": size.to_bytes(4, "little"), ">": size.to_bytes(4, "big")}
            told = [order for order, start in orders.items() if content[:4] == start]
            return kind(bytes(content[:size]), endianness=told[0] if told else None, check=False)  # None: guessed
    raise InputError("no NIfTI header", where=path, fix="convert it to single-file NIfTI (.nii.gz)")


def header_shape(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    """(x, y, z); further axes of length 1 are dropped."""
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
    """The stored voxel type, an integer or a float of at most 8 bytes, in the file's byte order."""
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
    """(4, 4) voxel indices to millimetres: the sform, else the qform; invertible, with orthogonal axes.

    Args:
        assume: the orientation, such as "LPS", of a file that does not say its own.
    """
    export = "export it with its scanner orientation"
    if int(header["sform_code"]) not in range(6) or int(header["qform_code"]) not in range(6):
        raise InputError("orientation codes outside 0..5", where=path, fix=export)
    if not (header["sform_code"] or header["qform_code"]):
        if not assume:
            raise InputError("no orientation: sform and qform codes are both 0", where=path,
                             fix=f"{export}, or say it with --assume-orientation LPS")  # fmt: skip
        return _assumed_affine(header, path, assume)
    try:
        affine = header.get_best_affine()
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"qform quaternion invalid ({error})", where=path, fix=export) from error
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-3 or abs(np.linalg.det(axes)) < 1e-6:
        raise InputError("its affine is not finite and invertible", where=path, fix=export)
    if np.abs(affine[:3, 3]).max() > FARTHEST_MM:
        raise InputError(f"its origin lies at {_triple(affine[:3, 3])} mm, farther than {FARTHEST_MM:g}", where=path,
                         fix=export)  # fmt: skip
    if lengths.max() > 1e3:
        raise InputError(f"voxels of {_triple(lengths)} mm, at most 1000 along an axis", where=path, fix=export)
    cosines = np.abs(axes.T @ axes / np.outer(lengths, lengths) - np.eye(3)).max()
    if cosines > 1e-2:
        raise InputError(f"sheared axes (cosine {cosines:.2f})", where=path, fix="resample it first")
    return affine


def _assumed_affine(header: nib.Nifti1Header, path: Path, orientation: str) -> np.ndarray:
    """Axes as told, voxels of pixdim, the volume's centre at the world's origin."""
    spacing = np.abs(header["pixdim"][1:4].astype(float))
    if not np.isfinite(spacing).all() or spacing.min() < 1e-3:
        raise InputError(f"pixdim {_triple(spacing)}: no voxel size to go with the orientation assumed", where=path,
                         fix="export it with its scanner orientation")  # fmt: skip
    affine = np.diag([0.0, 0, 0, 1])
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(orientation)):
        affine[int(axis), column] = sign * spacing[column]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(header_shape(header, path)) - 1) / 2)
    return affine


def header_oddities(header: nib.Nifti1Header, affine: np.ndarray, path: Path) -> list[str]:
    """Fields that contradict the others, as warnings; refused where millimetres are in doubt."""
    unit = {1: "metre", 3: "micron"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"its unit of length is the {unit}, need mm", where=path, fix="export it in millimetres")
    found, spacing = header["pixdim"][1:4], np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(found).all():
        raise InputError(f"pixdim {_triple(found)} is not finite", where=path, fix=AGAIN)
    warnings = []
    if int(header["sizeof_hdr"]) != header.sizeof_hdr:
        warnings.append(f"sizeof_hdr is {int(header['sizeof_hdr'])}, must be {header.sizeof_hdr}")
    if int(header["bitpix"]) != 8 * header.get_data_dtype().itemsize:
        warnings.append(f"bitpix {int(header['bitpix'])} contradicts the datatype {header.get_data_dtype()}")
    if told := [name for name in FREE_TEXT if name in header and not _is_signature(header[name].tobytes())]:
        warnings.append(f"free text in the header ({', '.join(told)}) may name the patient; outputs keep it, "
                        "unless --scrub-header")  # fmt: skip
    if int(header["xyzt_units"]) & 7 > 3:
        warnings.append(f"unit of length {int(header['xyzt_units']) & 7} is none; millimetres assumed")
    warnings += _second_opinion(header, affine)
    if not np.allclose(found, spacing, rtol=1e-3):
        warnings.append(f"pixdim {_triple(found)} contradicts the affine's {_triple(spacing)} mm, which are used")
    return warnings


def _second_opinion(header: nib.Nifti1Header, affine: np.ndarray) -> list[str]:
    """What the qform says where the sform is used: programs that read it would see the volume elsewhere."""
    if not (header["sform_code"] and header["qform_code"]):
        return []
    try:
        other = header.get_qform()
    except (nib.spatialimages.HeaderDataError, ValueError):
        return ["qform quaternion invalid; the sform is used"]
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.abs(header["dim"][1:4]) - 1.0
    apart = float(np.linalg.norm(corners @ (affine - other).T, axis=1).max())
    mirrored = np.linalg.det(affine[:3, :3]) * np.linalg.det(other[:3, :3]) < 0
    alike = header["sform_code"] == header["qform_code"]
    if mirrored or (alike and not apart <= 1):
        return [f"sform and qform lie {apart:.0f} mm apart{', mirrored' if mirrored else ''}; the sform is used"]
    return []


def _is_signature(text: bytes) -> bool:
    """Nothing at all, or a program's name and version."""
    return not (told := text.rstrip(b"\0 ")) or bool(SOFTWARE.fullmatch(told))


def _triple(numbers: np.ndarray) -> str:
    return "(" + ", ".join(f"{n:g}" for n in numbers) + ")"


def voxel_offset(header: nib.Nifti1Header, content: bytes, path: Path, warnings: list[str]) -> int:
    """Where the voxels begin, behind header and extensions, each of which must end before them."""
    offset, first = float(header["vox_offset"]), int(header.single_vox_offset)
    if not math.isfinite(offset) or not first <= offset <= len(content):
        raise InputError(
            f"vox_offset {offset:g} is not inside the file ({first} to {len(content)} bytes)", where=path, fix=AGAIN
        )
    start = first
    while content[first - 4] and start + 8 <= offset:
        (size,) = struct.unpack_from(f"{header.endianness}i", content, start)
        if not 8 <= size <= offset - start:
            raise InputError(f"a header extension claims {size} bytes, {int(offset) - start} are there", where=path,
                             fix=AGAIN)  # fmt: skip
        start += size
    if start > first:
        warnings.append(f"free text in the header (extensions of {start - first} bytes) may name the patient; "
                        "outputs keep it, unless --scrub-header")  # fmt: skip
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
        raise InputError(f"scl_slope {slope:g}, scl_inter {intercept:g}: not a usable range", where=path, fix=AGAIN)
    return slope, intercept


def require_exact(raw: np.ndarray, path: Path) -> None:
    """Refuse whole numbers that float32, in which all is computed, cannot tell from their neighbours."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize < 4 or (abs(int(raw.min())) | int(raw.max())) <= 1 << 24:
        return
    with np.errstate(invalid="ignore"):  # beyond the integer type comes back as another number
        rounded = raw.astype(np.float32).astype(raw.dtype)
    if lost := int(np.count_nonzero(rounded != raw)):
        raise InputError(f"{lost} voxels of type {raw.dtype} do not fit float32, up to {raw.max()}", where=path,
                         fix="store intensities below 16777216, or as float32")  # fmt: skip


def scrubbed(header: nib.Nifti1Header) -> bytes:
    """The bytes in front of the voxels without free text and without extensions."""
    bare = header.copy()
    for name in set(FREE_TEXT) & set(bare.keys()):
        bare[name] = b""
    bare["vox_offset"] = header.single_vox_offset
    return bare.binaryblock.ljust(header.single_vox_offset, b"\0")
