"""Deformation by local correlation: the slope, what is hidden, and known deformations that are found again."""

import numpy as np
import pytest
import torch
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import CCMetric
from scipy import ndimage

from ldm_lib.anatomy.deformation import WINDOW_VOX, Level, deform, interpolate, transformed, voxels
from ldm_lib.anatomy.initial_estimate import gaussian_blur

SHAPE = (36, 40, 34)


def textured(seed):
    """An image of several scales in the middle of air."""
    noise = np.random.default_rng(seed).normal(size=(2, *SHAPE))
    texture = 1 + 2 * ndimage.gaussian_filter(noise[0], 1.5) + 8 * ndimage.gaussian_filter(noise[1], 4)
    return np.float32(texture * INNER)


INNER = np.zeros(SHAPE, bool)
INNER[5:-5, 5:-5, 5:-5] = True


def batched(array):
    return torch.from_numpy(np.asarray(array, np.float32))[None, None]


def correlation_slope(static, moving, weight):
    return Level(static, weight, moving, np.eye(4)).correlation_slope(moving)


@pytest.fixture
def mask():
    mask = np.zeros(SHAPE, bool)
    mask[11:20, 13:23, 12:20] = True
    return mask


def displacements(seed=0, most=2.5):
    """A smooth field (3, x, y, z) whose largest displacement is `most` voxels."""
    noise = np.random.default_rng(seed).normal(size=(3, *SHAPE))
    field = np.stack([ndimage.gaussian_filter(part, 6) for part in noise])
    return (field * most / np.linalg.norm(field, axis=0).max()).astype(np.float32)


def test_the_slope_is_the_derivative_of_each_windows_squared_correlation_by_its_central_voxel(mask):
    static, weight = batched(textured(0)).double(), 1 - batched(mask).double()
    moving = batched(textured(1)).double()
    slope = correlation_slope(static, moving, weight)
    for voxel in [(8, 9, 10), (10, 18, 15), (24, 25, 13), (18, 12, 24)]:
        centre = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
        centre[0, 0][voxel] = 1
        window = gaussian_blur(centre, WINDOW_VOX) * weight
        window = window / window.sum()
        given = moving.clone().requires_grad_()
        a, b = static - (window * static).sum(), given - (window * given).sum()
        correlation = (window * a * b).sum() ** 2 / ((window * a**2).sum() * (window * b**2).sum())
        (derivative,) = torch.autograd.grad(correlation, given)
        assert float(slope[0, 0][voxel]) == pytest.approx(float((derivative / window)[0, 0][voxel]), rel=2e-2)


def test_the_mask_exerts_no_force_and_its_content_changes_nothing(mask):
    static, moving, weight = batched(textured(0)), batched(textured(1)), 1 - batched(mask)
    slope = correlation_slope(static, moving, weight)
    assert not slope[0, 0][torch.from_numpy(mask)].any() and slope.abs().max() > 0.1
    torch.testing.assert_close(correlation_slope(static * weight, moving, weight), slope, rtol=0, atol=0)
    images = textured(0), np.where(mask, 9, textured(0))
    one, other = (deform(image, mask, textured(1), np.eye(4)) for image in images)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("gain", "shift"), [(1.0, 0.0), (3.0, 1.0), (-0.5, 2.0)])
def test_images_that_agree_outside_the_mask_exert_no_force_in_any_contrast(mask, gain, shift):
    moving = batched(textured(0))
    static = (gain * moving + shift) * (1 - batched(mask))
    other = correlation_slope(static, batched(textured(1)), 1 - batched(mask)).abs().max()
    assert correlation_slope(static, moving, 1 - batched(mask)).abs().max() < 1e-2 * other


def test_a_known_deformation_is_found_also_under_the_mask_and_as_well_as_by_dipy(mask):
    moving, true = textured(0), displacements()
    static = interpolate(batched(moving), voxels(SHAPE) + torch.from_numpy(true))[0, 0].numpy()

    def error(found, where):
        return float(np.sqrt(((found - true) ** 2).sum(0)[where].mean() / (true**2).sum(0)[where].mean()))

    without = deform(static, np.zeros(SHAPE, bool), moving, np.eye(4)).numpy()
    oracle = SymmetricDiffeomorphicRegistration(CCMetric(3, radius=4), level_iters=[40, 20])
    dipys = np.moveaxis(oracle.optimize(static, moving).get_forward_field(), -1, 0)
    assert error(without, INNER) < min(0.25, error(dipys, INNER))
    hidden = deform(static, mask, moving, np.eye(4)).numpy()
    assert error(hidden, INNER & ~mask) < 0.25 and error(hidden, mask) < 0.25


def test_the_map_folds_nowhere_even_between_images_that_have_nothing_in_common():
    found = deform(textured(0), np.zeros(SHAPE, bool), textured(5), np.eye(4)).numpy()
    slopes = np.stack([np.stack(np.gradient(part)) for part in found])
    determinant = np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1)) + np.eye(3))
    assert np.abs(found).max() > 1 and determinant.min() > 0


def test_the_affine_map_comes_after_the_displacement():
    moving = textured(0)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.diag([1.1, 0.95, 1.0]), (0.5, 1.5, -1.0)
    static = interpolate(batched(moving), transformed(voxels(SHAPE), affine))[0, 0].numpy()
    found = deform(static, np.zeros(SHAPE, bool), moving, affine)
    assert found[:, torch.from_numpy(INNER)].square().mean().sqrt() < 0.1


def test_interpolation_is_scipys():
    image, places = textured(0), voxels(SHAPE) + torch.from_numpy(displacements(1, 4.0))
    inside = np.all([(p >= 0) & (p <= n - 1) for p, n in zip(places.numpy(), SHAPE, strict=True)], axis=0)
    found = interpolate(batched(image), places)[0, 0].numpy()
    np.testing.assert_allclose(
        found[inside], ndimage.map_coordinates(image, places.numpy(), order=1)[inside], atol=1e-4
    )
    border = interpolate(batched(image), places, outside="border")[0, 0].numpy()
    clipped = ndimage.map_coordinates(image, places.numpy(), order=1, mode="nearest")
    np.testing.assert_allclose(border, clipped, atol=1e-4)
