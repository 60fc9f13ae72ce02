"""Whatever the bytes: reading returns a volume of finite voxels in the shape that was claimed, or an input error.

It never raises anything else, is done within seconds, and allocates what the file holds, not what it claims. The
examples are the same at every run; the `slow` ones are many more of them.
"""

import gzip
import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_lib.errors import InputError
from ldm_lib.images.volume import Volume, read_volume

LIMIT_S, LIMIT_BYTES = 10, 16 << 20  # of files of some kilobytes
PROFILE = {"derandomize": True, "deadline": None, "database": None}
SHAPE = (6, 5, 4)
VOXELS = np.random.default_rng(0).integers(0, 900, SHAPE).astype("<i2")
AFFINE = np.diag([-1.0, -1, 1, 1])
KINDS = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
NASTY = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e-45, 3e38, -3e38, 352.0, 353.5, 1e7, math.inf, -math.inf, math.nan]


def _written(kind: type) -> bytes:
    image = kind(VOXELS, AFFINE)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


PLAIN = {size: _written(kind) for size, kind in KINDS.items()}


def often_and_more(quick: int, thorough: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("examples", [quick, pytest.param(thorough, marks=pytest.mark.slow)])


def hold(law: Callable[..., None], examples: int, *strategies: st.SearchStrategy) -> None:
    """Try a law on so many examples."""
    settings(max_examples=examples, **PROFILE)(given(*strategies)(law))()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("any")


def passed(path: Path, content: bytes) -> Volume | None:
    """The volume that is read from a file, None where it is rejected."""
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        volume = read_volume(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and error.cause
        return None
    finally:
        spent, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert spent < LIMIT_S and peak < LIMIT_BYTES + 8 * len(content)
    assert volume.voxels.shape == volume.shape == volume.raw.shape and min(volume.shape) >= 2
    assert volume.voxels.dtype == np.float32 and np.isfinite(volume.voxels).all()
    assert np.isfinite(volume.affine).all() and abs(np.linalg.det(volume.affine)) > 0
    assert min(volume.spacing_mm) > 0 and len(volume.orientation) == 3
    return volume


def claimed_shapes(content: bytes) -> set[tuple[int, ...]]:
    """The first three axes of a header, in either byte order, of NIfTI-1 and of NIfTI-2."""
    axes = [struct.unpack_from(f"{order}{fmt}", content, offset) for order in "<>" for fmt, offset in
            (("3h", 42), ("3q", 24)) if len(content) >= offset + struct.calcsize(fmt)]  # fmt: skip
    return set(axes)


# ---- any header


def _value(dtype: np.dtype) -> st.SearchStrategy:
    """Any value of a header's field, more often one that is at an edge."""
    if dtype.kind == "f":
        return st.sampled_from(NASTY) | st.floats(width=32)
    if dtype.kind == "S":
        return st.binary(max_size=dtype.itemsize)
    limits = np.iinfo(dtype)
    edges = [n for n in (-32768, -48, -1, 0, 1, 2, 9, 77, 348, 1290, 32767, 2**31 - 16, limits.min, limits.max)
             if limits.min <= n <= limits.max]  # fmt: skip
    return st.sampled_from(edges) | st.integers(int(limits.min), int(limits.max))


def _field(name: str, dtype: np.dtype) -> st.SearchStrategy:
    """(name, index within it or None, value) of one field."""
    index = st.integers(0, dtype.shape[0] - 1) if dtype.shape else st.none()
    return st.tuples(st.just(name), index, _value(dtype.base))


def _headers(size: int) -> st.SearchStrategy:
    """(size, changed fields) of the header of a kind."""
    fields = KINDS[size].header_class.template_dtype.fields
    one = st.one_of(*(_field(name, dtype) for name, (dtype, _) in fields.items()))
    return st.tuples(st.just(size), st.lists(one, min_size=1, max_size=4))


def _with_fields(size: int, changes: list[tuple[str, int | None, object]], order: str) -> bytes:
    dtype = KINDS[size].header_class.template_dtype.newbyteorder("<")
    fields = np.frombuffer(PLAIN[size], dtype, 1).astype(dtype.newbyteorder(order))
    for name, index, value in changes:
        fields[name][0 if index is None else (0, index)] = value
    return fields.tobytes() + bytes(4) + VOXELS.astype(f"{order}i2").tobytes(order="F")


@often_and_more(100, 5_000)
def test_any_header(folder, examples):
    def law(header, order, pack):
        size, changes = header
        content = _with_fields(size, changes, order)
        path = folder / ("a.nii.gz" if pack else "a.nii")
        volume = passed(path, gzip.compress(content, 1) if pack else content)
        assert volume is None or volume.shape in claimed_shapes(content)

    hold(law, examples, st.one_of(_headers(size) for size in KINDS), st.sampled_from("<>"), st.booleans())


# ---- any shape, any amount of data

AXIS = st.integers(0, 9) | st.sampled_from([-1, 100, 1290, 32767])
AXES = st.tuples(*[st.integers(2, 9)] * 3) | st.lists(AXIS, min_size=1, max_size=7)
DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
          32: "c8", 128: "V3", 1536: "f16"}  # fmt: skip


@often_and_more(100, 5_000)
def test_any_shape_with_any_amount_of_data(folder, examples):
    def law(axes, code, surplus, pack):
        item, claimed = np.dtype(DTYPES[code]).itemsize, math.prod(max(n, 0) for n in axes)
        held = min(claimed, 5_000) * item + surplus
        data = np.random.default_rng(1).integers(0, 50, max(held, 0)).astype("u1").tobytes()
        content = bytearray(PLAIN[348][:352] + data)
        struct.pack_into("<8h", content, 40, len(axes), *(list(axes) + [1] * 7)[:7])
        struct.pack_into("<2h", content, 70, code, 8 * item)
        path = folder / ("a.nii.gz" if pack else "a.nii")
        volume = passed(path, gzip.compress(bytes(content), 1) if pack else bytes(content))
        if volume is None:
            return
        assert volume.shape == tuple(axes[:3]) and all(n == 1 for n in axes[3:])
        assert len(data) >= math.prod(axes) * item and code not in (32, 128, 1536)
        expected = np.frombuffer(data, DTYPES[code], math.prod(axes)).reshape(axes[:3], order="F")
        np.testing.assert_array_equal(volume.voxels, expected.astype(np.float32))
        assert (len(data) > math.prod(axes) * item) == any("bytes after" in warning for warning in volume.warnings)

    hold(law, examples, AXES, st.sampled_from(sorted(DTYPES)),
         st.sampled_from([0, 0, 1, -1, 16, -400, 5000]), st.booleans())  # fmt: skip


# ---- any damage

FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4)
CUT = st.just(1.0) | st.floats(0, 1)
TAIL = st.just(b"") | st.binary(max_size=40)


