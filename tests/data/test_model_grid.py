"""The conditioning tensor against a plain loop, and the resampling of a case to the model's grid and back."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.data.case import Case, CaseData
from ldm_lib.data.model_grid import (
    CONDITIONING_CHANNELS,
    GridCase,
    conditioning,
    grid_case,
    loss_mask,
    without_bias_field,
)
from ldm_lib.images.volume import Volume

SHAPE = (12, 8, 16)
FACTOR = 4
RNG = np.random.default_rng(0)
GROWTH = RNG.uniform(size=SHAPE).astype(np.float32)
TISSUE = RNG.integers(0, 4, SHAPE).astype(np.uint8)


def _block(index):
    return tuple(slice(i * FACTOR, (i + 1) * FACTOR) for i in index)


def _expected(pool, threshold):
    """Channel by channel and latent voxel by latent voxel, `pool` a function of the image voxels in it."""
    out = np.zeros((4, *(n // FACTOR for n in SHAPE)))
    for index in np.ndindex(*out.shape[1:]):
        growth, tissue = GROWTH[_block(index)], TISSUE[_block(index)]
        kept = np.array([g if g >= threshold else 0 for g in growth.ravel()]).reshape(growth.shape)
        out[(0, *index)] = pool(kept)
        for label in (1, 2, 3):
            out[(label, *index)] = pool(tissue == label)
    return out


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
@pytest.mark.parametrize(("pooling", "pool"), [("area", np.mean), ("nearest", lambda block: block[2, 2, 2])])
def test_conditioning_is_what_a_plain_loop_gives(pooling, pool, threshold):
    found = conditioning(GROWTH, TISSUE, factor=FACTOR, threshold=threshold, pooling=pooling)
    np.testing.assert_allclose(found, _expected(pool, threshold), atol=1e-6)
    assert found.dtype == np.float32


def test_the_default_keeps_growth_from_a_fifth_on_and_pools_by_area():
    found = conditioning(GROWTH, TISSUE, factor=FACTOR)
    np.testing.assert_allclose(found, _expected(np.mean, 0.2), atol=1e-6)
    edge = np.float32([0.19999, 0.2, 0.20001]).reshape(3, 1, 1)
    kept = conditioning(edge, np.zeros(edge.shape, np.uint8), factor=1)[0]
    np.testing.assert_array_equal(kept.ravel(), np.where([False, True, True], edge.ravel(), 0))


def test_channels_are_growth_then_csf_gm_wm():
    assert CONDITIONING_CHANNELS == ("growth", "CSF", "GM", "WM")
    labels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
    found = conditioning(np.zeros(labels.shape, np.float32), labels, factor=1)
    np.testing.assert_array_equal(found[:, :, 0, 0], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def _model_case(mask, unknown):
    empty = np.zeros(mask.shape, np.float32)
    return GridCase(voided=empty, target=empty, mask=mask, unknown=unknown, growth=empty, tissue=empty.astype("u1"))


@pytest.mark.parametrize("dilation", [0, 1])
def test_unknown_latent_voxels_leave_the_loss_and_no_others(dilation):
    mask, unknown = np.zeros((2, 32, 32, 32), bool)
    mask[9:22, 8:20, 12:20] = True
    unknown[9, 8, 12:14] = unknown[21, 19, 19] = True
    counted = loss_mask(_model_case(mask, unknown), FACTOR, dilation)
    every = loss_mask(_model_case(mask, unknown & False), FACTOR, dilation)
    assert {tuple(i) for i in np.argwhere(every & ~counted)} == {(2, 2, 3), (5, 4, 4)}
    assert not (counted & ~every).any()
    assert every.sum() == (4 * 3 * 2 if dilation == 0 else 6 * 5 * 4)


def _data(affine, shape, *, growth=True, unhealthy=True):
    """A case in memory: intensities with a few negatives, a mask with a healthy and an unhealthy half."""
    rng = np.random.default_rng(1)
    target = rng.uniform(-50, 900, shape).astype(np.float32)
    mask, right = np.zeros((2, *shape), bool)
    mask[3:9, 2:7, 4:11] = True
    right[6:] = True
    source = Volume(Path("t1n.nii"), np.where(mask, np.float32(0), target), b"", affine, 1.0, 0.0)
    return CaseData(
        case=Case("a", "a", "", None, Path("v"), Path("m"), None, None, None, None),
        source=source,
        voided=source.voxels,
        mask=mask,
        scale=640.0,
        target=target,
        healthy=mask & ~right,
        unhealthy=mask & right if unhealthy else None,
        growth=rng.uniform(size=shape).astype(np.float32) if growth else None,
        tissue=rng.integers(0, 4, shape).astype(np.uint8),
        warnings=(),
    )


AFFINES = {"LPS": np.diag([-1.0, -1, 1, 1]), "RAS": np.eye(4), "PSR": np.eye(4)[[2, 0, 1, 3]] * [[1], [-1], [1], [1]]}


@pytest.mark.parametrize("depth", [155, 156])
@pytest.mark.parametrize("orientation", AFFINES)
def test_the_whole_path_with_an_identity_as_autoencoder_returns_its_input(orientation, depth):
    data = _data(AFFINES[orientation], (13, 10, depth))
    assert data.source.orientation == orientation
    case, frame = grid_case(data, 8), data.frame(8)
    assert all(n % 8 == 0 for n in case.voided.shape)
    for found, original in (
        (case.voided * data.scale, np.maximum(data.voided, 0)),
        (case.target * data.scale, np.maximum(data.target, 0)),
    ):
        np.testing.assert_allclose(frame.to_file(found), original, rtol=1e-6)
    for found, original in ((case.mask, data.mask), (case.growth, data.growth), (case.tissue, data.tissue)):
        np.testing.assert_array_equal(frame.to_file(found), original)
        assert found.dtype == original.dtype


@pytest.mark.parametrize("orientation", ["RAS", "PSR"])
def test_a_case_stored_in_another_order_is_the_same_case(orientation):
    data = _data(AFFINES["LPS"], (13, 10, 15))
    here = nib.orientations.io_orientation(AFFINES["LPS"])
    turn = nib.orientations.ornt_transform(here, nib.orientations.axcodes2ornt(orientation))

    def stored(array):
        return nib.orientations.apply_orientation(array, turn)

    arrays = ("voided", "mask", "target", "healthy", "unhealthy", "growth", "tissue")
    source = replace(data.source, raw=stored(data.source.raw), affine=AFFINES[orientation])
    other = replace(data, source=source, **{name: stored(getattr(data, name)) for name in arrays})
    assert other.source.orientation == orientation
    assert other.source.orientation[other.source.lateral_axis] in "LR"
    one, two = grid_case(data, 8), grid_case(other, 8)
    for name in ("voided", "target", "mask", "unknown", "growth", "tissue"):
        np.testing.assert_array_equal(getattr(two, name), getattr(one, name), err_msg=name)


def test_voided_and_target_share_one_scale_and_air_is_zero():
    case = grid_case(_data(AFFINES["LPS"], (13, 10, 15)), 8)
    np.testing.assert_array_equal(case.voided[~case.mask], case.target[~case.mask])
    assert not case.voided[case.mask].any()
    assert case.target.min() == 0
    assert case.target.max() > 1, "nothing is clipped above"


def test_an_unhealthy_part_without_its_growth_map_is_unknown():
    shape, affine = (13, 10, 15), AFFINES["LPS"]
    data = _data(affine, shape, growth=False)
    case = grid_case(data, 1)
    np.testing.assert_array_equal(case.unknown, data.unhealthy)
    assert not case.growth.any()
    padded = grid_case(data, 4)
    assert loss_mask(padded, 4, 0).sum() < loss_mask(replace(padded, unknown=padded.mask & False), 4, 0).sum()
    assert not grid_case(_data(affine, shape), 1).unknown.any(), "with a growth map all is known"
    assert not grid_case(_data(affine, shape, growth=False, unhealthy=False), 1).unknown.any()


def test_missing_maps_and_targets_are_distinguished_from_empty_ones():
    data = replace(_data(AFFINES["LPS"], (13, 10, 15), growth=False), tissue=None, target=None)
    case = grid_case(data, 4)
    assert case.target is None
    assert case.tissue.dtype == np.uint8
    assert not case.tissue.any()
    assert not conditioning(case.growth, case.tissue, factor=4).any()


# ---- the bias field of a case


def _gained(gain, tissue=True):
    """A noisy head of two tissues times a gain, with a mask in its white matter."""
    shape, axes = (30, 36, 24), np.meshgrid(*[np.linspace(-1, 1, n) for n in (30, 36, 24)], indexing="ij")
    brain = sum(axis**2 for axis in axes) < 0.9
    labels = np.where(brain, np.where(np.abs(axes[0]) < 0.5, 3, 2), 0).astype(np.uint8)
    mask = np.zeros(shape, bool)
    mask[12:18, 10:20, 8:16] = True
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(shape)
    target = (100 * np.where(labels == 3, 1.0, 0.6) * noise * brain * np.exp(gain * axes[1])).astype(np.float32)
    data = _data(np.diag([-3.0, -3, 3, 1]), shape)
    return replace(
        data, target=target, voided=np.where(mask, 0, target).astype(np.float32), mask=mask, healthy=mask,
        unhealthy=None, growth=None, tissue=labels if tissue else None, scale=float(target.max()),
    )  # fmt: skip


@pytest.mark.parametrize(("tissue", "error"), [(True, 0.02), (False, 0.08)])
def test_a_case_without_its_bias_field_is_that_of_a_scan_without_one(tissue, error):
    """Without a tissue map, bright white matter is easier to find than dark one."""
    flat, field = without_bias_field(_gained(0.4, tissue))
    plain = _gained(0.0)
    found, expected = (case.target[plain.mask] / case.scale for case in (flat, plain))
    np.testing.assert_allclose(found, expected, rtol=error)
    np.testing.assert_allclose(flat.target * field, _gained(0.4).target, rtol=1e-5)
    assert not flat.voided[flat.mask].any()


def test_the_bias_field_does_not_depend_on_hidden_voxels_or_on_their_order():
    data = _gained(0.4)
    other = replace(data, target=np.where(data.mask, 7, data.target).astype(np.float32))
    (_, one), (_, two) = without_bias_field(data), without_bias_field(other)
    np.testing.assert_array_equal(one, two)
    turned = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(codes) for codes in ("LPS", "SRA")))
    source = replace(data.source, raw=nib.orientations.apply_orientation(data.source.raw, turned),
                     affine=data.affine @ nib.orientations.inv_ornt_aff(turned, data.mask.shape))  # fmt: skip
    names = ("voided", "target", "mask", "healthy", "tissue")
    arrays = {name: nib.orientations.apply_orientation(getattr(data, name), turned) for name in names}
    _, again = without_bias_field(replace(data, source=source, **arrays))
    np.testing.assert_array_equal(again, nib.orientations.apply_orientation(one, turned))


def test_the_bias_field_does_not_depend_on_the_lesion():
    data = _gained(0.4)
    unhealthy = np.zeros_like(data.mask)
    unhealthy[12:18, 20:28, 8:16] = True
    fields = [without_bias_field(replace(data, unhealthy=unhealthy, voided=data.voided * np.where(unhealthy, k, 1)))[1]
              for k in (1, 0.8)]  # fmt: skip
    np.testing.assert_array_equal(*fields)


def test_a_case_without_any_visible_brain_has_no_bias_field():
    data = _gained(0.4)
    empty = replace(data, voided=np.zeros_like(data.voided))
    flat, field = without_bias_field(empty)
    assert flat is empty and (field == 1).all()
