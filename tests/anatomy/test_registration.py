"""Laws of the registration around a hole: it never looks inside, minds no voxel order, and knows its failures."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from dipy.align.imwarp import DiffeomorphicMap, SymmetricDiffeomorphicRegistration
from dipy.align.metrics import CCMetric
from scipy import ndimage

from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.registration import LEAST_CORRELATION, LEAST_DICE, HoledCorrelation, register
from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


@pytest.fixture(scope="module")
def patient(data):
    """A patient of about 1 at the brightest, unvoided, with its grid and hole."""
    return data.target / data.scale, data.source.affine, data.mask


@pytest.fixture(scope="module")
def fit(patient, fast_registration):
    with fast_registration():
        return register(*patient)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def tissue_dice(shares, brain, truth):
    found = np.where(brain, 1 + shares.argmax(0), 0)
    return np.array([dice(found == k, truth == k) for k in (1, 2, 3)])


# ---- no peeking


@pytest.mark.parametrize("under", ["void", "noise", "what is not finite"])
def test_what_lies_under_the_hole_changes_nothing(patient, fit, fast_registration, under):
    image, affine, hole = patient
    image = image.copy()
    image[hole] = {"void": 0, "noise": np.random.default_rng(0).uniform(-9, 9, hole.sum())}.get(under, np.nan)
    with fast_registration():
        again = register(image, affine, hole)
    for field in ("forward", "backward", "prealign"):
        np.testing.assert_array_equal(getattr(again.mapping, field), getattr(fit.mapping, field))
    assert (again.brain_dice, again.correlation) == (fit.brain_dice, fit.correlation)


def test_the_input_is_left_alone(patient, fast_registration):
    before = [array.copy() for array in patient]
    with fast_registration():
        register(*patient)
    for array, kept in zip(patient, before, strict=True):
        np.testing.assert_array_equal(array, kept)


# ---- any order of voxels


@pytest.mark.parametrize("orientation", ["RAS", "SLA"])
def test_the_order_of_the_voxels_does_not_matter(patient, fit, fast_registration, orientation):
    image, affine, hole = patient
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", orientation)))
    back = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, (orientation, "LPS")))
    turned = nib.Nifti1Image(image, affine).as_reoriented(turn)
    assert "".join(nib.aff2axcodes(turned.affine)) == orientation != "".join(nib.aff2axcodes(affine))
    with fast_registration():
        other = register(np.asarray(turned.dataobj), turned.affine, nib.orientations.apply_orientation(hole, turn) > 0)
    shares, brain = (
        nib.orientations.apply_orientation(v, back) for v in (other.carry(mni152().shares[2]), other.brain)
    )
    expected = fit.carry(mni152().shares[2])
    assert np.abs(shares - expected).mean() < 0.01 * np.abs(expected).mean()
    assert (brain != fit.brain).mean() < 1e-3


# ---- what it is good for


def test_it_lays_the_atlas_on_the_patient_far_better_than_centres_of_mass(data, made_tissue):
    """Under the hole as well, of which it saw nothing."""
    found, atlas, truth = made_tissue.registration, mni152(), data.tissue
    image = np.where(data.mask, 0, data.voided)
    centres = [a @ [*ndimage.center_of_mass(v), 1] for v, a in ((atlas.t1, atlas.affine), (image, data.source.affine))]
    moved = data.source.affine.copy()
    moved[:3, 3] += (centres[0] - centres[1])[:3]
    to_atlas = np.linalg.solve(atlas.affine, moved)
    laid = [ndimage.affine_transform(np.float32(v), to_atlas, output_shape=truth.shape, order=1)
            for v in (atlas.brain, *atlas.shares)]  # fmt: skip
    brain, shares = laid[0] > 0.5, np.stack(laid[1:])
    assert dice(found.brain, truth > 0) > 0.96 > 0.92 > dice(brain, truth > 0)
    ours, theirs = tissue_dice(found.carry(atlas.shares), found.brain, truth), tissue_dice(shares, brain, truth)
    assert (ours > theirs + 0.05).all(), (ours, theirs)
    assert dice(found.brain & data.mask, (truth > 0) & data.mask) > 0.9


def test_its_figures_are_those_of_both_brains_outside_the_hole(data, made_tissue):
    found, outside = made_tissue.registration, ~data.mask
    ours, theirs = (data.voided != 0)[outside], found.brain[outside]
    assert found.brain_dice == pytest.approx(dice(ours, theirs))
    both = (data.voided != 0) & found.brain & outside
    image = np.clip(data.voided / data.scale, 0, 1.2)
    expected = np.corrcoef(image[both], found.carry(mni152().t1)[both])[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-6)
    assert found.flaw == "" and found.brain_dice > LEAST_DICE and found.correlation > LEAST_CORRELATION


def test_carrying_is_linear_and_carries_several_as_each(fit):
    one, two = mni152().t1, mni152().shares[1]
    together = fit.carry(np.stack([one, two, 2 * one - two]))
    np.testing.assert_array_equal(together[0], fit.carry(one))
    np.testing.assert_allclose(together[2], 2 * together[0] - together[1], atol=1e-5)


# ---- failures that it knows


def flawed(image, affine, hole):
    found = register(image, affine, hole)
    assert found.flaw == (
        f"brains overlap by Dice {found.brain_dice:.3f} (at least 0.9), "
        f"intensities correlate by {found.correlation:.2f} (at least 0.5)"
    )
    return found


def test_a_head_turned_upside_down_by_its_affine_is_found_out(patient):
    image, affine, hole = patient
    centre = affine @ [*((np.array(image.shape) - 1) / 2), 1]
    turn = np.diag([1.0, -1, -1, 1])
    turn[:3, 3] = centre[:3] - turn[:3, :3] @ centre[:3]
    assert flawed(image, turn @ affine, hole).correlation < LEAST_CORRELATION


def test_noise_in_the_shape_of_a_brain_is_found_out(patient):
    image, affine, hole = patient
    noise = np.where(image > 0, np.random.default_rng(0).uniform(0.2, 1, image.shape), 0)
    found = flawed(noise, affine, hole)
    assert found.brain_dice > LEAST_DICE and found.correlation < LEAST_CORRELATION


@pytest.mark.parametrize("wrong", ["brain_dice", "correlation"])
def test_either_number_alone_is_a_flaw(fit, wrong):
    """And so is one that is not a number."""
    for value in (0.3, np.nan):
        broken = replace(fit)
        broken.__dict__.update({"brain_dice": 0.95, "correlation": 0.8, wrong: value})
        assert f"{value:.2f}" in broken.flaw
    sound = replace(fit)
    sound.__dict__.update(brain_dice=LEAST_DICE, correlation=LEAST_CORRELATION)
    assert sound.flaw == ""


def test_too_few_voxels_are_refused(fast_registration):
    with fast_registration(), pytest.raises(InputError, match="registration: the atlas cannot be brought to it"):
        register(np.ones((4, 4, 4)), np.diag([8.0, 8, 8, 1]), np.zeros((4, 4, 4), bool))


# ---- the metric


def textured(seed, shape=(16, 18, 14)):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5).astype(np.float32) * 5 + 2


def stepped(metric, static, moving):
    """A metric after the first half of one iteration of SyN, and its two steps."""
    for put, image in ((metric.set_static_image, static), (metric.set_moving_image, moving)):
        put(image, np.eye(4), np.ones(3), np.eye(4))
    metric.initialize_iteration()
    return np.array(metric.factors), metric.compute_forward(), metric.compute_backward()


@pytest.fixture
def hole():
    mask = np.zeros((16, 18, 14), np.float32)
    mask[5:10, 6:12, 4:9] = 1
    return mask


def test_without_a_hole_it_is_dipys_correlation():
    static, moving = textured(0), textured(1)
    ours = stepped(HoledCorrelation(np.zeros(static.shape, np.float32)), static, moving)
    for found, oracle in zip(ours, stepped(CCMetric(3, radius=4), static, moving), strict=True):
        np.testing.assert_array_equal(found, oracle)
        assert np.abs(oracle).max() > 0


def test_without_a_hole_a_whole_registration_is_dipys():
    static, moving = textured(0, (24, 24, 24)), textured(1, (24, 24, 24))
    maps = [
        SymmetricDiffeomorphicRegistration(metric, level_iters=[2, 2]).optimize(static, moving)
        for metric in (HoledCorrelation(np.zeros(static.shape, np.float32)), CCMetric(3, radius=4))
    ]
    np.testing.assert_array_equal(maps[0].forward, maps[1].forward)
    assert np.abs(maps[1].forward).max() > 0.1


def test_the_hole_pulls_at_nothing_and_its_content_changes_nothing(hole):
    static, moving = textured(0), textured(1)
    found = stepped(HoledCorrelation(hole), static, moving)
    assert not found[0][hole > 0].any() and found[0][hole == 0].any()
    void = stepped(HoledCorrelation(hole), np.where(hole, 0, static), moving)
    for one, other in zip(found, void, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("gain", "shift"), [(1.0, 0.0), (3.0, 1.0)])
def test_two_images_that_agree_outside_the_hole_stay_where_they_are(hole, gain, shift):
    """In any contrast; the wall that dipy's own metric sees there would pull at them."""
    moving = textured(0)
    static = np.where(hole, 0, gain * moving + shift).astype(np.float32)
    _, *ours = stepped(HoledCorrelation(hole), static, moving)
    _, *dipys = stepped(CCMetric(3, radius=4), static, moving)
    for step, pulled in zip(ours, dipys, strict=True):
        assert np.abs(step).max() < 1e-3 * np.abs(pulled).max()


def test_the_hole_moves_with_the_image(hole):
    """Its factors are 0 where the image's hole has come to lie, and not far beyond."""
    static, moving = textured(0), textured(1)
    map_ = DiffeomorphicMap(3, hole.shape, disp_grid2world=np.eye(4), domain_shape=hole.shape,
                            domain_grid2world=np.eye(4), codomain_shape=hole.shape,
                            codomain_grid2world=np.eye(4))  # fmt: skip
    map_.allocate()
    map_.forward[..., 0] = 2.0  # looks 2 voxels ahead: what is seen moves 2 back
    metric = HoledCorrelation(hole)
    metric.set_static_image(static, np.eye(4), np.ones(3), np.eye(4))
    metric.use_static_image_dynamics(static, map_)
    factors = stepped(metric, static, moving)[0]
    np.testing.assert_array_equal((factors == 0).all(-1), np.roll(hole, -2, axis=0) > 0)
