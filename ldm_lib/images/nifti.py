"""Read NIfTI headers, check them, and make such files."""

import math
import re
import struct

import nibabel as nib
import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.geometry import axis_codes
from ldm_lib.images.affines import EXPORT, assumed_affine, corner_distance_mm, no_orientation, require_usable
from ldm_lib.images.image_files import AGAIN, Layout, free_text, require_3d, size_in_bytes
from ldm_lib.images.options import ReadOptions

FREE_TEXT = ("descrip", "db_name", "aux_file", "intent_name", "data_type")
_SOFTWARE = re.compile(  # name and version of a program; any other text may name a patient
    rb"(FSL|SPM|ITK|ANTs|AFNI|FreeSurfer|NiftyReg|dcm2niix|nibabel)?[ _v]*\d+(\.\d+)+(:[0-9a-f]+)?|SPM compatible"
)
HEADER_BYTES = nib.Nifti2Header.sizeof_hdr  # the longest


def claimed_bytes(content: bytes) -> int:
    """Return how many bytes of voxels the header at the beginning of a file claims."""
    header = _parse_header(content)
    return size_in_bytes(header_shape(header), header_dtype(header))


def layout(content: bytearray, read_options: ReadOptions, warnings: list[str]) -> Layout:
    """Describe an unpacked NIfTI file; what is odd but usable is appended to `warnings`.

    Raises:
        InputError: not a 3D scalar volume, no usable orientation, or contradictions.
    """
    header, assumed = _parse_header(content), read_options.assume_orientation
    shape, dtype, affine = header_shape(header), header_dtype(header), header_affine(header, assumed)
    warnings += header_warnings(header, affine)
    if assumed:
        stated = stated_orientation(header)
        warnings += [] if stated == assumed else [f"states {stated or 'no orientation'}: {assumed} assumed"]
    offset = voxel_offset(header, content, warnings)
    slope, intercept = _scaling(header, warnings)
    preamble = scrubbed(header) if read_options.scrub_header else bytes(content[:offset])
    return Layout(shape, dtype, affine, offset, preamble, slope=slope, intercept=intercept)


def new_file(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Return a NIfTI file of the array's own type (x, y, z): slope 1, intercept 0, scanner coordinates in mm."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    return image.to_bytes()


def _parse_header(content: bytes | bytearray) -> nib.Nifti1Header:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(bytes(content[:HEADER_BYTES])):
            return kind(bytes(content[: kind.sizeof_hdr]), check=False)
    raise InputError("no NIfTI header", fix="convert it to single-file NIfTI (.nii.gz)")


def header_shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return the shape (x, y, z) that a header claims; further axes of length 1 are dropped."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"dim[0] is {axes}: not a number of axes", fix=AGAIN)
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    return require_3d(shape)


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
        raise no_orientation("sform and qform codes are both 0")
    try:
        given = (header["dim"][1:4], header["pixdim"][1:4])
        affine = assumed_affine(assume, *given) if assume else header.get_best_affine()
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise InputError(f"qform quaternion invalid ({error})", fix=EXPORT) from error
    return require_usable(affine)


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
        warnings.append(free_text(", ".join(found)))
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
        warnings.append(free_text(f"extensions of {int(offset) - first} bytes"))
    return int(offset)


def scrubbed(header: nib.Nifti1Header) -> bytes:
    """Return the bytes in front of the voxels without free text and without extensions."""
    bare = header.copy()
    for name in set(FREE_TEXT) & set(bare.keys()):
        bare[name] = b""
    bare["vox_offset"] = header.single_vox_offset
    return bare.binaryblock.ljust(header.single_vox_offset, b"\0")


def _scaling(header: nib.Nifti1Header, warnings: list[str]) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 or one that is not finite means 1 and 0."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        warnings += [f"scl_slope {slope} read as 1"] if slope else []
        return 1.0, 0.0
    if not math.isfinite(intercept) or abs(slope) < 1e-30:
        raise InputError(f"scl_slope {slope:g}, scl_inter {intercept:g}: not a usable range", fix=AGAIN)
    return slope, intercept
