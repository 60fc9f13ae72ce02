"""Masks that lie elsewhere than the void they were made for, and masks whose 0 and 1 are exchanged."""

import numpy as np
import pytest

from ldm_lib.errors import InputError
from ldm_lib.images.masks import require_in_brain
from ldm_lib.images.void import require_void_covered
from ldm_lib.images.volume import intensity_scale, read_volume, write_map

SPACING = 2.0
POSITION = (np.indices((90, 100, 80)).T - (45, 50, 40)).T * SPACING
BRAIN = sum((p / r) ** 2 for p, r in zip(POSITION, (70, 85, 62), strict=True)) < 1
DEEP, SURFACE = (25, 20, 10), (55, 20, 10)  # mm from the centre


def _ball(place, radius=16):
    return sum((p - c) ** 2 for p, c in zip(POSITION, place, strict=True)) < radius**2


def _scan(folder, *voids):
    voxels = np.where(BRAIN & ~np.any([np.zeros_like(BRAIN), *voids], axis=0), 100, 0).astype(np.int16)
    return read_volume(write_map(folder / "t1n-voided.nii.gz", voxels, np.diag([-SPACING, -SPACING, SPACING, 1])))


def _warnings(source, mask):
    warnings = []
    require_void_covered(source, mask, where="mask", warnings=warnings)
    return warnings


@pytest.mark.parametrize("place", [DEEP, SURFACE])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mask_whose_data_are_flipped_is_rejected_with_the_place(tmp_path, place, axis):
    mask = _ball(place)
    source = _scan(tmp_path, mask)
    assert _warnings(source, mask) == []
    with pytest.raises(InputError, match=r"about \d+ void voxels inside the brain, around \(\d+, \d+, \d+\)"):
        _warnings(source, np.flip(mask, axis))


def test_a_second_void_region_that_is_smaller_is_a_warning_with_count_and_place(tmp_path):
    mask, other = _ball(DEEP), _ball((-25, -20, 0), 12)
    (warning,) = _warnings(_scan(tmp_path, mask, other), mask)
    words = warning.replace("(", "").replace(")", "").replace(",", "").split()
    assert 0.5 * other.sum() < int(words[1]) <= other.sum()
    place = np.array([int(word) for word in words[8:11]])
    np.testing.assert_allclose(place, np.argwhere(other).mean(0), atol=2)


def test_void_that_a_fitting_mask_leaves_is_no_error_even_if_it_is_more(tmp_path):
    mask, ventricles = _ball(DEEP, 8), _ball((-20, 0, 0))  # some skull-strips leave the ventricles void
    assert len(_warnings(_scan(tmp_path, mask, ventricles), mask)) == 1


@pytest.mark.parametrize("mask", [_ball(DEEP), _ball(SURFACE, 25)])
def test_a_scan_that_is_not_voided_is_not_complained_about(tmp_path, mask):
    assert _warnings(_scan(tmp_path), mask) == []


@pytest.mark.parametrize("keep", [BRAIN & ~_ball(DEEP), ~_ball(DEEP)])
def test_an_inverted_mask_is_named(keep):
    voided = np.where(BRAIN & ~keep, 100.0, 0)
    with pytest.raises(InputError, match=r"covers \d+% of the head: it looks inverted. Fix: exchange its 0 and 1"):
        require_in_brain(keep, voided, None, where="mask", warnings=[])


def test_an_inverted_mask_of_a_voided_scan_leaves_nothing_and_is_named_too():
    lesion = _ball(DEEP)
    with pytest.raises(InputError, match=r"no voxel above 0 outside the mask.*Fix: it looks inverted"):
        intensity_scale(np.where(BRAIN & ~lesion, 100.0, 0), ~lesion)
