"""Reading and writing voxels: accepted ones have the right values, and a write changes only the masked region."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from ldm_lib.errors import InputError
from ldm_lib.images.grid import on_grid_of
from ldm_lib.images.masks import read_labels, read_mask, read_unit_map
from ldm_lib.images.options import ReadOptions
from ldm_lib.images.volume import (
    intensity_scale,
    normalise,
    read_image,
    read_volume,
    write_like,
    write_map,
)

SHAPE = (24, 22, 19)
LPS = np.array([[-1.0, 0, 0, 12], [0, -1, 0, 30], [0, 0, 1, -7], [0, 0, 0, 1]])
BALL = sum((i - c) ** 2 for i, c in zip(np.indices(SHAPE), (12, 11, 9), strict=True)) < 36
VOXELS = np.where(BALL, np.random.default_rng(0).integers(1, 900, SHAPE), 0).astype(np.int16)


def _save(path, array, affine=LPS, kind=nib.Nifti1Image, **options):
    image = kind(array, affine, **options)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.fixture
def like(tmp_path):
    return read_volume(_save(tmp_path / "t1n.nii.gz", VOXELS))


def _big_endian(path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    return _save(path, VOXELS, header=header)


def _scaled(path, slope, intercept):
    content = bytearray(gzip.decompress(_save(path, VOXELS).read_bytes()))
    struct.pack_into("<2f", content, 112, slope, intercept)  # nibabel would divide the voxels by the slope
    path.write_bytes(gzip.compress(content))
    return path


ACCEPTED = {
    "int16": (lambda p: _save(p, VOXELS), VOXELS, np.int16),
    "int64": (lambda p: _save(p, VOXELS.astype("i8"), dtype="int64"), VOXELS, np.int64),
    "uint16 to 38580": (lambda p: _save(p, (VOXELS.astype("u2") % 644 * 60)), VOXELS % 644 * 60.0, np.uint16),
    "float32": (lambda p: _save(p, VOXELS.astype("f4") / 7), VOXELS / np.float32(7), np.float32),
    "float64": (lambda p: _save(p, VOXELS / 7.0), VOXELS / 7.0, np.float64),
    "big-endian": (_big_endian, VOXELS, ">i2"),
    "slope and intercept": (lambda p: _scaled(p, 0.5, 10), VOXELS * 0.5 + 10, np.int16),
    "slope 0 is none": (lambda p: _scaled(p, 0, 10), VOXELS, np.int16),
    "NIfTI-2": (lambda p: _save(p, VOXELS, kind=nib.Nifti2Image), VOXELS, np.int16),
    "trailing axes of length 1": (lambda p: _save(p, VOXELS[..., None, None]), VOXELS, np.int16),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_files_have_the_values_nibabel_reads(tmp_path, name):
    save, expected, dtype = ACCEPTED[name]
    path = save(tmp_path / "a.nii.gz")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, np.asarray(expected, np.float32))
    oracle = nib.load(path)
    np.testing.assert_allclose(volume.voxels, oracle.get_fdata().reshape(SHAPE), rtol=1e-6)
    np.testing.assert_array_equal(volume.affine, oracle.affine)
    assert volume.raw.dtype == np.dtype(dtype)
    assert volume.voxels.dtype == np.float32
    assert volume.orientation == "LPS"
    assert volume.warnings == ()


def test_spacing_and_orientation_follow_the_axes(tmp_path):
    affine = np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    volume = read_volume(_save(tmp_path / "a.nii", VOXELS, affine))
    assert volume.spacing_mm == (1, 2, 3)
    assert volume.orientation == "PSR"


def test_a_qform_alone_is_an_orientation(tmp_path):
    image = nib.Nifti1Image(VOXELS, None)
    image.header.set_qform(LPS, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, LPS, atol=1e-5)


def _with_nan(array, *where):
    array = array.astype(np.float32)
    for index in where:
        array[index] = np.nan
    return array


REJECTED_IMAGES = {  # further ones stand in the catalogue of bad inputs
    "three NaN": (_with_nan(VOXELS, (3, 2, 5), (3, 2, 4), (9, 1, 1)), r"3 voxels .*the first at \(3, 2, 4\)"),
    "infinite": (np.where(BALL, VOXELS, -np.inf), r"voxels are not finite"),
    "beyond float32": (np.where(BALL, 1e300, 0), r"voxels are not finite \(in float32\), the first at"),
}


@pytest.mark.parametrize("name", REJECTED_IMAGES)
def test_a_useless_image_is_rejected(tmp_path, name):
    voxels, match = REJECTED_IMAGES[name]
    with pytest.raises(InputError, match=r"a\.nii\.gz: .*" + match):
        read_image(_save(tmp_path / "a.nii.gz", voxels))


SCALED = (BALL * 65535.0 - 32768).astype(np.int16)  # how nibabel stores a float mask under an int16 header


def test_masks_of_every_honest_coding_are_the_same_mask(tmp_path, like):
    warnings = []
    for dtype in ("u1", "i2", "f4", "f8", ">f4"):
        np.testing.assert_array_equal(read_mask(_save(tmp_path / "m.nii", BALL.astype(dtype)), like), BALL)
    path = _save(tmp_path / "m4d.nii", BALL[..., None].astype("u1"))
    np.testing.assert_array_equal(read_mask(path, like, warnings=warnings), BALL)
    assert warnings == []
    path = _save(tmp_path / "m255.nii", BALL.astype("u1") * 255)
    np.testing.assert_array_equal(read_mask(path, like, warnings=warnings), BALL)
    assert warnings == ["m255.nii: 255 read as 1"]
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    path = _save(tmp_path / "invented.nii", BALL.astype("f4"), header=header)
    np.testing.assert_array_equal(read_volume(path).raw, SCALED)
    np.testing.assert_array_equal(read_mask(path, like), BALL)


def test_an_empty_mask_must_be_allowed(tmp_path, like):
    path = _save(tmp_path / "m.nii", BALL * np.uint8(0))
    with pytest.raises(InputError, match=rf"the mask is empty \(0 of {BALL.size} voxels\)"):
        read_mask(path, like)
    assert not read_mask(path, like, allow_empty=True).any()


def test_the_error_of_missing_mask_labels_names_those_it_holds(tmp_path, like):
    path = _save(tmp_path / "m.nii", BALL * np.uint8(4))
    with pytest.raises(InputError, match=r"is empty .*Fix: name labels that it holds \(4\), not 1, 9"):
        read_mask(path, like, ReadOptions(mask_labels="1,9"))


REJECTED_MASKS = {
    "half": (BALL * np.float32(0.5), r"not binary: 2 values \(0, 0\.5\)"),
    "1 and 255": (np.where(BALL, 255, 1).astype("u1"), r"not binary: 2 values \(1, 255\)"),
    "one label 2": (
        BALL * np.uint8(2),
        r"2 values \(0, 2\), labels \{2\}: looks like a tumour segmentation",
    ),
}


@pytest.mark.parametrize("name", REJECTED_MASKS)
def test_what_is_no_mask_of_this_image_is_rejected(tmp_path, like, name):
    voxels, match = REJECTED_MASKS[name]
    with pytest.raises(InputError, match=r"m\.nii: .*" + match):
        read_mask(_save(tmp_path / "m.nii", voxels), like)


def _moved(shift):
    affine = LPS.copy()
    affine[:3, 3] += shift
    return affine


@pytest.mark.parametrize("change", ["shifted", "2 mm", "turned"])
def test_maps_are_resampled_to_the_grid_as_nibabel_would(tmp_path, like, change):
    rng = np.random.default_rng(3)
    values = rng.uniform(0, 0.9, (24, 20, 22))
    affine = {"shifted": _moved(2.3), "2 mm": LPS @ np.diag([2, 2, 2, 1.0]), "turned": LPS[:, [2, 0, 1, 3]]}[change]
    target = (like.shape, like.affine)
    for given, order, read in (
        (values, 1, read_unit_map),
        (np.rint(3 * values), 0, lambda path, like, **kw: read_labels(path, like, (0, 1, 2, 3), **kw)),
    ):
        warnings = []
        found = read(_save(tmp_path / "m.nii", given.astype("f8"), affine), like, warnings=warnings)
        oracle = resample_from_to(nib.Nifti1Image(given, affine), target, order=order).get_fdata()
        np.testing.assert_allclose(found, oracle, atol=1e-5)
        assert found.any() and "m.nii: resampled from its grid (24, 20, 22)" in warnings[0]


def test_a_map_somewhere_else_is_rejected(tmp_path, like):
    with pytest.raises(InputError, match=r"does not overlap t1n\.nii\.gz: their centres lie 173 mm apart"):
        read_unit_map(_save(tmp_path / "m.nii", BALL.astype("f4"), _moved(100)), like)


def test_rounding_of_an_affine_is_the_same_grid(tmp_path, like):
    for shift, notes in ((4e-4, 0), (9e-4, 1), (0.05, 1)):  # mm along each axis, sqrt(3) times as much together
        warnings = []
        moved = read_volume(_save(tmp_path / "m.nii", VOXELS, _moved(shift)))
        np.testing.assert_array_equal(on_grid_of(moved, like, warnings).raw, VOXELS)
        assert len(warnings) == notes and all(f"{shift * 3**0.5:.2g} mm from the image's" in w for w in warnings)
    with pytest.raises(InputError, match=r"its corners lie 0\.104 mm \(0\.104 voxels\) from .*--resample-mask"):
        read_mask(_save(tmp_path / "m.nii", BALL.astype("u1"), _moved(0.06)), like)


def test_cosines_rounded_to_six_digits_are_the_same_grid(tmp_path):
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn
    like = read_volume(_save(tmp_path / "t1n.nii", VOXELS, affine))
    mask = _save(tmp_path / "m.nii", BALL.astype("u1"), affine.round(4))
    np.testing.assert_array_equal(read_mask(mask, like), BALL)


@pytest.mark.parametrize("order", ["RAS", "PIR", "ASL", "IPR"])
@pytest.mark.parametrize("oblique", [False, True])
def test_a_mask_in_another_voxel_order_is_brought_to_the_images_exactly(tmp_path, order, oblique):
    affine = LPS.copy()
    if oblique:  # 44 degrees about one axis: close to where the names of the axes change
        c, s = np.cos(0.768), np.sin(0.768)
        affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ LPS
    like, mask = read_volume(_save(tmp_path / "t1n.nii", VOXELS, affine)), np.random.default_rng(1).random(SHAPE) < 0.3
    turned = nib.Nifti1Image(mask.astype("u1"), affine)
    here, there = nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(order)
    turned = turned.as_reoriented(nib.orientations.ornt_transform(here, there))
    warnings, path = [], tmp_path / "m.nii"
    nib.save(turned, path)
    np.testing.assert_array_equal(read_mask(path, like, warnings=warnings), mask)
    assert warnings == []


def test_a_mask_on_another_grid_is_resampled_if_requested(tmp_path, like):
    coarse = BALL[::2, ::2, ::2].astype("u1")
    affine = LPS @ np.diag([2, 2, 2, 1.0])
    path, warnings = _save(tmp_path / "m.nii", coarse, affine), []
    with pytest.raises(InputError, match=r"shape \(12, 11, 10\), but .*--resample-mask"):
        read_mask(path, like)
    mask = read_mask(path, like, ReadOptions(resample_mask=True), warnings=warnings)
    oracle = resample_from_to(nib.Nifti1Image(coarse, affine), (SHAPE, LPS), order=0).get_fdata() > 0
    np.testing.assert_array_equal(mask, oracle)
    assert "resampled from its grid" in warnings[0]


def test_nan_in_a_mask_is_zero_if_requested(tmp_path, like):
    path = _save(tmp_path / "m.nii", np.where(BALL, 1, np.nan).astype("f4"))
    with pytest.raises(InputError, match=r"voxels are not finite .*--nan-as-zero"):
        read_mask(path, like)
    np.testing.assert_array_equal(read_mask(path, like, ReadOptions(nan_as_zero=True)), BALL)


def test_labels_are_those_allowed(tmp_path, like):
    labels = np.random.default_rng(1).integers(0, 4, SHAPE)
    for dtype in ("u1", "f4", "f8"):
        path = _save(tmp_path / "l.nii", labels.astype(dtype))
        read = read_labels(path, like, (0, 1, 2, 3))
        np.testing.assert_array_equal(read, labels)
        assert read.dtype == np.uint8
    labels[0, 0, :3], labels[0, 0, 4] = 7, 5
    with pytest.raises(InputError, match=r"labels 5 \(1 voxels\), 7 \(3 voxels\) are not among \(0, 1, 2, 3\)"):
        read_labels(_save(tmp_path / "l.nii", labels.astype("u1")), like, (0, 1, 2, 3))
    with pytest.raises(InputError, match=r"labels 1\.5 \(\d+ voxels\)"):
        read_labels(_save(tmp_path / "l.nii", BALL * 1.5), like, (0, 1, 2, 3))


def test_concentrations_lie_between_0_and_1(tmp_path, like):
    values = np.random.default_rng(1).uniform(size=SHAPE)
    np.testing.assert_array_equal(read_unit_map(_save(tmp_path / "g.nii", values), like), values.astype("f4"))
    values[0, 0, 0] = 1 + 5e-7
    assert read_unit_map(_save(tmp_path / "g.nii", values), like).max() == 1
    for wrong, match in ((1.5, r"values from .* to 1\.5, must lie in \[0, 1\]"), (-0.1, r"values from -0\.1 to ")):
        values[0, 0, 0] = wrong
        with pytest.raises(InputError, match=match):
            read_unit_map(_save(tmp_path / "g.nii", values), like)


def test_oddities_of_every_map_reach_the_caller(tmp_path, like):
    path = _save(tmp_path / "m.nii", BALL.astype("u1"))
    path.write_bytes(path.read_bytes() + b"tail")
    warnings = []
    read_mask(path, like, warnings=warnings)
    read_labels(path, like, (0, 1), warnings=warnings)
    read_unit_map(path, like, warnings=warnings)
    assert warnings == ["m.nii: 4 bytes after the last voxel are ignored"] * 3


def test_the_scale_is_a_percentile_of_what_is_seen():
    voided = np.arange(-100, 1001, dtype=np.float32).reshape(3, 367, 1)
    mask = voided > 900
    expected = np.percentile(np.arange(1, 901), 99.5)
    assert intensity_scale(voided, mask) == pytest.approx(expected)
    assert intensity_scale(np.where(mask, 1e9, voided), mask) == pytest.approx(expected), "peeked under the mask"
    with pytest.raises(InputError, match="case: no voxel above 0 outside the mask"):
        intensity_scale(voided, voided > 0, where="case")


def test_normalising_divides_and_clips_below_only():
    values = normalise(np.float32([-5, 0, 50, 400]), 100.0)
    np.testing.assert_array_equal(values, np.float32([0, 0, 0.5, 4]))
    assert values.dtype == np.float32


MASK = np.zeros(SHAPE, bool)
MASK[8:14, 7:15, 5:12] = True


def _stored(image):
    """Voxels as they stand on disk, before slope and intercept."""
    return np.asanyarray(image.dataobj.get_unscaled())


@pytest.mark.parametrize("name", ACCEPTED)
def test_outside_the_mask_a_written_file_is_its_source_bit_for_bit(tmp_path, name):
    save, _, _ = ACCEPTED[name]
    path = save(tmp_path / "a.nii.gz")
    source = read_volume(path)
    pasted = np.random.default_rng(5).uniform(15, 300, SHAPE).astype(np.float32)
    written = write_like(tmp_path / ("out.nii" if name == "int16" else "out.nii.gz"), source, pasted, MASK)

    before, after = nib.load(path), nib.load(written)
    old, new = (_stored(image).reshape(SHAPE) for image in (before, after))
    assert new.dtype == old.dtype
    assert new[~MASK].tobytes() == old[~MASK].tobytes()
    assert after.header.binaryblock == before.header.binaryblock
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.shape == before.shape
    step = source.slope / 2 if old.dtype.kind in "iu" else 1e-4
    inside = after.get_fdata().reshape(SHAPE)[MASK]
    np.testing.assert_allclose(inside, pasted[MASK], atol=step * (1 + 1e-6))


def test_extensions_come_back_too(tmp_path):
    image = nib.Nifti1Image(VOXELS, LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"from the scanner"))
    nib.save(image, tmp_path / "a.nii.gz")
    written = write_like(tmp_path / "b.nii.gz", read_volume(tmp_path / "a.nii.gz"), VOXELS, MASK)
    assert [e.text for e in nib.load(written).header.extensions] == ["from the scanner"]


def test_nothing_changed_is_the_same_bytes_twice(tmp_path, like):
    paths = [write_like(tmp_path / f"{k}.nii.gz", like, like.voxels, MASK) for k in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert gzip.decompress(paths[0].read_bytes()) == gzip.decompress(like.path.read_bytes())


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2"])
def test_integers_inside_are_rounded_and_saturated(tmp_path, dtype):
    source = read_volume(_save(tmp_path / "a.nii", (VOXELS % 200).astype(dtype)))
    limits, pasted = np.iinfo(dtype), np.zeros(SHAPE)
    given = [1.4, 1.6, 2.5, 3.5, limits.max + 0.4, limits.max + 1, 1e9, limits.min - 1, -1e9]
    expected = [1, 2, 2, 4, limits.max, limits.max, limits.max, limits.min, limits.min]
    pasted[MASK] = np.resize(given, MASK.sum())
    result = read_volume(write_like(tmp_path / "b.nii", source, pasted, MASK)).raw[MASK]
    np.testing.assert_array_equal(result, np.resize(expected, MASK.sum()))


def test_floats_inside_saturate_rather_than_become_infinite(tmp_path):
    source = read_volume(_save(tmp_path / "a.nii", VOXELS.astype("f4")))
    written = read_volume(write_like(tmp_path / "b.nii", source, np.full(SHAPE, -1e300), MASK))
    assert (written.raw[MASK] == np.finfo("f4").min).all()


def test_what_is_not_finite_is_never_written(tmp_path, like):
    pasted = like.voxels.copy()
    pasted[0, 0, 0] = np.nan  # outside the mask: not looked at
    write_like(tmp_path / "b.nii", like, pasted, MASK)
    pasted[10, 10, 9:11] = np.nan, np.inf
    with pytest.raises(InputError, match=r"c\.nii: 2 inpainted voxels are not finite"):
        write_like(tmp_path / "c.nii", like, pasted, MASK)
    assert not (tmp_path / "c.nii").exists()


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_a_new_map_is_read_by_the_library_and_by_nibabel(tmp_path, dtype):
    path = write_map(tmp_path / "a.nii.gz", (VOXELS % 200).astype(dtype), LPS)
    volume, oracle = read_volume(path), nib.load(path)
    np.testing.assert_array_equal(oracle.get_fdata(), VOXELS % 200)
    assert volume.raw.dtype == oracle.get_data_dtype() == np.dtype(dtype)
    assert (volume.slope, volume.intercept, volume.warnings) == (1, 0, ())
    np.testing.assert_array_equal(oracle.header.get_sform(), LPS)
    np.testing.assert_allclose(oracle.header.get_qform(), LPS, atol=1e-5)
    assert oracle.header.get_xyzt_units()[0] == "mm"
