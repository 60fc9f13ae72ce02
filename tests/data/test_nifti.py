"""Input validation before the first voxel: damaged files are rejected by name, and a write is complete or not made."""

import errno
import gzip
import os
import struct
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.data.nifti import require_volume_writable, write_bytes
from ldm_lib.data.volume import read_volume
from ldm_lib.errors import InputError

SHAPE = (24, 22, 20)
LPS = np.diag([-1.0, -1, 1, 1])
VOXELS = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
IMAGE = nib.Nifti1Image(VOXELS, LPS)
IMAGE.header.set_xyzt_units("mm")
RAW = IMAGE.to_bytes()
PACKED = gzip.compress(RAW, mtime=0)
N_BYTES = VOXELS.nbytes


def _patched(offset, fmt, *values):
    content = bytearray(RAW)
    struct.pack_into("<" + fmt, content, offset, *values)
    return bytes(content)


def _flipped(packed, position, bit):
    content = bytearray(packed)
    content[position] ^= bit
    return bytes(content)


@pytest.mark.parametrize("pack", [lambda raw: gzip.compress(raw), lambda raw: raw], ids=["gz", "plain"])
def test_a_sound_file_comes_back_voxel_for_voxel(tmp_path, pack):
    path = tmp_path / ("a.nii" if pack(RAW) == RAW else "a.nii.gz")
    path.write_bytes(pack(RAW))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.raw, VOXELS)
    np.testing.assert_array_equal(volume.affine, LPS)
    assert volume.preamble + volume.raw.tobytes(order="F") == RAW
    assert volume.warnings == ()


