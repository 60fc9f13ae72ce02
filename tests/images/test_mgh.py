"""MGH files: nibabel's values are read, bytes outside the mask are kept, and damaged files are rejected in one line."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.errors import InputError
from ldm_lib.images.options import ReadOptions
from ldm_lib.images.volume import read_image, read_volume, write_like, write_map

SHAPE = (12, 10, 9)
LIA = np.array([[-1.0, 0, 0, 6], [0, 0, 1.2, -5], [0, -1, 0, 4], [0, 0, 0, 1]])  # as FreeSurfer conforms volumes
OBLIQUE = np.array([[-0.8, 0.6, 0, 3], [0.6, 0.8, 0, 1], [0, 0, 2, -7], [0, 0, 0, 1]])
RANDOM = np.random.default_rng(0).integers(1, 250, SHAPE)
VOXELS = np.where(np.indices(SHAPE).min(0) > 1, RANDOM, 0)
MASK = np.zeros(SHAPE, bool)
MASK[3:6, 3:6, 3:6] = True
TAGS = struct.pack(">i", 3) + struct.pack(">q", 12) + b"mri_convert\0"
TYPES = ("u1", "i2", "u2", "i4", "f4")


def _content(dtype="u1", affine=LIA, voxels=VOXELS, tags=b""):
    return nib.MGHImage(voxels.astype(dtype), affine).to_bytes() + tags


def _write(path, content):
    path.write_bytes(gzip.compress(content) if path.name.endswith(("z", "gz")) else content)
    return path


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("affine", [LIA, OBLIQUE], ids=["LIA", "oblique"])
@pytest.mark.parametrize("name", ["a.mgz", "A.MGH"])
def test_voxels_and_affine_are_those_that_nibabel_reads(tmp_path, dtype, affine, name):
    path = _write(tmp_path / name.lower(), _content(dtype, affine))
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    volume = read_volume(path.rename(tmp_path / name))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.affine, image.affine)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["b.mgz", "b.mgh"])
def test_a_result_differs_from_its_source_under_the_mask_alone(tmp_path, dtype, name):
    content = _content(dtype, tags=TAGS)
    source = read_volume(_write(tmp_path / "a.mgz", content))
    assert "tags of 24 bytes" in source.warnings[0]
    written = write_like(tmp_path / name, source, np.full(SHAPE, 77.0), MASK).read_bytes()
    result = gzip.decompress(written) if name.endswith("z") else written
    at, size = 284, np.dtype(dtype).itemsize
    outside = np.repeat(~MASK.ravel(order="F"), size)
    before, after = (np.frombuffer(each, "u1")[at : at + outside.size] for each in (content, result))
    assert result[:at] == content[:at] and result[at + outside.size :] == content[at + outside.size :]
    np.testing.assert_array_equal(before[outside], after[outside])
    assert (np.asarray(nib.load(tmp_path / name).dataobj)[MASK] == 77).all()


def test_scrubbing_drops_the_tags_and_keeps_the_scan_parameters(tmp_path):
    content = _content(tags=TAGS)
    source = read_volume(_write(tmp_path / "a.mgz", content), ReadOptions(scrub_header=True))
    result = write_like(tmp_path / "b.mgh", source, source.voxels, MASK)
    assert result.read_bytes() == content[: -len(TAGS)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("affine", [LIA, OBLIQUE], ids=["LIA", "oblique"])
def test_to_nifti_and_back_keeps_voxels_types_and_affine(tmp_path, dtype, affine):
    source = read_volume(_write(tmp_path / "a.mgz", _content(dtype, affine)))
    nifti = read_volume(write_like(tmp_path / "b.nii.gz", source, source.voxels, MASK))
    back = read_volume(write_like(tmp_path / "c.mgz", nifti, nifti.voxels, MASK))
    assert nifti.raw.dtype == np.dtype(dtype) and nifti.warnings == ()
    for volume in (nifti, back):
        np.testing.assert_array_equal(volume.raw, source.raw)
        np.testing.assert_allclose(volume.affine, source.affine, atol=1e-5)


@pytest.mark.parametrize(("stored", "expected"), [("i1", "i2"), ("u2", "i4"), ("i8", "f4"), ("f8", "f4"), ("i4", "i4")])
def test_types_that_mgh_lacks_become_larger_ones(tmp_path, stored, expected):
    voxels = (VOXELS // 2).astype(stored)
    nib.save(nib.Nifti1Image(voxels, LIA, dtype=stored), tmp_path / "a.nii.gz")
    path = write_like(tmp_path / "b.mgz", read_volume(tmp_path / "a.nii.gz"), voxels, MASK)
    assert read_volume(path).raw.dtype == np.dtype(expected).newbyteorder(">")
    np.testing.assert_array_equal(read_volume(path).voxels, voxels)


def test_scaled_and_z_scored_intensities_become_values_in_the_files_units(tmp_path):
    voxels = np.where(VOXELS > 0, VOXELS / 50, -2.5).astype(np.float32)
    image = nib.Nifti1Image((VOXELS - 100).astype(np.int16), LIA)
    image.header.set_slope_inter(0.02, -0.5)
    nib.save(image, tmp_path / "scaled.nii")
    nib.save(nib.Nifti1Image(voxels, LIA), tmp_path / "z.nii")
    for name, background in (("scaled.nii", None), ("z.nii", -2.5)):
        source = read_image(tmp_path / name)
        path = write_like(tmp_path / "b.mgz", source, source.voxels, MASK)
        stored = np.asarray(nib.load(tmp_path / name).dataobj, np.float32)
        np.testing.assert_allclose(np.asarray(nib.load(path).dataobj), stored, rtol=2e-6)
        assert background is None or source.background == background


def test_a_new_map_is_what_nibabel_reads(tmp_path):
    path = write_map(tmp_path / "a.mgz", MASK.astype(np.int64), LIA)
    np.testing.assert_array_equal(nib.load(path).dataobj, MASK)
    np.testing.assert_allclose(nib.load(path).affine, LIA, atol=1e-6)


def _patched(offset, fmt, *values):
    content = bytearray(_content())
    struct.pack_into(">" + fmt, content, offset, *values)
    return bytes(content)


REJECTED = {
    "cut short": (gzip.compress(_content())[:-200], r"gzip ends early \(got \d+ bytes of 1080 and a header\)"),
    "voxels missing": (gzip.compress(_content()[:1000]), r"expected 1080 bytes of voxels, got 716"),
    "header alone": (gzip.compress(_content()[:284]), r"expected 1080 bytes of voxels, got 0"),
    "half a header": (gzip.compress(_content()[:100]), "no MGH header"),
    "empty": (b"", r"empty \(0 bytes\)"),
    "not packed": (_content(), r"not gzip. Fix: rename it to \.mgh"),
    "NIfTI": (gzip.compress(nib.Nifti1Image(VOXELS.astype("u1"), LIA).to_bytes()), "no MGH header"),
    "type": (gzip.compress(_patched(20, "i", 6)), "unknown type code 6"),
    "series": (gzip.compress(_patched(16, "i", 3)), "3 volumes, need 1"),
    "negative size": (gzip.compress(_patched(4, "i", -3)), "an axis without voxels"),
    "claims too much": (gzip.compress(_patched(4, "3i", 4000, 4000, 4000)), r"claims 64\.0 GB"),
    "no orientation": (gzip.compress(_patched(28, "h", 0)), "no orientation: goodRASFlag is 0.*--assume-orientation"),
    "sheared": (gzip.compress(_patched(42, "3f", 0.7, 0.7, 0)), "sheared axes"),
    "NaN": (gzip.compress(_patched(30, "f", np.nan)), "affine is not finite"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_damaged_files_are_rejected_by_name_in_one_line(tmp_path, name):
    content, match = REJECTED[name]
    (tmp_path / "a.mgz").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.mgz: .*{match}") as error:
        read_volume(tmp_path / "a.mgz")
    assert "\n" not in str(error.value)


def test_an_orientation_can_be_assumed(tmp_path):
    (tmp_path / "a.mgh").write_bytes(_patched(28, "h", 0))
    volume = read_volume(tmp_path / "a.mgh", ReadOptions(assume_orientation="LPS"))
    assert volume.orientation == "LPS" and volume.warnings == ("states no orientation: LPS assumed",)
