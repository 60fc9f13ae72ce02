"""Every array of a case moves alike, the masked region stays void, and the same generator gives the same case."""

from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.data.augmentation import Augmentation, change_intensity, flip, rotate
from ldm_lib.data.model_grid import GridCase

SIZE = 24
NAMES = tuple(f.name for f in fields(GridCase))
ALL = Augmentation(flip_probability=0.5, rotation_degrees=10, intensity_shift=0.1, tissue_deformation_mm=4)


@pytest.fixture
def case():
    """A ball of brain in air, with a mask, part of it unknown, and maps; no symmetry anywhere."""
    rng, place = np.random.default_rng(0), np.indices((SIZE,) * 3) - (SIZE - 1) / 2
    brain = (place**2).sum(0) < 10.4**2
    mask = np.zeros(brain.shape, bool)
    mask[4:11, 9:15, 6:12] = True
    target = np.where(brain, rng.uniform(0.1, 1.2, brain.shape), 0).astype(np.float32)
    return GridCase(
        voided=np.where(mask, np.float32(0), target),
        target=target,
        mask=mask,
        unknown=mask & (place[0] > -4),
        growth=np.where(brain, rng.uniform(size=brain.shape), 0).astype(np.float32),
        tissue=np.where(brain, rng.integers(0, 4, brain.shape), 0).astype(np.uint8),
    )


def _same(one, two, names=NAMES):
    for name in names:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(two, name).dtype, name


def _require_void(case):
    assert not case.voided[case.mask].any()
    np.testing.assert_array_equal(case.voided[~case.mask], case.target[~case.mask])


def test_zeros_change_nothing(case):
    for seed in range(5):
        _same(Augmentation()(case, np.random.default_rng(seed), spacing_mm=1.0), case)


def test_a_flip_mirrors_left_and_right_of_every_array_and_is_its_own_inverse(case):
    flipped = flip(case)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(flipped, name), getattr(case, name)[::-1], err_msg=name)
        assert getattr(flipped, name).flags.c_contiguous
    _same(flip(flipped), case)
    _require_void(flipped)


def test_a_flip_happens_as_often_as_asked(case):
    half = Augmentation(flip_probability=0.5)
    flips = [half(case, np.random.default_rng(k), spacing_mm=1).mask[4, 9, 6] != case.mask[4, 9, 6] for k in range(60)]
    assert 15 < sum(flips) < 45
    always = Augmentation(flip_probability=1.0)
    _same(always(case, np.random.default_rng(0), spacing_mm=1), flip(case))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_quarter_turns_are_those_of_numpy(case, axis, plane, turns):
    degrees = np.zeros(3)
    degrees[axis] = 90 * turns
    filled = replace(case, voided=case.target, mask=case.mask & False)  # the corners too, where there is no air
    filled = replace(filled, growth=np.random.default_rng(1).uniform(size=case.mask.shape).astype(np.float32))
    for given in (case, filled):
        turned = rotate(given, degrees)
        for name in NAMES:
            expected = np.rot90(getattr(given, name), -turns, plane)
            np.testing.assert_allclose(getattr(turned, name), expected, atol=1e-5, err_msg=f"{name} about {axis}")
            assert getattr(turned, name).dtype == expected.dtype


@pytest.mark.parametrize("degrees", [(0, 0, 17), (15, 0, 0), (-16, 18, 13)])
def test_a_marker_goes_to_one_place_in_every_array(case, degrees):
    place, middle = np.array((15, 8, 16)), (SIZE - 1) / 2
    marker = ((np.indices(case.mask.shape) - place.reshape(3, 1, 1, 1)) ** 2).sum(0) < 4.5**2
    marked = GridCase(**{name: marker.astype(getattr(case, name).dtype) for name in NAMES})
    turned = rotate(marked, np.array(degrees))
    # by a turn, about the centre, of what a voxel's coordinates are measured from
    expected = Rotation.from_euler("xyz", degrees, degrees=True).inv().apply(place - middle) + middle
    assert np.linalg.norm(expected - place) > 1
    for name in set(NAMES) - {"voided"}:
        centre = ndimage.center_of_mass(getattr(turned, name).astype(float))
        np.testing.assert_allclose(centre, expected, atol=0.15, err_msg=name)
    _require_void(turned)


