"""Voxel order, padding and latent voxels: every conversion has an exact inverse."""

import doctest
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ldm_lib import geometry
from ldm_lib.errors import InputError
from ldm_lib.geometry import (
    Frame,
    Padding,
    block_centre,
    block_mean,
    bounding_box,
    latent_mask,
    nearest_rotation,
    oblique_degrees,
)

ORIENTATIONS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def _affine(axes, signs, spacing_mm=(1.0, 1.0, 1.0)):
    """File axis k runs along world axis axes[k], in the direction signs[k]."""
    affine = np.diag([0.0, 0, 0, 1])
    for k, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, k] = sign * spacing_mm[k]
    affine[:3, 3] = 7, -5, 3
    return affine


def _positions_mm(affine, shape):
    """World coordinates (3, x, y, z) of every voxel."""
    indices = np.concatenate([np.indices(shape), np.ones((1, *shape))])
    return np.tensordot(affine[:3], indices, axes=1)


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("shape", [(5, 6, 9), (8, 7, 1)])
def test_every_orientation_is_undone_exactly(shape, multiple):
    array = np.arange(1, np.prod(shape) + 1).reshape(shape)
    for axes, signs in ORIENTATIONS:
        frame = Frame.of(_affine(axes, signs), shape, multiple)
        there = frame.to_model(array)
        assert there.shape == frame.shape
        assert all(n % multiple == 0 for n in there.shape)
        assert there.flags.c_contiguous
        assert there.sum() == array.sum(), "padding is zero"
        back = frame.to_file(there)
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype


def test_every_orientation_becomes_lps():
    shape = (4, 3, 5)
    for axes, signs in ORIENTATIONS:
        affine = _affine(axes, signs, (1.0, 2.0, 3.0))
        frame, positions_mm = Frame.of(affine, shape, 1), _positions_mm(affine, shape)
        left, posterior, superior = (sign * frame.to_lps(p) for sign, p in zip((-1, -1, 1), positions_mm, strict=True))
        steps = [np.diff(field, axis=axis) for axis, field in enumerate((left, posterior, superior))]
        spacing_mm = frame.lps_spacing((1.0, 2.0, 3.0))
        for axis, (step, length) in enumerate(zip(steps, spacing_mm, strict=True)):
            np.testing.assert_allclose(step, length, err_msg=f"axis {axis} of {axes} {signs}")