def _damaged(content: bytes, flips: list[tuple[float, int]], cut: float, tail: bytes) -> bytes:
    spoiled = bytearray(content)
    for place, bits in flips:
        spoiled[int(place * len(content))] ^= bits
    return bytes(spoiled[: int(cut * len(content))]) + tail


@often_and_more(80, 3_000)
def test_a_damaged_packed_file_is_rejected_or_whole(folder, examples):
    """What gzip's checksum passes is what was packed, whatever happened to the bytes around it."""
    stored = {level: gzip.compress(PLAIN[348], level, mtime=0) for level in (0, 1, 9)}

    def law(level, flips, cut, tail):
        volume = passed(folder / "a.nii.gz", _damaged(stored[level], flips, cut, tail))
        assert volume is None or np.array_equal(volume.raw, VOXELS)

    hold(law, examples, st.sampled_from(sorted(stored)), FLIPS, CUT, TAIL)


@often_and_more(80, 3_000)
def test_a_damaged_plain_file_is_rejected_or_of_its_claimed_shape(folder, examples):
    def law(size, flips, cut, tail):
        content = _damaged(PLAIN[size], flips, cut, tail)
        volume = passed(folder / "a.nii", content)
        assert volume is None or volume.shape in claimed_shapes(content)

    hold(law, examples, st.sampled_from(sorted(KINDS)), FLIPS, CUT, TAIL)


@often_and_more(100, 3_000)
def test_any_bytes_at_all(folder, examples):
    def law(content, name):
        assert passed(folder / name, content) is None

    hold(law, examples, st.binary(max_size=2000) | st.binary(max_size=400).map(lambda b: b"\x1f\x8b\x08\0" + b),
         st.sampled_from(["a.nii.gz", "a.nii"]))  # fmt: skip


# ---- more laws


@often_and_more(50, 5_000)
def test_any_header_from_its_first_byte_to_its_last(folder, examples):
    """Nothing but the bytes by which a reader knows the kind of file is as it should be."""

    def law(size, noise):
        content = bytearray(noise.ljust(size, b"\0")[:size] + PLAIN[size][size:])
        magic = slice(344, 348) if size == 348 else slice(4, 12)
        content[:4], content[magic] = PLAIN[size][:4], PLAIN[size][magic]
        volume = passed(folder / "a.nii", bytes(content))
        assert volume is None or volume.shape in claimed_shapes(bytes(content))

    hold(law, examples, st.sampled_from(sorted(KINDS)), st.binary(max_size=540))
