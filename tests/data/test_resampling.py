"""Laws of going to other voxels and back: same places, no peeking, any order of voxels, exact where nothing changes."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ldm_lib.data.case import load_case
from ldm_lib.data.model_grid import Resampling, require_spacing, resample_case, resampling_to

SHAPE = (24, 21, 18)
targets = pytest.mark.parametrize("target_mm", [4.0, 2.0, 1.5, 0.7])


def resampling(target_mm, spacing_mm=(1.0, 1.0, 1.0)):
    return Resampling.of(SHAPE, spacing_mm, target_mm)


@targets
def test_a_linear_image_keeps_its_value_at_every_place(target_mm):
    """Smoothing and linear interpolation are exact on it, away from the border."""
    affine, chosen = np.array([[-1.0, 0, 0, 7], [0, -1, 0, 9], [0, 0, 1, -4], [0, 0, 0, 1]]), resampling(target_mm)
    world = np.einsum("ij,jxyz->ixyz", affine, np.stack([*np.indices(SHAPE), np.ones(SHAPE)]))
    image = 3 * world[0] - 2 * world[1] + world[2]
    found = chosen.image(image, np.ones(SHAPE, bool))
    there = np.stack([*np.indices(found.shape), np.ones(found.shape)])
    world = np.einsum("ij,jxyz->ixyz", chosen.affine(affine), there)
    # what the smoothing sees lies inside: 4 standard deviations, 2 voxels more for a coarse grid's own edge
    inner = tuple(slice(n // 2 - 1, n // 2 + 1) for n in found.shape)
    np.testing.assert_allclose(found[inner], (3 * world[0] - 2 * world[1] + world[2])[inner], atol=0.2)


@targets
def test_the_grid_there_covers_the_grid_here_about_the_same_middle(target_mm):
    chosen = resampling(target_mm, (1.0, 2.0, 0.5))
    extent_mm = np.array(SHAPE) * (1.0, 2.0, 0.5)
    covered_mm = np.array(chosen.shape) * target_mm
    assert (covered_mm >= extent_mm - 1e-6).all() and (covered_mm < extent_mm + 2 * target_mm).all()
    middle_here, middle_there = (
        (np.array([*shape, 1]) - [1, 1, 1, 0]) / [2, 2, 2, 1] for shape in (SHAPE, chosen.shape)
    )
    affine = np.diag([1.0, 2.0, 0.5, 1.0])
    np.testing.assert_allclose(affine @ middle_here, chosen.affine(affine) @ middle_there)


@targets
def test_a_voxel_that_is_known_there_depends_on_no_masked_voxel(target_mm):
    """Whatever stands under the mask, the image there is the same; and the mask there covers every voxel of it."""
    rng = np.random.default_rng(0)
    image, mask, chosen = rng.random(SHAPE), np.zeros(SHAPE, bool), resampling(target_mm)
    mask[5:12, 7:9, 3:14] = True
    mask[20, 20, 17] = True
    void = np.where(mask, 0, image)
    masked = chosen.mask(mask)
    assert np.array_equal(chosen.image(void, ~mask), chosen.image(np.where(mask, 1e6, void), ~mask))
    full = chosen.image(image, np.ones(SHAPE, bool))
    if target_mm < 1:  # interpolation alone: what is known there is as if there were no mask
        np.testing.assert_allclose(chosen.image(void, ~mask)[~masked], full[~masked], atol=1e-6)
    assert (chosen.back(masked.astype(np.float32), np.argwhere(mask)) > 0.4).all()


@targets
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_order_of_voxels_does_not_matter(target_mm, axis):
    rng, chosen = np.random.default_rng(1), resampling(target_mm)
    image, mask, labels = rng.random(SHAPE), rng.random(SHAPE) < 0.01, rng.integers(0, 4, SHAPE).astype(np.uint8)

    def there(turn):
        parts = chosen.image(turn(image), ~turn(mask)), chosen.mask(turn(mask)), chosen.labels(turn(labels))
        return [turn(part) for part in parts]

    for plain, turned in zip(there(lambda a: a), there(lambda a: np.flip(a, axis)), strict=True):
        np.testing.assert_allclose(plain, turned, atol=1e-6)


@pytest.mark.parametrize("target_mm", [2.0, 1.3, 0.7])
def test_a_smooth_volume_comes_back(target_mm):
    x, y, z = np.indices(SHAPE)
    image = np.sin(x / 7) + np.cos(y / 6) * np.sin(z / 8)
    chosen = resampling(target_mm)
    voxels = np.argwhere(np.ones(SHAPE, bool))
    voxels = voxels[((voxels > 4) & (voxels < np.array(SHAPE) - 5)).all(axis=1)]
    back = chosen.back(chosen.image(image, np.ones(SHAPE, bool)), voxels)
    assert np.abs(back - image[tuple(voxels.T)]).max() < 0.05


def test_a_label_there_is_the_one_that_covers_most():
    labels = np.zeros(SHAPE, np.uint8)
    labels[:12], labels[12:] = 3, 1
    found = resampling(3.0).labels(labels)
    assert (found[:4] == 3).all() and (found[4:] == 1).all() and found.dtype == np.uint8


@pytest.mark.parametrize("degrees", [0, 17, 30, 45])
@pytest.mark.parametrize("target_mm", [2.0, 1.0, 0.7])
def test_an_oblique_grid_is_resampled_along_the_axes_of_the_world(degrees, target_mm):
    """Places keep their values, hidden voxels stay hidden, and the grid covers what it is to cover, with 8 mm more."""
    shape = 44, 42, 40
    turn = Rotation.from_rotvec(np.array([1, 2, -2]) / 3 * degrees, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0, -1.0, 0], [1.3, 0, 0], [0, 0, 0.9]])
    affine[:3, 3] = 5, -8, 3
    needed, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    needed[3:20, 2:19, 1:16], mask[9:13, 9:12, 7:11] = True, True
    chosen = Resampling.to_axes(affine, needed, target_mm)
    found = chosen.affine(affine)
    np.testing.assert_allclose(np.sort(np.abs(found[:3, :3]), axis=0), [[0] * 3, [0] * 3, [target_mm] * 3], atol=1e-9)
    places = np.linalg.solve(found, affine @ np.c_[np.argwhere(needed), np.ones(needed.sum())].T)[:3]
    assert (places >= 8 / target_mm - 1e-6).all()
    assert (places <= np.array(chosen.shape)[:, None] - 1 - 8 / target_mm + 1e-6).all()
    world = np.einsum("ij,jxyz->ixyz", affine, np.stack([*np.indices(shape), np.ones(shape)]))
    image = 3 * world[0] - 2 * world[1] + world[2]
    there = chosen.image(image, np.ones(shape, bool))
    world = np.einsum("ij,jxyz->ixyz", found, np.stack([*np.indices(there.shape), np.ones(there.shape)]))
    away = np.pad(np.ones([n - 16 for n in shape]), 8)
    inner = chosen.image(away, np.ones(shape, bool)) > 1 - 1e-6
    expected = 3 * world[0] - 2 * world[1] + world[2]
    assert inner.sum() > 10
    np.testing.assert_allclose(there[inner], expected[inner], atol=0.05)
    back = chosen.back(expected.astype(np.float32), np.argwhere(mask))
    np.testing.assert_allclose(back, image[mask], atol=1e-3)
    hidden = chosen.mask(mask)
    assert np.array_equal(
        chosen.image(np.where(mask, 0, image), ~mask), chosen.image(np.where(mask, 1e6, image), ~mask)
    )
    assert (chosen.back(hidden.astype(np.float32), np.argwhere(mask)) > 0.4).all()


def test_small_tilts_as_scanners_write_them_change_nothing(cases):
    data = load_case(cases[0])
    for degrees, same in ((0.5, True), (14.9, True), (15.1, False)):
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_euler("y", degrees, degrees=True).as_matrix()
        tilted = replace(data, source=replace(data.source, affine=turn @ data.affine))
        assert (resampling_to(tilted, 8.0) is None) == same
        require_spacing(tilted, 8.0)


def test_a_case_of_the_models_voxels_is_left_alone(cases):
    data = load_case(cases[0])
    assert resampling_to(data, 8.05) is None and resample_case(data, None) is data
    assert resampling_to(data, 8.5) is not None


def test_maps_are_resampled_and_nothing_of_the_ground_truth_is(cases):
    data = load_case(cases[0])
    there = resample_case(data, resampling_to(data, 5.0))
    assert there.target is None and there.healthy is None and there.unhealthy is None
    np.testing.assert_allclose(there.source.spacing_mm, 5.0)
    assert set(np.unique(there.tissue)) <= set(np.unique(data.tissue))
    assert there.growth.min() >= 0 and there.growth.max() <= data.growth.max() + 1e-6
    share = there.mask.sum() * 5.0**3 / (data.mask.sum() * 8.0**3)
    assert 1 <= share < 3 and not there.voided[there.mask].any()
    peeked = replace(data, voided=np.where(data.mask, 999, data.voided).astype(np.float32))
    assert np.array_equal(resample_case(peeked, resampling_to(data, 5.0)).voided, there.voided)