def test_an_oblique_grid_is_reordered_to_its_nearest_axes():
    tilt = np.radians(20)
    oblique = np.eye(4)
    oblique[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    array = np.arange(60).reshape(3, 4, 5)
    frame = Frame.of(oblique @ _affine((0, 1, 2), (1, 1, 1)), array.shape, 1)
    np.testing.assert_array_equal(frame.to_lps(array), array[::-1, ::-1])


@pytest.mark.parametrize("depth", [155, 156])
def test_a_canonical_copy_is_the_same_case(depth):
    array = np.random.default_rng(0).integers(0, 900, (6, 7, depth))
    lps = nib.Nifti1Image(array.astype(np.int16), np.diag([-1.0, -1, 1, 1]))
    ras = nib.as_closest_canonical(lps)
    assert nib.aff2axcodes(ras.affine) == ("R", "A", "S")
    frames = [Frame.of(image.affine, image.shape, 8) for image in (lps, ras)]
    there = [f.to_model(np.asarray(image.dataobj)) for f, image in zip(frames, (lps, ras), strict=True)]
    np.testing.assert_array_equal(*there)
    np.testing.assert_array_equal(frames[1].to_file(there[0]), np.asarray(ras.dataobj))


@pytest.mark.parametrize("multiple", [2, 8, 16])
def test_padding_is_minimal_and_records_its_offset(multiple):
    for depth in (*range(1, 40), 155, 156, 160):
        padding = Padding.to_multiple((depth,), multiple)
        before, after = padding.before[0], padding.after[0]
        assert (before + depth + after) % multiple == 0
        assert 0 <= before <= after <= before + 1, "centred, the odd voxel at the end"
        assert before + after < multiple
    assert Padding.to_multiple((240, 155, 156), 8) == Padding((0, 2, 2), (0, 3, 2))


def test_a_crop_takes_the_last_three_axes_of_tensors_too():
    batch = torch.arange(2 * 3 * 5 * 6 * 7).reshape(2, 3, 5, 6, 7)
    padding = Padding.to_multiple((5, 6, 7), 8)
    padded = torch.from_numpy(np.stack([[padding.pad(c.numpy()) for c in b] for b in batch]))
    assert torch.equal(padding.crop(padded), batch)
    assert padding.pad(np.ones((5, 6, 7), bool)).dtype == bool


def _blocks(shape, factor):
    """Index and slices of every latent voxel."""
    for index in np.ndindex(*(n // factor for n in shape)):
        yield index, tuple(slice(i * factor, (i + 1) * factor) for i in index)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_block_mean_is_the_mean_of_the_voxels(factor):
    array = np.random.default_rng(0).uniform(size=(2, 8, 12, 4)).astype(np.float32)
    means = block_mean(array, factor)
    for index, box in _blocks(array.shape[1:], factor):
        np.testing.assert_allclose(means[(slice(None), *index)], array[(slice(None), *box)].mean((1, 2, 3)), rtol=1e-6)
    mask = np.zeros((8, 8, 8), bool)
    mask[0, 0, 0] = mask[4:, 4:, 4:] = True
    assert block_mean(mask, 4)[0, 0, 0] == 1 / 64
    assert block_mean(mask, 4)[1, 1, 1] == 1
    assert block_mean(mask, 4).sum() == 1 + 1 / 64


@pytest.mark.parametrize("dilation", [0, 1, 2])
@pytest.mark.parametrize("factor", [2, 4])
def test_latent_mask_is_every_latent_voxel_near_a_masked_voxel(factor, dilation):
    mask = np.random.default_rng(3).uniform(size=(24, 16, 20)) < 6e-4
    assert 1 < mask.sum() < 10
    hit = [np.array(index) for index, box in _blocks(mask.shape, factor) if mask[box].any()]
    expected = np.zeros([n // factor for n in mask.shape], bool)
    for index in np.ndindex(*expected.shape):
        expected[index] = any(np.abs(np.array(index) - h).max() <= dilation for h in hit)
    found = latent_mask(mask, factor, dilation)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)
    assert not found.all()


@pytest.mark.parametrize(("factor", "inside"), [(1, 0), (2, 1), (4, 2), (8, 4)])
def test_the_centre_of_a_block_is_one_of_its_voxels(factor, inside):
    array = np.random.default_rng(0).uniform(size=(3, 16, 8, 24))
    centres = block_centre(array, factor)
    for index, _ in _blocks(array.shape[1:], factor):
        x, y, z = (i * factor + inside for i in index)
        np.testing.assert_array_equal(centres[(slice(None), *index)], array[:, x, y, z])


@pytest.mark.parametrize("margin_vox", [0, 2, (0, 1, 9)])
def test_bounding_box_holds_the_mask_and_the_margin_and_ends_at_the_volume(margin_vox):
    mask = np.zeros((12, 9, 10), bool)
    mask[3, 4, 5] = mask[5, 4, 6] = True
    margins = np.broadcast_to(margin_vox, 3)
    inside = np.zeros(mask.shape, bool)
    inside[bounding_box(mask, margin_vox)] = True
    for axis, (low, high) in enumerate([(3, 5), (4, 4), (5, 6)]):
        expected = np.arange(max(low - margins[axis], 0), min(high + margins[axis], mask.shape[axis] - 1) + 1)
        others = tuple({0, 1, 2} - {axis})
        np.testing.assert_array_equal(np.flatnonzero(inside.any(axis=others)), expected)
    assert inside.sum() == np.prod([s.stop - s.start for s in bounding_box(mask, margin_vox)])


def test_bounding_box_of_an_empty_mask_is_rejected():
    with pytest.raises(InputError, match="the mask is empty"):
        bounding_box(np.zeros((3, 3, 3), bool))


def test_examples_run():
    found = doctest.testmod(geometry)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("depth", [155, 156])
def test_padding_never_shifts(depth):
    array = np.zeros((5, 4, depth), np.float32)
    array[2, 1, 77] = 1
    padding = Padding.to_multiple(array.shape, 8)
    padded = padding.pad(array)
    assert np.argwhere(padded).tolist() == [[2 + 1, 1 + 2, 77 + 2]]
    np.testing.assert_array_equal(padding.crop(padded), array)


def test_latent_mask_of_an_empty_mask_is_empty():
    assert not latent_mask(np.zeros((8, 8, 8), bool), 4, 2).any()


def test_a_box_holds_its_latent_voxels_and_the_margin_only():
    rng = np.random.default_rng(0)
    for _ in range(20):
        marked, margin = rng.random((6, 9, 7)) < 0.02, int(rng.integers(4))
        marked[tuple(rng.integers(0, marked.shape))] = True
        grid = np.indices(marked.shape).reshape(3, -1).T
        low, high = np.argwhere(marked).min(axis=0) - margin, np.argwhere(marked).max(axis=0) + margin
        expected = ((grid >= low) & (grid <= high)).all(axis=1).reshape(marked.shape)
        found = np.zeros(marked.shape, bool)
        found[bounding_box(marked, margin)] = True
        assert np.array_equal(found, expected)


def test_a_cropped_array_stays_where_it_was():
    affine = np.array([[0, -2.0, 0.3, 7], [3, 0, 0, -5], [0, 0.2, 4, 1], [0, 0, 0, 1]])
    box = slice(3, 9), slice(0, 4), slice(5, 6)
    np.testing.assert_allclose(geometry.cropped_affine(affine, box) @ [1, 2, 0, 1], affine @ [4, 2, 5, 1])


def test_the_blur_makes_up_for_the_wider_voxels():
    """Gaussians of full width at half maximum: their squares add up, as 1 + blur = step."""
    blur = np.array(geometry.blur_for((0.5, 1.0, 2.0, 5.0)))
    np.testing.assert_allclose(1 + blur**2 * 8 * np.log(2), [1, 1, 4, 25])


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LIA", "SPR"])
@pytest.mark.parametrize("degrees", [0.0, 3.0, 20.0, 44.0])
def test_the_tilt_of_a_grid_is_that_of_its_nearest_axes(orientation, degrees):
    """Whatever the order, directions and lengths of its voxel axes."""
    affine = np.diag([0.0, 0, 0, 1])
    for column, (axis, sign) in enumerate(nib.orientations.axcodes2ornt(orientation)):
        affine[int(axis), column] = sign * (0.7, 1.0, 1.9)[column]
    turn = Rotation.from_rotvec(np.array([2, 2, 1]) / 3 * degrees, degrees=True).as_matrix()
    tilted = affine.copy()
    tilted[:3, :3] = turn @ affine[:3, :3]
    assert oblique_degrees(tilted) == pytest.approx(degrees, abs=1e-4)
    there = tilted[:3, :3] @ np.diag(1 / np.linalg.norm(affine[:3, :3], axis=0)) @ nearest_rotation(tilted)
    np.testing.assert_allclose(there, np.sign(affine[:3, :3]), atol=1e-9)
