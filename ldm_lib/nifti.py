"""The bytes of a NIfTI file: what must hold before a voxel is believed, and how bytes reach the disk.

The checks run in an order that spends nothing on a bad file: is it a file, what kind, what does its header claim, does
the stream reach its end with the right checksum. Nothing is allocated on a header's word alone.
"""

import gzip
import math
import os
import re
import zlib
from pathlib import Path

from ldm_lib.errors import InputError
from ldm_lib.files import replacing
from ldm_lib.headers import AGAIN, LONGEST, header_dtype, header_shape, parse_header

SUFFIXES = (".nii.gz", ".nii")
MAX_BYTES = 2 << 30  # a 1 mm float64 head takes 70 MB; what claims thirty times as much is not one
_SLACK = MAX_BYTES // 64  # headers, extensions, stray bytes behind the voxels
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"


def stem(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def require_writable(path: str | Path) -> None:
    """Refuse an output path early: wrong ending, no such folder, or a folder that takes no file."""
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"an output must end in {' or '.join(SUFFIXES)}", where=path, fix="name it so")
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


def read_bytes(path: Path) -> tuple[bytes | bytearray, int]:
    """The unpacked content, and how many packed bytes follow the last gzip member."""
    try:
        _require_file(path)
        with path.open("rb") as stream:
            head = stream.read(_CHUNK)
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


def _require_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise InputError(f"broken link to {path.readlink()}", where=path, fix="restore its target")
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
    try:
        return zlib.decompressobj(31).decompress(head, LONGEST)
    except zlib.error:
        return b""


def _claimed_bytes(start: bytes, path: Path) -> int | None:
    """How many bytes of voxels the header claims, refused beyond what a head can have; None without a whole header."""
    if len(start) < LONGEST:
        return None
    header = parse_header(start, path)
    claimed = math.prod(header_shape(header, path)) * header_dtype(header, path).itemsize
    if claimed > MAX_BYTES:
        raise InputError(
            f"claims {claimed / 1e9:.1f} GB of voxels; at most {MAX_BYTES / 1e9:.1f} GB are read", where=path, fix=AGAIN
        )
    return claimed


def _gunzip(packed: bytes, claimed: int | None, path: Path) -> tuple[bytearray, int]:
    """Unpack to the stream's end, so that its checksum is read, and never beyond what the header claims."""
    content, waiting, stream = bytearray(), packed, zlib.decompressobj(31)
    try:
        while waiting:
            content += stream.decompress(waiting, _CHUNK)
            waiting = stream.unconsumed_tail
            if stream.eof and stream.unused_data.startswith(_GZIP):  # written in blocks, as bgzip does
                waiting, stream = stream.unused_data, zlib.decompressobj(31)
            if len(content) > (claimed or 0) + _SLACK:
                raise InputError(f"unpacks to far more than the {claimed} bytes it claims", where=path, fix=AGAIN)
    except zlib.error as error:
        cause = "checksum mismatch" if "check" in str(error) else "damaged gzip stream"
        raise InputError(f"{cause} ({error})", where=path, fix=AGAIN) from error
    if not stream.eof:
        of = "" if claimed is None else f" of {claimed} and a header"
        raise InputError(f"gzip ends early (got {len(content)} bytes{of})", where=path, fix=AGAIN)
    return content, len(stream.unused_data)


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
