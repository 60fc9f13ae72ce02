"""Read MGH headers (FreeSurfer's .mgh and .mgz), check them, and make such files.

A header of 284 bytes is followed by the voxels, scan parameters (20 bytes) and tags: texts such as the commands that
made the file. All numbers are big-endian; there is no slope and no intercept.
"""

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from ldm_lib.errors import InputError
from ldm_lib.geometry import axis_codes
from ldm_lib.images.affines import assumed_affine, no_orientation, require_usable
from ldm_lib.images.image_files import AGAIN, Layout, free_text, require_3d, size_in_bytes
from ldm_lib.images.options import ReadOptions

HEADER_BYTES = 284
_PARAMETER_BYTES = 20  # after the voxels: repetition time, flip angle, echo time, inversion time, field of view
_ORIENTATION_FLAG = slice(28, 30)
_TYPES = ("u1", "i2", "i4", "f4")  # that every program reads


def claimed_bytes(content: bytes) -> int:
    """Return how many bytes of voxels the header at the beginning of a file claims."""
    header = _parse_header(content)
    return size_in_bytes(_shape(header), _dtype(header))


def layout(content: bytearray, read_options: ReadOptions, warnings: list[str]) -> Layout:
    """Describe an unpacked MGH file; what is odd but usable is appended to `warnings`.

    Raises:
        InputError: not a 3D scalar volume, or no usable orientation.
    """
    header = _parse_header(content)
    stated = any(content[_ORIENTATION_FLAG])  # nibabel replaces what is not stated by a default
    affine = _affine(header, stated, read_options.assume_orientation, warnings)
    stored = Layout(_shape(header), _dtype(header), affine, HEADER_BYTES, bytes(content[:HEADER_BYTES]))
    trailer = bytes(content[stored.end :])
    if tags := trailer[_PARAMETER_BYTES:]:
        warnings.append(free_text(f"tags of {len(tags)} bytes"))
    return stored.with_trailer(trailer[:_PARAMETER_BYTES] if read_options.scrub_header else trailer)


def new_file(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Return an MGH file of voxels (x, y, z) in the smallest of its types that holds theirs, at most float32."""
    fitting = next((kind for kind in _TYPES if np.can_cast(voxels.dtype, kind)), "f4")
    return nib.MGHImage(voxels.astype(fitting), affine).to_bytes()


def _parse_header(content: bytes | bytearray) -> MGHHeader:
    if len(content) >= HEADER_BYTES:
        header = MGHHeader(bytes(content[:HEADER_BYTES]), check=False)
        if int(header["version"]) == 1:
            return header
    raise InputError("no MGH header", fix="convert it to .mgz or .nii.gz again")


def _shape(header: MGHHeader) -> tuple[int, int, int]:
    return require_3d(tuple(int(n) for n in header["dims"]))


def _dtype(header: MGHHeader) -> np.dtype:
    try:
        return header.get_data_dtype()
    except KeyError as error:
        raise InputError(f"unknown type code {int(header['type'])}", fix=AGAIN) from error


def _affine(header: MGHHeader, stated: bool, assume: str, warnings: list[str]) -> np.ndarray:
    """Return the (4, 4) matrix from voxel indices to millimetres that the header states, or that is assumed."""
    if not assume:
        if not stated:
            raise no_orientation("goodRASFlag is 0")
        return require_usable(header.get_affine())
    if (orientation := axis_codes(header.get_affine()) if stated else "no orientation") != assume:
        warnings.append(f"states {orientation}: {assume} assumed")
    return require_usable(assumed_affine(assume, header["dims"][:3], header["delta"]))
