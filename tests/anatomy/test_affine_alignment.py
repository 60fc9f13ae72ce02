"""Affine alignment by mutual information: known maps are found again, in any contrast, and without masked voxels."""

import numpy as np
import pytest
import torch
from dipy.align.imaffine import AffineRegistration, MutualInformationMetric
from dipy.align.transforms import AffineTransform3D, RigidTransform3D
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy import registration
from ldm_lib.anatomy.affine_alignment import RIM, _affine, _Pair, _rigid, aligned
from ldm_lib.anatomy.atlas import mni152

STRETCH = np.diag([1.06, 0.95, 1.03])


@pytest.fixture(scope="module")
def head():
    """The atlas at 8 mm."""
    atlas = mni152()
    return registration._downsampled(atlas.t1, np.zeros(atlas.t1.shape, bool), atlas.affine, 8.0)


@pytest.fixture(scope="module")
def turned(head):
    """The head after a known affine map, with its mask, and the map from it to the head."""
    atlas = mni152()
    known = np.eye(4)
    known[:3, :3] = Rotation.from_euler("xyz", [9, -6, 8], degrees=True).as_matrix() @ STRETCH
    known[:3, 3] = [4, -7, 5]
    to_atlas = np.linalg.solve(atlas.affine, known @ atlas.affine)
    image = ndimage.affine_transform(atlas.t1, to_atlas, order=1)
    return registration._downsampled(image, np.zeros(image.shape, bool), atlas.affine, 8.0), known


def error_mm(found, known, head):
    """Root mean square distance of the places of the brain's voxels under two maps."""
    image, _, affine = head
    places = np.c_[np.argwhere(image > 0), np.ones((image > 0).sum())] @ affine.T
    return np.sqrt(np.mean(np.sum(((places @ (found - known).T)[:, :3]) ** 2, axis=1)))


@pytest.mark.parametrize("contrast", [lambda t: t, lambda t: np.where(t > 0, 1.3 - t, 0), lambda t: np.sqrt(t)])
def test_a_known_map_is_found_again_in_any_contrast(turned, head, contrast):
    (image, mask, affine), known = turned
    found = aligned((contrast(image), mask, affine), head, np.eye(4))
    assert error_mm(found, known, head) < 1.5 < 10 < error_mm(np.eye(4), known, head)


def test_masked_voxels_are_not_read(turned, head):
    (image, mask, affine), known = turned
    hidden = mask.copy()
    hidden[12:18, 8:16, 8:14] = True
    first, second = (aligned((np.where(hidden, value, image), hidden, affine), head, np.eye(4)) for value in (0, 0.7))
    np.testing.assert_allclose(first, second, atol=1e-9)
    assert error_mm(first, known, head) < 2


@pytest.mark.parametrize(("move", "count"), [(_rigid, 6), (_affine, 12)])
def test_the_gradient_is_that_of_finite_differences(turned, head, move, count):
    pair = _Pair.of(turned[0], head)
    before = torch.from_numpy(np.linalg.inv(head[2]) @ pair.centre)
    start = torch.linspace(-3, 3, count).double().requires_grad_()
    (gradient,) = torch.autograd.grad(pair.information(before @ move(start)), start)
    with torch.no_grad():
        for k in range(count):
            step = 1e-5 * torch.eye(count).double()[k]
            up, down = (pair.information(before @ move(start + sign * step)) for sign in (1, -1))
            assert gradient[k].item() == pytest.approx((up - down).item() / 2e-5, rel=0.05, abs=2e-4)


def test_a_constant_holds_no_information(turned, head):
    pair = _Pair.of(turned[0], (np.ones_like(head[0]), head[1], head[2]))
    before = torch.from_numpy(np.linalg.inv(head[2]) @ pair.centre)
    assert float(pair.information(before)) == pytest.approx(0, abs=1e-6)


def test_it_finds_at_least_the_information_that_dipy_finds(turned, head):
    """The oracle starts at the same place, with the same voxels, on the same grid."""
    (image, mask, affine), _ = turned
    step = AffineRegistration(metric=MutualInformationMetric(), level_iters=[200], sigmas=[0], factors=[1], verbosity=0)
    near, head_near = (ndimage.binary_dilation(each > 0, iterations=RIM).astype(np.int32) for each in (image, head[0]))
    grids = {"static_grid2world": affine, "moving_grid2world": head[2], "static_mask": near, "moving_mask": head_near}
    dipys = np.eye(4)
    for transform in (RigidTransform3D(), AffineTransform3D()):
        dipys = step.optimize(image, head[0], transform, None, starting_affine=dipys, **grids).affine
    pair = _Pair.of((image, mask, affine), head)
    own, oracle = (
        float(pair.information(torch.from_numpy(np.linalg.inv(head[2]) @ found @ pair.centre)))
        for found in (aligned((image, mask, affine), head, np.eye(4)), dipys)
    )
    assert own > oracle - 0.005


def test_too_few_visible_voxels_are_an_error(head):
    image, mask, affine = head
    with pytest.raises(ValueError, match="0 visible voxels of 8 mm"):
        aligned((image, ~mask, affine), head, np.eye(4))
