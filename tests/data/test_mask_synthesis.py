"""The challenge's rules for healthy and unhealthy masks."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from ldm_lib.data.mask_synthesis import UNHEALTHY_MARGIN_MM, dilate_mm, healthy_mask, void
from ldm_lib.errors import InputError


def _ball(shape, centre, radius):
    return sum((i - c) ** 2 for i, c in zip(np.indices(shape), centre, strict=True)) <= radius**2


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, (1.0, 0.5, 3.0)])
@pytest.mark.parametrize("radius_mm", [0.0, 1.0, 5.0])
def test_dilation_is_every_voxel_within_the_radius(spacing_mm, radius_mm):
    mask = np.random.default_rng(0).uniform(size=(12, 11, 10)) < 0.005
    h = np.broadcast_to(spacing_mm, 3)
    voxels = np.argwhere(np.ones_like(mask)) * h
    nearest = cdist(voxels, np.argwhere(mask) * h).min(1).reshape(mask.shape)
    np.testing.assert_array_equal(dilate_mm(mask, radius_mm, spacing_mm), nearest <= radius_mm + 1e-9)


def test_dilation_of_nothing_is_nothing_and_leaves_its_input_alone():
    mask = np.zeros((4, 4, 4), np.uint8)
    assert not dilate_mm(mask, 5, 1).any()
    mask[1, 1, 1] = 1
    dilate_mm(mask, 5, 1)
    assert mask.sum() == 1


def test_unhealthy_is_the_segmentation_and_five_millimetres():
    segmentation = _ball((30, 30, 30), (15, 15, 15), 4)
    distance = ndimage.distance_transform_edt(~segmentation)
    np.testing.assert_array_equal(dilate_mm(segmentation, UNHEALTHY_MARGIN_MM, 1.0), distance <= 5)


@pytest.mark.parametrize("spacing_mm", [2.0, (2.0, 2.0, 3.0)])
def test_healthy_masks_keep_distance_and_stay_inside(spacing_mm):
    brain = _ball((50, 50, 50), (25, 25, 25), 22)
    unhealthy = _ball(brain.shape, (18, 25, 25), 8)
    donor = _ball(brain.shape, (10, 40, 20), 5)
    donor[10:12, 40, 18:31] = True
    distance = ndimage.distance_transform_edt(~unhealthy, sampling=np.broadcast_to(spacing_mm, 3))
    inside, places, sizes = [], set(), []
    for seed in range(25):
        mask = healthy_mask(brain, unhealthy, donor, np.random.default_rng(seed), spacing_mm=spacing_mm)
        assert distance[mask].min() >= 5
        inside.append(brain[mask].mean())
        places.add(tuple(np.argwhere(mask).mean(0).round()))
        sizes.append(mask.sum())
    assert min(inside) >= 0.75
    assert min(inside) < 1, "masks may reach into the background"
    assert len(places) > 20
    assert max(sizes) > 2 * min(sizes)


def test_a_turned_copy_keeps_its_volume_and_scaling_cubes_it():
    brain, empty = np.ones((60, 60, 60), bool), np.zeros((60, 60, 60), bool)
    donor = np.zeros_like(brain)
    donor[5:23, 5:17, 5:13] = True
    for scale, seed in ((1.0, 0), (1.0, 1), (0.7, 2)):
        mask = healthy_mask(
            brain, empty, donor, np.random.default_rng(seed), spacing_mm=(1.0, 1.0, 2.0), scale=(scale, scale)
        )
        assert mask.sum() == pytest.approx(scale**3 * donor.sum(), rel=0.1)


def test_a_turn_is_a_rotation_in_millimetres():
    brain, empty = np.ones((70, 70, 70), bool), np.zeros((70, 70, 70), bool)
    donor = np.zeros_like(brain)
    donor[5:29, 5:13, 5:9] = True  # 24 x 8 x 12 mm
    h = np.array([1.0, 1.0, 3.0])
    mask = healthy_mask(brain, empty, donor, np.random.default_rng(3), spacing_mm=h, scale=(1, 1))
    variances = [np.linalg.eigvalsh(np.cov((np.argwhere(m) * h).T)) for m in (donor, mask)]
    np.testing.assert_allclose(variances[1], variances[0], rtol=0.25)
    np.testing.assert_allclose(np.sqrt(variances[1][2]), 24 / np.sqrt(12), rtol=0.1)


def test_no_place_is_an_error_with_numbers():
    brain = _ball((20, 20, 20), (10, 10, 10), 8)
    donor = _ball(brain.shape, (10, 10, 10), 3)
    with pytest.raises(
        InputError, match=r"no place for a healthy mask in 40 rotations of 60 places: .* of which 0 lie"
    ):
        healthy_mask(brain, brain, donor, np.random.default_rng(0), spacing_mm=1.0)
    for given, name in (((0 * brain, donor), "brain"), ((brain, 0 * donor), "donor")):
        with pytest.raises(InputError, match=f"{name}: the mask is empty"):
            healthy_mask(given[0], 0 * brain, given[1], np.random.default_rng(0), spacing_mm=1.0)


def test_void_is_zero_under_the_mask_and_equal_outside():
    image = np.random.default_rng(0).integers(-50, 900, (6, 5, 4)).astype(np.int16)
    before, mask = image.copy(), np.random.default_rng(1).integers(0, 2, image.shape).astype(np.uint8)
    voided = void(image, mask)
    np.testing.assert_array_equal(voided, np.where(mask, 0, before))
    np.testing.assert_array_equal(image, before)
    assert voided.dtype == np.int16