def test_the_masked_region_is_void_after_any_change(case):
    for seed in range(12):
        changed = ALL(case, np.random.default_rng(seed), spacing_mm=2.0)
        _require_void(changed)
        assert changed.mask.any()
        assert changed.unknown[~changed.mask].sum() == 0
        assert changed.voided.min() >= 0
        assert set(np.unique(changed.tissue)) <= {0, 1, 2, 3}
        assert 0 <= changed.growth.min() <= changed.growth.max() <= 1
        for name in NAMES:
            assert getattr(changed, name).dtype == getattr(case, name).dtype
            assert getattr(changed, name).shape == case.mask.shape


def test_what_lay_under_the_mask_is_not_in_the_voided_image(case):
    secret = replace(case, target=np.where(case.mask, np.float32(50), case.target))
    turned = rotate(secret, np.array([5.0, -4, 8]))
    assert turned.target[turned.mask].max() > 40
    _require_void(turned)
    beyond_one_voxel = ~ndimage.binary_dilation(turned.mask, np.ones((3, 3, 3)))
    assert turned.voided[beyond_one_voxel].max() < 1.3


def test_gain_and_gamma_change_both_images_alike_and_nothing_else(case):
    changed = change_intensity(case, gain=1.1, gamma=0.9)
    np.testing.assert_allclose(changed.target, 1.1 * case.target**0.9, rtol=1e-6)
    np.testing.assert_array_equal(changed.target == 0, case.target == 0)
    _require_void(changed)
    _same(changed, case, ("mask", "unknown", "growth", "tissue"))
    _same(change_intensity(case, gain=1.0, gamma=1.0), case)


def test_intensity_stays_within_its_shift(case):
    for seed in range(20):
        changed = Augmentation(intensity_shift=0.1)(case, np.random.default_rng(seed), spacing_mm=1)
        at_one = np.interp(1, *np.sort([case.target.ravel(), changed.target.ravel()], axis=1))
        assert 0.9 <= at_one <= 1.1, "gamma leaves 1 where it is, so this is the gain"
        _same(changed, case, ("mask", "unknown", "growth", "tissue"))


def test_tissue_deformation_moves_the_tissue_alone(case):
    changed = Augmentation(tissue_deformation_mm=4)(case, np.random.default_rng(0), spacing_mm=1.0)
    _same(changed, case, ("voided", "target", "mask", "unknown", "growth"))
    assert (changed.tissue != case.tissue).any()
    unlabelled = replace(case, tissue=case.tissue * np.uint8(0))
    _same(Augmentation(tissue_deformation_mm=4)(unlabelled, np.random.default_rng(0), spacing_mm=1.0), unlabelled)


def test_the_generator_decides_everything(case):
    one, two, other = (ALL(case, np.random.default_rng(k), spacing_mm=2.0) for k in (7, 7, 8))
    _same(one, two)
    assert any((getattr(one, name) != getattr(other, name)).any() for name in NAMES)


def test_switching_one_change_off_leaves_the_others_as_they_were(case):
    full = ALL(case, np.random.default_rng(5), spacing_mm=2.0)
    without_tissue = replace(ALL, tissue_deformation_mm=0)(case, np.random.default_rng(5), spacing_mm=2.0)
    _same(full, without_tissue, ("voided", "target", "mask", "unknown", "growth"))


def test_a_case_is_never_changed_in_place(case):
    before = GridCase(**{name: getattr(case, name).copy() for name in NAMES})
    ALL(case, np.random.default_rng(1), spacing_mm=2.0)
    _same(case, before)


def test_a_rotation_back_is_nearly_the_case_itself(case):
    smooth = np.exp(-(((np.indices((SIZE,) * 3) - 12) / 6.0) ** 2).sum(0)).astype(np.float32)
    given = replace(case, target=smooth, voided=np.where(case.mask, np.float32(0), smooth))
    back = rotate(rotate(given, np.array([0, 0, 9.0])), np.array([0, 0, -9.0]))
    np.testing.assert_allclose(back.target, given.target, atol=0.03)
    assert (back.mask != given.mask).mean() < 0.01