DAMAGED = {
    "empty": (b"", r"empty \(0 bytes\)\. Fix: download it again"),
    "half a download": (PACKED[: len(PACKED) // 2], rf"gzip ends early \(got \d+ bytes of {N_BYTES} and a header\)"),
    "gz without its trailer": (PACKED[:-8], r"gzip ends early"),
    "gz of ten bytes": (PACKED[:10], r"gzip ends early \(got 0 bytes\)"),
    "wrong checksum": (_flipped(PACKED, -6, 0xFF), r"checksum mismatch"),
    "one voxel flipped in a stored gz": (_flipped(gzip.compress(RAW, 0), len(RAW) // 2, 0x40), r"checksum mismatch"),
    "damaged stream": (PACKED[:40] + bytes(40) + PACKED[80:], r"damaged gzip stream"),
    "garbage after the gz": (PACKED + b"GARBAGE", r"bytes that are not gzip follow the gzip stream"),
    "not gzip": (RAW, r"not gzip\. Fix: rename it to \.nii"),
    "login page": (b"\n<!DOCTYPE html><html>log in</html>", r"an HTML page, not NIfTI"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"git-LFS pointer.*git lfs pull"),
    "annex pointer": (b"/annex/objects/SHA256E-s123--0.nii.gz\n", r"git-annex pointer.*git annex get"),
    "text": (gzip.compress(b"hello"), r"no NIfTI header"),
    "header only": (gzip.compress(RAW[:352]), rf"expected {N_BYTES} bytes of voxels, got 0"),
    "last slices missing": (gzip.compress(RAW[:-1000]), rf"expected {N_BYTES} bytes of voxels, got {N_BYTES - 1000}"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_content_is_rejected(tmp_path, name):
    content, match = DAMAGED[name]
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii\.gz: .*" + match):
        read_volume(tmp_path / "a.nii.gz")


HEADERS = {
    "dim[0] = 0": (_patched(40, "h", 0), r"dim\[0\] is 0"),
    "dim[0] = 9": (_patched(40, "h", 9), r"dim\[0\] is \d+: not a number of axes"),
    "negative axis": (_patched(42, "h", -48), r"an axis without voxels: shape \(-48, 22, 20\)"),
    "axis of length 0": (_patched(46, "h", 0), r"an axis without voxels: shape \(24, 22, 0\)"),
    "one slice": (_patched(46, "h", 1), r"shape \(24, 22, 1\) is not 3D"),
    "2D": (_patched(40, "h", 2), r"shape \(24, 22\) is not 3D"),
    "unknown datatype": (_patched(70, "h", 9999), r"unknown datatype code 9999"),
    "bits": (_patched(70, "h", 1), r"need a scalar, one real number each"),
    "no orientation": (_patched(252, "2h", 0, 0), r"no orientation: sform and qform codes are both 0"),
    "orientation codes of no kind": (_patched(252, "2h", 77, 77), r"orientation codes outside 0\.\.5"),
    "singular affine": (_patched(280, "4f", 0, 0, 0, 0), r"affine is not finite and invertible"),
    "affine with NaN": (_patched(292, "f", np.nan), r"affine is not finite and invertible"),
    "sheared affine": (_patched(284, "f", 0.4), r"sheared axes \(cosine 0\.37\).*resample it first"),
    "impossible quaternion": (_patched(252, "2h3f", 1, 0, 1, 1, 1), r"qform quaternion invalid"),
    "metres": (_patched(123, "B", 1), r"its unit of length is the metre, need mm"),
    "microns": (_patched(123, "B", 3 + 8), r"its unit of length is the micron, need mm"),
    "pixdim NaN": (_patched(80, "f", np.nan), r"pixdim \(nan, 1, 1\) is not finite"),
    "vox_offset negative": (_patched(108, "f", -10.0), r"vox_offset -10 is not inside the file \(352 to"),
    "vox_offset NaN": (_patched(108, "f", np.nan), r"vox_offset nan is not inside"),
    "vox_offset 0": (_patched(108, "f", 0.0), r"vox_offset 0 is not inside"),
    "vox_offset beyond the end": (_patched(108, "f", 1e7), r"vox_offset 1e\+07 is not inside"),
    "vox_offset too large": (_patched(108, "f", 500.0), rf"expected {N_BYTES} bytes of voxels, got {N_BYTES - 148}"),
    "scl_inter infinite": (_patched(112, "2f", 1, np.inf), r"scl_slope 1, scl_inter inf: not a usable range"),
    "scl_slope tiny": (_patched(112, "2f", 1e-38, 0), r"scl_slope 1e-38, scl_inter 0: not a usable range"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_believed_is_rejected(tmp_path, name):
    content, match = HEADERS[name]
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_volume(tmp_path / "a.nii")


ODDITIES = {
    "bytes behind the voxels": (RAW + bytes(5000), "5000 bytes after the last voxel are ignored"),
    "sizeof_hdr": (_patched(0, "i", 999), "sizeof_hdr is 999, must be 348"),
    "bitpix": (_patched(72, "h", 64), "bitpix 64 contradicts the datatype int16"),
    "pixdim 0": (_patched(80, "f", 0), "pixdim (0, 1, 1) contradicts the affine's (1, 1, 1) mm, which are used"),
    "pixdim negative": (_patched(80, "f", -1), "pixdim (-1, 1, 1) contradicts the affine's"),
    "scl_slope NaN": (_patched(112, "2f", np.nan, 0), "scl_slope nan read as 1"),
    "scl_slope infinite": (_patched(112, "2f", np.inf, 5), "scl_slope inf read as 1"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_an_odd_header_is_read_right_with_a_warning(tmp_path, name):
    content, text = ODDITIES[name]
    (tmp_path / "a.nii").write_bytes(content)
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_array_equal(volume.affine, LPS)
    assert len(volume.warnings) == 1
    assert text in volume.warnings[0]


@pytest.mark.parametrize("size", [5000, 352, 100])
def test_gzip_in_several_members_is_one_file(tmp_path, size):
    """Whatever of the header the first of them holds; also where one ends at the end of a piece that is read."""
    members = [gzip.compress(RAW[start : start + size]) for start in range(0, len(RAW), size)]
    (tmp_path / "a.nii.gz").write_bytes(b"".join(members))
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.raw, VOXELS)
    assert volume.warnings == ()
    (tmp_path / "a.nii.gz").write_bytes(b"".join(members)[:-9])
    with pytest.raises(InputError, match="gzip ends early"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            _patched(40, "8h", 3, 32767, 32767, 32767, 1, 1, 1, 1),
            r"claims 70362\.3 GB: 35181150961663 voxels; at most 134217728",
        ),
        (_patched(40, "8h", 3, 1290, 1290, 1290, 1, 1, 1, 1), r"claims 4\.3 GB: 2146689000 voxels"),
        (RAW + bytes(80 << 20), rf"holds far more than the {N_BYTES} bytes it claims"),
    ],
    ids=["70 TB", "4 GB", "bomb"],
)
def test_nothing_is_allocated_on_a_headers_word(tmp_path, content, match):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / "a.nii.gz")
        assert time.perf_counter() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()


def test_a_plain_file_larger_than_any_head_is_not_read(tmp_path):
    with (tmp_path / "a.nii").open("wb") as stream:
        stream.write(RAW)
        stream.truncate(3 << 30)  # sparse
    with pytest.raises(InputError, match=rf"holds far more than the {N_BYTES} bytes it claims"):
        read_volume(tmp_path / "a.nii")


def _image(array, affine=LPS):
    return nib.Nifti1Image(array, affine).to_bytes()


@pytest.mark.parametrize(
    ("qfac", "quaternion", "offset", "expected"),
    [
        (-1.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "mirrored; the sform is used"),
        (1.0, (0.0, 0.0, 1.0), (10.0, 0.0, 0.0), "sform and qform lie 10 mm apart; the sform is used"),
        (1.0, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "qform quaternion invalid; the sform is used"),
    ],
)
def test_a_qform_that_contradicts_the_sform_is_reported(tmp_path, qfac, quaternion, offset, expected):
    """The qform is mirrored, ten millimetres away, or impossible; the sform is what is used."""
    content = bytearray(_image(VOXELS))
    struct.pack_into("<f", content, 76, qfac)
    struct.pack_into("<h", content, 252, 2)  # qform_code
    struct.pack_into("<6f", content, 256, *quaternion, *offset)
    (tmp_path / "a.nii").write_bytes(content)
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.affine, LPS)
    assert any(expected in warning for warning in volume.warnings), volume.warnings


COLOUR = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_image(np.stack([VOXELS] * 3, -1)), r"3 volumes, need 1\. Fix: split the series"),
        (_image(COLOUR), r"voxels of type RGB, need a scalar"),
        (_image(VOXELS.astype(np.complex64)), r"voxels of type complex64, need a scalar"),
    ],
    ids=["4D", "RGB", "complex"],
)
def test_what_is_not_one_scalar_volume_is_rejected(tmp_path, content, match):
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_volume(tmp_path / "a.nii")


def _with_extension(size, offset=384):
    """The file with one header extension of 32 bytes, whose size field says `size`."""
    content = bytearray(_patched(108, "f", offset))
    content[348:352] = b"\1\0\0\0"
    content[352:352] = struct.pack("<2i", size, 6) + b"a comment".ljust(24, b"\0")
    return bytes(content)


def test_a_header_extension_is_kept_and_its_size_not_believed(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(_with_extension(32))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.raw, VOXELS)
    assert volume.preamble == _with_extension(32)[:384]
    for size in (2**31 - 16, 48, 0, -1):
        path.write_bytes(_with_extension(size))
        with pytest.raises(InputError, match=f"a header extension claims {size} bytes, 32 are there"):
            read_volume(path)


def test_what_is_no_file_is_rejected_without_waiting(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "broken.nii.gz").symlink_to("nowhere")
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    for name in ("a.hdr", "a.mgz"):
        (tmp_path / name).write_bytes(RAW)
    for name, match in (
        ("folder.nii.gz", "is a directory, not a NIfTI file"),
        ("broken.nii.gz", "broken link to nowhere"),
        ("loop.nii.gz", r"broken link to loop\.nii\.gz"),
        ("pipe.nii.gz", "not a regular file"),
        ("a.hdr", r"a pair of \.hdr and \.img, as Analyze has"),
        ("a.mgz", r"not named \.nii\.gz or \.nii"),
        ("missing.nii.gz", "no such file"),
        ("x" * 300 + ".nii.gz", r"cannot be read \(File name too long\)"),
    ):
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / name)


def test_a_file_without_permission_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "a.nii").write_bytes(RAW)

    def forbid(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", forbid)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["A.NII.GZ", "a b [1]* é.nii.gz", "a\nb.nii.gz"])
def test_unusual_names_are_names(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED)
    np.testing.assert_array_equal(read_volume(tmp_path / name).raw, VOXELS)


def test_writing_is_deterministic_and_reads_back(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        assert write_bytes(tmp_path / name, RAW) == tmp_path / name
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4), "no time of writing"
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == (tmp_path / "c.nii").read_bytes() == RAW
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_leaves_the_old_file_whole_and_nothing_else(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "a.nii.gz", RAW)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be written \(No space left on device\)"):
        write_bytes(path, RAW[:-2])
    assert gzip.decompress(path.read_bytes()) == RAW
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: b"other")
    with pytest.raises(InputError, match="what was written does not read back"):
        write_bytes(tmp_path / "a.nii.gz", RAW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("planted", ["a.nii.gz", ".a.nii.gz.{pid}.part"])
def test_a_planted_link_is_replaced_not_followed(tmp_path, planted):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / planted.format(pid=os.getpid())).symlink_to(precious)
    path = write_bytes(tmp_path / "a.nii.gz", RAW)
    assert precious.read_bytes() == b"precious"
    assert not path.is_symlink()
    assert gzip.decompress(path.read_bytes()) == RAW


def test_an_output_that_cannot_be_written_is_rejected_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder.nii.gz").mkdir()
    for name, match in (
        ("a.png", r"an output must end in \.nii\.gz or \.nii"),
        ("folder.nii.gz", r"is a directory\. Fix: name a file"),
        ("missing/a.nii.gz", r"its folder does not exist\. Fix: mkdir -p '.*missing'"),
        ("x" * 250 + ".nii.gz", r"its name is too long. Fix: shorten it"),
    ):
        with pytest.raises(InputError, match=match):
            require_volume_writable(tmp_path / name)
    require_volume_writable(tmp_path / "good.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.nii.gz"], "the probe is gone"

    def forbid(path, exist_ok):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "touch", forbid)
    with pytest.raises(InputError, match=r"good\.nii\.gz: cannot be written \(Permission denied\)"):
        require_volume_writable(tmp_path / "good.nii.gz")
