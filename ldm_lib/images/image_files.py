"""Read and write the bytes of image files of every format: NIfTI (.nii, .nii.gz) and MGH (.mgh, .mgz).

A bad file is rejected as early as possible: by its name and its first bytes, by the size that its header claims before
memory is taken for it, and by a gzip stream that ends early or fails its checksum.
"""

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.files import replacing, require_writable

SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
ANY_OF_SUFFIXES = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
MAX_VOXELS = 1 << 27  # a scan of 0.5 mm voxels has 72 million; each needs tens of bytes while it is processed
AGAIN = "download or export the file again"
GZIP_LEVEL = 3  # 6 takes three times as long on float32 and saves 7 %
_SLACK = 16 << 20  # bytes that header, extensions and what follows the voxels may take
_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"
_STARTS = (  # how files begin that are often found in the place of a volume
    (b"<", "an HTML page, not NIfTI", "log in to Synapse and download it again"),
    (b"version https://git-lfs", "a git-LFS pointer, not the file", "run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file", "run `git annex get`"),
)


@dataclass(frozen=True)
class Layout:
    """Describe where the voxels of a file are, and what they mean, as its header states."""

    shape: tuple[int, int, int]
    dtype: np.dtype  # stored, in the file's byte order
    affine: np.ndarray  # (4, 4) voxel indices to millimetres, RAS+ world
    offset: int  # bytes before the first voxel
    preamble: bytes  # what results have before the first voxel
    trailer: bytes = b""  # what results have after the last voxel
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def end(self) -> int:
        """Bytes up to the last voxel."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def with_trailer(self, trailer: bytes) -> "Layout":
        """Return the layout with what results have after the last voxel."""
        return replace(self, trailer=trailer)


def free_text(what: str) -> str:
    """Return the warning about texts in a header."""
    return (
        f"free text in the header ({what}) may name the patient; outputs keep it, unless `ldm inpaint --scrub-header`"
    )


def stem(path: Path) -> str:
    """Return a file's name without .nii, .nii.gz, .mgh or .mgz."""
    return re.sub(r"\.(nii(\.gz)?|mg[hz])$", "", path.name, flags=re.IGNORECASE)


def is_mgh(path: Path) -> bool:
    """Return whether a file is MGH by its name: .mgh, or .mgz, which is packed."""
    return path.name.lower().endswith((".mgh", ".mgz"))


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".mgz"))


def require_results_writable(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Raise InputError if a result cannot be written, is not named as an image, or is one of the inputs."""
    given = {path.resolve() for path in inputs}
    for path in outputs:
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"an output must end in {ANY_OF_SUFFIXES}", where=path, fix="name it so")
        require_writable(path)
        if path.resolve() in given:
            raise InputError("is one of the inputs", where=path, fix="name another output")


def require_file(path: Path) -> None:
    """Raise InputError if a path is not a regular file named as an image; nothing is read."""
    name = path.name.lower()
    if path.is_symlink() and not path.exists():
        cause, fix = f"broken link to {path.readlink().name}", "restore its target"
    elif not path.exists():
        cause, fix = "no such file", "check the path and the case's name"
    elif path.is_dir():
        cause, fix = "is a directory, not an image file", "put the file itself there"
    elif not path.is_file():  # reading a pipe would block
        cause, fix = "not a regular file", "put a file there"
    elif not name.endswith(SUFFIXES):
        what = "a pair of .hdr and .img, as Analyze has, may lack its orientation; " * name.endswith((".hdr", ".img"))
        cause, fix = f"{what}not named {ANY_OF_SUFFIXES}", "convert it to single-file NIfTI (.nii.gz)"
    else:
        return
    raise InputError(cause, where=path, fix=fix)


def read_bytes(path: Path, claimed_bytes: Callable[[bytes], int], *, header_bytes: int) -> bytearray:
    """Read a file to its end and unpack it.

    Args:
        claimed_bytes: returns how many bytes of voxels a header claims, given the first `header_bytes` of the content.

    Raises:
        InputError: not an image, damaged, or with more voxels or bytes than a scan can have.
    """
    content, claimed = bytearray(), 0
    try:
        require_file(path)
        with path.open("rb") as stream:
            start = stream.read(512)
        _require_kind(start, path)
        with gzip.open(path) if start.startswith(_GZIP) else path.open("rb") as stream:
            while piece := stream.read1(_CHUNK):
                content += piece
                if not claimed and len(content) >= header_bytes:
                    claimed = claimed_bytes(bytes(content[:header_bytes]))
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
    if not claimed:
        claimed_bytes(bytes(content))
    return content


def _require_kind(start: bytes, path: Path) -> None:
    """Raise InputError if by its first bytes a file is neither an image nor gzip."""
    if not start:
        raise InputError("empty (0 bytes)", fix="download it again")
    for beginning, cause, fix in _STARTS:
        if start.lstrip().startswith(beginning):
            raise InputError(cause, fix=fix)
    if _is_packed(path) and not start.startswith(_GZIP):
        plain = ".mgh" if is_mgh(path) else ".nii"
        raise InputError("not gzip", fix=f"rename it to {plain}, or download it again")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a packed or plain file completely or not at all."""
    require_results_writable([path])
    packed = gzip.compress(content, GZIP_LEVEL, mtime=0) if _is_packed(path) else content
    try:
        with replacing(path) as partial:
            partial.write_bytes(packed)
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", where=path, fix="check space and rights") from error
    return path


def size_in_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Return the bytes that voxels take; InputError for more than MAX_VOXELS voxels."""
    voxels = math.prod(shape)
    claimed = voxels * dtype.itemsize
    if voxels > MAX_VOXELS:
        cause = f"claims {claimed / 1e9:.1f} GB: {voxels} voxels; at most {MAX_VOXELS} are read"
        raise InputError(cause, fix=AGAIN)
    return claimed


def require_3d(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the first three axes of a shape whose other axes have length 1, else raise InputError."""
    if min(shape) < 1:
        raise InputError(f"an axis without voxels: shape {shape}", fix=AGAIN)
    if len(shape) > 3 and math.prod(shape[3:]) != 1:
        raise InputError(f"{math.prod(shape[3:])} volumes, need 1", fix="split the series")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"shape {shape} is not 3D", fix="give the whole volume")
    return shape[:3]


def require_exact(raw: np.ndarray) -> None:
    """Raise InputError if float32, in which all is computed, cannot represent stored integers exactly."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize < 4 or (abs(int(raw.min())) | int(raw.max())) <= 1 << 24:
        return
    with np.errstate(invalid="ignore"):  # beyond the integer type comes back as another number
        rounded = raw.astype(np.float32).astype(raw.dtype)
    if lost := int(np.count_nonzero(rounded != raw)):
        cause = f"{lost} voxels of type {raw.dtype} do not fit float32, up to {raw.max()}"
        raise InputError(cause, fix="store intensities below 16777216, or as float32")
