"""The bytes of a NIfTI file: what must hold before a voxel is believed, and how bytes reach the disk.

The checks run in an order that spends nothing on a bad file: is it a file, what kind, what does its header claim, does
the stream reach its end with the right checksum. Nothing is allocated on a header's word alone.
"""

import gzip
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from ldm_lib.data.nifti_header import AGAIN, LONGEST, header_dtype, header_shape, parse_header
from ldm_lib.errors import InputError
from ldm_lib.files import replacing, require_writable

SUFFIXES = (".nii.gz", ".nii")
MAX_VOXELS = 1 << 27  # a head at half a millimetre has 72 million; each takes tens of bytes while it is looked at
MAX_BYTES = 8 * MAX_VOXELS
MAX_MEMBERS = 50_000  # of a gzip file; bgzip makes a few hundred of a head
_SLACK = MAX_BYTES // 64  # headers, extensions, stray bytes behind the voxels
_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"


def stem(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def require_volume_writable(path: str | Path) -> None:
    """Refuse an output path early: wrong ending, or as `require_writable`."""
    if not str(path).lower().endswith(SUFFIXES):
        raise InputError(f"an output must end in {' or '.join(SUFFIXES)}", where=path, fix="name it so")
    require_writable(path)


def require_results_writable(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse results that cannot be written, or that would take the place of what they are made from."""
    given = {path.resolve() for path in inputs}
    for path in outputs:
        require_volume_writable(path)
        if path.resolve() in given:
            raise InputError("is one of the inputs", where=path, fix="name another output")


def read_bytes(path: Path) -> tuple[bytes | bytearray, int]:
    """The unpacked content, and how many packed bytes follow the last gzip member."""
    try:
        require_file(path)
        with path.open("rb") as stream:
            head = stream.read(_SLACK // 8)
            _require_kind(head, path)
            claimed, size = _claimed_bytes(_first_bytes(head), path), path.stat().st_size
            if claimed is not None and size > claimed + _SLACK:
                raise InputError(f"holds {size / 1e9:.1f} GB, far more than the {claimed} bytes it claims", where=path,
                                 fix=AGAIN)  # fmt: skip
            packed = head + stream.read()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="check its name and rights") from error
    return _gunzip(packed, claimed, path) if packed.startswith(_GZIP) else (packed, 0)


def _require_kind(head: bytes, path: Path) -> None:
    """Refuse what by its first bytes is no NIfTI file, packed or plain."""
    start = head[:512].lstrip()
    if not head:
        raise InputError("empty (0 bytes)", where=path, fix="download it again")
    if start.startswith(b"<"):
        raise InputError("an HTML page, not NIfTI", where=path, fix="log in to Synapse and download it again")
    if start.startswith(b"version https://git-lfs"):
        raise InputError("a git-LFS pointer, not the file", where=path, fix="run `git lfs pull`")
    if start.startswith(b"/annex/objects/"):
        raise InputError("a git-annex pointer, not the file", where=path, fix="run `git annex get`")
    if path.name.lower().endswith(".gz") and not head.startswith(_GZIP):
        raise InputError("not gzip", where=path, fix="rename it to .nii, or download it again")


def require_file(path: Path) -> None:
    """Refuse what is no file of a size that can be read, before anything of it is."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"broken link to {path.readlink().name}", where=path, fix="restore its target")
    if not path.exists():
        raise InputError("no such file", where=path, fix="check the path and the case's name")
    if path.is_dir():
        raise InputError("is a directory, not a NIfTI file", where=path, fix="put the file itself there")
    if not path.is_file():  # a pipe would be waited for
        raise InputError("not a regular file", where=path, fix="put a file there")
    if path.suffix.lower() in (".hdr", ".img"):
        raise InputError("a pair of .hdr and .img, as Analyze has, may lack its orientation", where=path,
                         fix="convert it to single-file NIfTI (.nii.gz)")  # fmt: skip
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"not named {' or '.join(SUFFIXES)}", where=path, fix="convert it to NIfTI")
    if (size := path.stat().st_size) > MAX_BYTES + _SLACK:
        raise InputError(f"holds {size / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.1f} GB are read", where=path,
                         fix="give one volume of a head")  # fmt: skip


def _first_bytes(head: bytes) -> bytes:
    """As many unpacked bytes as the longest header has, or fewer where the stream is damaged or short."""
    if not head.startswith(_GZIP):
        return head[:LONGEST]
    start = b""
    try:
        while head.startswith(_GZIP) and len(start) < LONGEST:
            stream = zlib.decompressobj(31)
            start += stream.decompress(head, LONGEST - len(start))
            head = stream.unused_data
    except zlib.error:
        pass
    return start


def _claimed_bytes(start: bytes, path: Path) -> int | None:
    """How many bytes of voxels the header claims, refused beyond what a head can have; None without a whole header."""
    if len(start) < LONGEST:
        return None
    header = parse_header(start, path)
    voxels = math.prod(header_shape(header, path))
    claimed = voxels * header_dtype(header, path).itemsize
    if voxels > MAX_VOXELS:
        raise InputError(
            f"claims {claimed / 1e9:.1f} GB: {voxels} voxels; at most {MAX_VOXELS} are read", where=path, fix=AGAIN
        )
    return claimed


def _gunzip(packed: bytes, claimed: int | None, path: Path) -> tuple[bytearray, int]:
    """Unpack to the stream's end, so that its checksum is read, and never beyond what the header claims."""
    content, stream, members, trailing = bytearray(), zlib.decompressobj(31), 1, 0
    try:
        for start in range(0, len(packed), _CHUNK):  # in small pieces: what waits is copied at every step
            waiting = packed[start : start + _CHUNK]
            end = start + len(waiting)
            while waiting:
                if stream.eof and trailing == 0 and packed.startswith(_GZIP, end - len(waiting)):
                    stream, members = zlib.decompressobj(31), members + 1  # written in blocks, as bgzip does
                elif stream.eof:
                    trailing += len(waiting)
                    break
                content += stream.decompress(waiting, _CHUNK)
                waiting = stream.unused_data if stream.eof else stream.unconsumed_tail
                if len(content) > (claimed or 0) + _SLACK:
                    raise InputError(f"unpacks to far more than the {claimed} bytes it claims", where=path, fix=AGAIN)
            if members > MAX_MEMBERS:
                raise InputError(f"more than {MAX_MEMBERS} gzip members", where=path, fix="pack it again")
    except zlib.error as error:
        cause = "checksum mismatch" if "check" in str(error) else "damaged gzip stream"
        raise InputError(f"{cause} ({error})", where=path, fix=AGAIN) from error
    if not stream.eof:
        of = "" if claimed is None else f" of {claimed} and a header"
        of += "; its checksum is missing" if claimed is not None and len(content) > claimed else ""
        raise InputError(f"gzip ends early (got {len(content)} bytes{of})", where=path, fix=AGAIN)
    return content, trailing


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a packed or plain file whole or not at all, and read it back before it takes its name."""
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
