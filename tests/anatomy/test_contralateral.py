"""The mid-sagittal plane: found in symmetric brains however they lie, whatever is hidden; closed forms of mirroring."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.anatomy.contralateral import contralateral_image, midsagittal_reflection

SHAPE = (44, 52, 40)


def symmetric_brain(turn=(0.0, 0.0), shift_vox=0.0):
    """A smooth brain with a known plane of symmetry, and the reflection across it."""
    rng = np.random.default_rng(0)
    fine = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2)
    fine = fine + fine[::-1]
    x = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    inside = (x[0] / 16) ** 2 + (x[1] / 20) ** 2 + (x[2] / 15) ** 2 < 1
    image = np.where(inside, 1 + 3 * fine, 0).astype(np.float32)
    turned = Rotation.from_euler("yz", turn, degrees=True).as_matrix()
    centre = (np.array(SHAPE) - 1) / 2
    offset = centre - turned.T @ (centre + shift_vox * turned[:, 0])
    normal = turned[:, 0]
    matrix = np.eye(4)
    matrix[:3, :3] -= 2 * np.outer(normal, normal)
    matrix[:3, 3] = 2 * (normal @ centre + shift_vox) * normal
    return np.maximum(ndimage.affine_transform(image, turned.T, offset=offset, order=1), 0), matrix


def distance_vox(found, expected):
    points = np.indices(SHAPE)[:, 8:36:4, 8:44:4, 8:32:4].reshape(3, -1)
    moved = [matrix[:3, :3] @ points + matrix[:3, 3:] for matrix in (found, expected)]
    return np.linalg.norm(moved[0] - moved[1], axis=0).max()


@pytest.mark.parametrize(("turn", "shift_vox"), [((0, 0), 0), ((0, 0), 2.5), ((6, -9), -1.5), ((-12, 5), 3)])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_plane_of_a_symmetric_brain_is_found(turn, shift_vox, hidden):
    image, expected = symmetric_brain(turn, shift_vox)
    mask = np.zeros(SHAPE, bool)
    if hidden:
        mask[24:36, 12:36, 10:30] = True
    found = midsagittal_reflection(image, mask, spacing_mm=4.0)
    assert distance_vox(found, expected) < 0.35


def test_a_reflection_is_its_own_inverse_and_reads_nothing_under_the_mask():
    image, _ = symmetric_brain((4, 3), 1)
    mask = np.zeros(SHAPE, bool)
    mask[26:34, 16:30, 14:26] = True
    found = midsagittal_reflection(image, mask, spacing_mm=4.0)
    np.testing.assert_allclose(found @ found, np.eye(4), atol=1e-9)
    assert np.linalg.det(found[:3, :3]) == pytest.approx(-1)
    other = np.where(mask, np.nan, image)
    assert np.array_equal(midsagittal_reflection(other, mask, spacing_mm=4.0), found)


def test_finer_voxels_have_the_same_plane():
    image, expected = symmetric_brain((5, -4), 1.5)
    fine = image.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    found = midsagittal_reflection(fine, np.zeros(fine.shape, bool), spacing_mm=2.0)
    to_fine = np.diag([2.0, 2, 2, 1])
    to_fine[:3, 3] = 0.5
    assert distance_vox(np.linalg.inv(to_fine) @ found @ to_fine, expected) < 0.35


@pytest.mark.parametrize("image", [np.zeros(SHAPE), np.ones(SHAPE)], ids=["air", "constant"])
def test_without_any_structure_the_plane_is_in_the_middle(image):
    found = midsagittal_reflection(image, np.zeros(SHAPE, bool), spacing_mm=4.0)
    np.testing.assert_allclose(found[0], [-1, 0, 0, SHAPE[0] - 1], atol=1e-9)


def test_in_a_symmetric_brain_the_mirror_image_is_what_was_hidden():
    image, _ = symmetric_brain()
    mask = np.zeros(SHAPE, bool)
    mask[26:34, 16:30, 14:26] = True
    values, known = contralateral_image(np.where(mask, 9.0, image), mask, spacing_mm=4.0)
    assert known[mask].all() and values.dtype == np.float32
    assert np.abs(values - image)[mask].max() < 0.15 * image[mask].std() * 3
    assert np.corrcoef(values[mask], image[mask])[0, 1] > 0.98


def test_where_both_sides_are_hidden_the_estimate_stays():
    image, _ = symmetric_brain()
    mask = np.zeros(SHAPE, bool)
    mask[16:28, 16:30, 14:26] = True  # across the plane, symmetric
    mask[28:32, 16:30, 14:26] = True
    estimate = np.where(mask, 9.0, image)
    values, known = contralateral_image(estimate, mask, spacing_mm=4.0)
    assert not known[18:26, 16:30, 14:26].any() and (values[18:26, 16:30, 14:26] == 9).all()
    assert known[29:32, 16:30, 14:26].all() and (values[29:32, 16:30, 14:26] < 4).all()


def test_far_from_the_mask_nothing_is_shown_and_without_one_nothing_at_all():
    image, _ = symmetric_brain()
    mask = np.zeros(SHAPE, bool)
    mask[26:28, 20:22, 20:22] = True
    values, known = contralateral_image(image, mask, spacing_mm=16.0)
    assert known[23:31, 17:25, 17:25].all() and known.sum() == 8**3
    assert np.array_equal(values[~known], image[~known])
    values, known = contralateral_image(image, np.zeros(SHAPE, bool), spacing_mm=4.0)
    assert np.array_equal(values, image) and not known.any()


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_a_volume_of_few_slices_has_a_mirror_image(slices):
    image, mask = np.ones((40, 40, slices), np.float32), np.zeros((40, 40, slices), bool)
    mask[5:10, 10:20, 0] = True
    values, known = contralateral_image(image, mask, spacing_mm=1.0)
    assert known[mask].all() and np.allclose(values, 1, atol=1e-3)
