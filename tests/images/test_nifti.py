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

from ldm_lib.errors import InputError
from ldm_lib.images.image_files import require_results_writable, write_bytes
from ldm_lib.images.volume import read_volume

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


@pytest.mark.parametrize("pack", [lambda raw: gzip.compress(raw), lambda raw: raw], ids=["gz", "plain"])
def test_a_sound_file_comes_back_voxel_for_voxel(tmp_path, pack):
    path = tmp_path / ("a.nii" if pack(RAW) == RAW else "a.nii.gz")
    path.write_bytes(pack(RAW))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.raw, VOXELS)
    np.testing.assert_array_equal(volume.affine, LPS)
    assert volume.preamble + volume.raw.tobytes(order="F") == RAW
    assert volume.warnings == ()


REJECTED = {  # what the catalogue of bad inputs does not hold
    "gz of ten bytes": (PACKED[:10], r"gzip ends early \(got 0 bytes\)"),
    "damaged stream": (PACKED[:40] + bytes(40) + PACKED[80:], r"damaged gzip stream"),
    "one slice": (_patched(46, "h", 1), r"shape \(24, 22, 1\) is not 3D"),
    "bits": (_patched(70, "h", 1), r"need one real number each"),
    "affine with NaN": (_patched(292, "f", np.nan), r"affine is not finite and invertible"),
    "affine of huge voxels": (_patched(280, "f", 1e30), r"voxels of 1e\+30 mm; need 0\.001 to 1000 mm"),
    "microns": (_patched(123, "B", 3 + 8), r"its unit of length is the micron, need mm"),
    "vox_offset 0": (_patched(108, "f", 0.0), r"vox_offset 0 is not inside the file \(352 to"),
    "vox_offset beyond the end": (_patched(108, "f", 1e7), r"vox_offset 1e\+07 is not inside"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_damaged_content_and_a_header_that_cannot_be_believed_are_rejected(tmp_path, name):
    content, match = REJECTED[name]
    path = tmp_path / ("a.nii.gz" if content[:2] == PACKED[:2] else "a.nii")
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name}: .*{match}"):
        read_volume(path)


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
    for size in (48, 0, -1):
        path.write_bytes(_with_extension(size))
        with pytest.raises(InputError, match=f"a header extension claims {size} bytes, 32 are there"):
            read_volume(path)


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


def test_what_is_no_file_is_rejected_without_waiting(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    for name in ("a.hdr", "a.nrrd"):
        (tmp_path / name).write_bytes(RAW)
    for name, match in (
        ("folder.nii.gz", "is a directory, not an image file"),
        ("loop.nii.gz", r"broken link to loop\.nii\.gz"),
        ("a.hdr", r"a pair of \.hdr and \.img, as Analyze has"),
        ("a.nrrd", r"not named \.nii\.gz, \.nii, \.mgz or \.mgh"),
        ("missing.nii.gz", "no such file"),
        ("x" * 300 + ".nii.gz", r"cannot be read \(File name too long\)"),
    ):
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / name)


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
        ("a.png", r"an output must end in \.nii\.gz, \.nii, \.mgz or \.mgh"),
        ("folder.nii.gz", r"is a directory\. Fix: name a file"),
        ("missing/a.nii.gz", r"its folder does not exist\. Fix: mkdir -p .*missing"),
        ("x" * 250 + ".nii.gz", r"its name is too long. Fix: shorten it"),
    ):
        with pytest.raises(InputError, match=match):
            require_results_writable([tmp_path / name])
    require_results_writable([tmp_path / "good.nii.gz"])
    assert [p.name for p in tmp_path.iterdir()] == ["folder.nii.gz"], "the probe is gone"

    def forbid(path, exist_ok):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "touch", forbid)
    with pytest.raises(InputError, match=r"good\.nii\.gz: cannot be written \(Permission denied\)"):
        require_results_writable([tmp_path / "good.nii.gz"])
