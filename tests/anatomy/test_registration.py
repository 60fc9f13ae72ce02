"""Registration of a masked scan: voxels under the mask are not read, voxel order is irrelevant, failures are found."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy import registration
from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.registration import MIN_CORRELATION, MIN_DICE, register
from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


@pytest.fixture(scope="module")
def patient(data):
    """A patient of about 1 at the brightest, not voided, with its grid and mask."""
    return data.target / data.scale, data.source.affine, data.mask


@pytest.fixture(scope="module")
def fit(patient, fast_registration):
    with fast_registration():
        return register(*patient)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def tissue_dice(fractions, brain, truth):
    found = np.where(brain, 1 + fractions.argmax(0), 0)
    return np.array([dice(found == k, truth == k) for k in (1, 2, 3)])


# ---- nothing under the mask is read, and any order of voxels will do


def test_voxels_under_the_mask_change_nothing_and_the_input_is_not_changed(patient, fit, fast_registration):
    image, affine, mask = patient
    image = image.copy()
    image[mask] = np.where(np.arange(mask.sum()) % 2, np.nan, np.random.default_rng(0).uniform(-9, 9, mask.sum()))
    given = image.copy(), affine.copy(), mask.copy()
    with fast_registration():
        again = register(*given)
    for field in ("displacement", "start"):
        np.testing.assert_array_equal(getattr(again, field), getattr(fit, field))
    assert (again.brain_dice, again.correlation) == (fit.brain_dice, fit.correlation)
    for array, kept in zip(given, (image, affine, mask), strict=True):
        np.testing.assert_array_equal(array, kept)


def test_the_order_of_the_voxels_does_not_matter(patient, fit, fast_registration):
    image, affine, mask = patient
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", "SLA")))
    back = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("SLA", "LPS")))
    turned = nib.Nifti1Image(image, affine).as_reoriented(turn)
    with fast_registration():
        other = register(np.asarray(turned.dataobj), turned.affine, nib.orientations.apply_orientation(mask, turn) > 0)
    fractions, brain = (
        nib.orientations.apply_orientation(v, back) for v in (other.to_patient(mni152().fractions[2]), other.brain)
    )
    expected = fit.to_patient(mni152().fractions[2])
    assert np.abs(fractions - expected).mean() < 0.01 * np.abs(expected).mean()
    assert (brain != fit.brain).mean() < 1e-3


# ---- accuracy


def test_registration_is_far_better_than_aligned_centres_of_mass(data, made_tissue):
    """Under the mask as well, which is not read."""
    found, atlas, truth = made_tissue.registration, mni152(), data.tissue
    image = np.where(data.mask, 0, data.voided)
    centres = [a @ [*ndimage.center_of_mass(v), 1] for v, a in ((atlas.t1, atlas.affine), (image, data.source.affine))]
    translated = data.source.affine.copy()
    translated[:3, 3] += (centres[0] - centres[1])[:3]
    to_atlas = np.linalg.solve(atlas.affine, translated)
    shifted = [ndimage.affine_transform(np.float32(v), to_atlas, output_shape=truth.shape, order=1)
            for v in (atlas.brain, *atlas.fractions)]  # fmt: skip
    brain, fractions = shifted[0] > 0.5, np.stack(shifted[1:])
    assert dice(found.brain, truth > 0) > 0.96 > 0.92 > dice(brain, truth > 0)
    registered, centred = (tissue_dice(f, b, truth) for f, b in (
        (found.to_patient(atlas.fractions), found.brain), (fractions, brain)))  # fmt: skip
    assert (registered > centred + 0.05).all(), (registered, centred)
    assert dice(found.brain & data.mask, (truth > 0) & data.mask) > 0.9


def test_dice_and_correlation_are_those_of_both_brains_outside_the_mask(data, made_tissue):
    found, outside = made_tissue.registration, ~data.mask
    patient, atlas = (data.voided != 0)[outside], found.brain[outside]
    assert found.brain_dice == pytest.approx(dice(patient, atlas))
    both = (data.voided != 0) & found.brain & outside
    image = np.clip(data.voided / data.scale, 0, 1.2)
    expected = np.corrcoef(image[both], found.to_patient(mni152().t1)[both])[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-6)
    assert found.failure == "" and found.brain_dice > MIN_DICE and found.correlation > MIN_CORRELATION


def test_resampling_is_linear_and_several_volumes_equal_each(fit):
    one, two = mni152().t1, mni152().fractions[1]
    together = fit.to_patient(np.stack([one, two, 2 * one - two]))
    np.testing.assert_array_equal(together[0], fit.to_patient(one))
    np.testing.assert_allclose(together[2], 2 * together[0] - together[1], atol=1e-5)


# ---- failures are found


def test_a_head_turned_upside_down_by_its_affine_fails(patient, fast_registration):
    image, affine, mask = patient
    centre = affine @ [*((np.array(image.shape) - 1) / 2), 1]
    turn = np.diag([1.0, -1, -1, 1])
    turn[:3, 3] = centre[:3] - turn[:3, :3] @ centre[:3]
    with fast_registration():
        found = register(image, turn @ affine, mask)
    assert found.correlation < MIN_CORRELATION and "better as LPS than as stated, LAI (corr" in found.failure
    assert replace(found, better_orientation="").failure == (
        f"brains overlap by Dice {found.brain_dice:.3f} (at least 0.9), "
        f"intensities correlate by {found.correlation:.2f} (at least 0.5)"
    )


LPS, RAS = np.diag([-1.0, -1, 1, 1]), np.eye(4)


def head(codes, missing=False):
    """The atlas's head at 8 mm, stored in the voxel order of `codes`, and its stated affine; half of it masked."""
    atlas = mni152()
    image, mask, affine = registration._downsampled(atlas.t1, np.zeros(atlas.t1.shape, bool), atlas.affine, 8.0)
    mask[: len(mask) // 2 - 1] = missing & (image[: len(mask) // 2 - 1] > 0)
    stored = nib.Nifti1Image(np.where(mask, 0, image), affine)
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", codes)))
    stored = stored.as_reoriented(turn)
    mask = nib.orientations.apply_orientation(mask, turn)
    return np.asarray(stored.dataobj), mask, stored.affine


@pytest.mark.parametrize(("codes", "stated"), [("LPS", "RAS"), ("PSR", "LPS")])
@pytest.mark.parametrize("missing", [False, True])
def test_a_lost_orientation_is_named_and_one_that_is_right_is_not(codes, stated, missing):
    """Brain and mirror image look alike, so that the handedness of what is stated is kept."""
    image, mask, affine = head(codes, missing)
    moving = head("RAS")
    assert registration._better_orientation((image, mask, affine), moving, stated=affine) == ""
    wrong = np.diag([8.0, 8, 8, 1]) @ {"RAS": RAS, "LPS": LPS}[stated]
    found = registration._better_orientation((image, mask, wrong), moving, stated=wrong)
    proper = np.linalg.det(affine[:3, :3]) * np.linalg.det(wrong[:3, :3]) > 0
    named = codes if proper else codes.translate(str.maketrans("LR", "RL"))
    assert f"fits better as {named} than as stated, {stated} " in found
    assert found.endswith(f"--assume-orientation {named}")


def test_the_atlas_keeps_its_size_and_place_when_two_fifths_of_the_brain_are_missing():
    """The scan is the atlas itself, so that the right affine map is the identity."""
    atlas = mni152()
    places = np.argwhere(atlas.brain)
    mask = atlas.brain & (np.indices(atlas.brain.shape)[1] > np.quantile(places[:, 1], 0.6))
    scan = registration._downsampled(np.where(mask, 0, atlas.t1), mask, atlas.affine, registration.AFFINE_MM)
    found = registration._affine(scan, head("RAS"))
    points = np.c_[places[::997], np.ones(len(places[::997]))] @ atlas.affine.T
    apart_mm = np.linalg.norm((points @ found.T - points)[:, :3], axis=1)
    assert np.sqrt(np.mean(apart_mm**2)) < 2, "25 mm when it started from centres of intensity"


def test_noise_in_the_shape_of_a_brain_fails(patient, fast_registration):
    image, affine, mask = patient
    noise = np.where(image > 0, np.random.default_rng(0).uniform(0.2, 1, image.shape), 0)
    with fast_registration():
        found = register(noise, affine, mask)
    assert found.failure and found.brain_dice > MIN_DICE and found.correlation < MIN_CORRELATION


@pytest.mark.parametrize("wrong", ["brain_dice", "correlation"])
def test_either_number_alone_is_a_failure(fit, wrong):
    """NaN is a failure, too."""
    for value in (0.3, np.nan):
        broken = replace(fit)
        broken.__dict__.update({"brain_dice": 0.95, "correlation": 0.8, wrong: value})
        assert f"{value:.2f}" in broken.failure
    good = replace(fit)
    good.__dict__.update(brain_dice=MIN_DICE, correlation=MIN_CORRELATION)
    assert good.failure == ""


def test_too_few_voxels_are_rejected(fast_registration):
    with fast_registration(), pytest.raises(InputError, match="registration: the atlas cannot be registered to it"):
        register(np.ones((4, 4, 4)), np.diag([8.0, 8, 8, 1]), np.zeros((4, 4, 4), bool))
