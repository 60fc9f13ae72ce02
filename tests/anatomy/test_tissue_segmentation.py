"""Laws of the tissue map: classes that are known come back, and what lies under the hole decides nothing."""

import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy import tissue_segmentation
from ldm_lib.anatomy.tissue_segmentation import by_mixture, class_weights, segment, tissue_from_scan
from ldm_lib.data.case import load_case
from ldm_lib.errors import ConfigError
from ldm_lib.evaluation.conditioning_fidelity import tissue_dice


@pytest.fixture(scope="module")
def onion():
    """Labels of three shells in air, and an image of them: CSF dark, GM between, WM bright, with noise."""
    x, y, z = np.indices((40, 44, 36)) - np.array([20, 22, 18]).reshape(3, 1, 1, 1)
    radius = np.sqrt(x**2 + y**2 + z**2)
    labels = np.select([radius < 9, radius < 13, radius < 17], [3, 2, 1], 0).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 0.04, labels.shape)
    return labels, np.where(labels, np.array([0, 0.35, 0.65, 0.95])[labels] + noise, 0)


@pytest.mark.parametrize("scale", [1.0, 1700.0])
def test_intensities_alone_find_three_tissues_from_dark_to_bright(onion, scale):
    """No voxel is as dark as air here, where dipy's own start has a class without variance and returns NaN."""
    labels, image = onion
    found = segment(image * scale)
    assert min(tissue_dice(labels, found, labels > 0).values()) > 0.95
    np.testing.assert_array_equal(found > 0, image != 0)
    np.testing.assert_array_equal(found, segment(image * scale))


def test_the_mixture_with_equal_shares_is_a_mixture_of_gaussians(onion):
    labels, image = onion
    shares = np.stack([(labels == k) for k in (1, 2, 3)]).astype(np.float32)
    blurred = ndimage.gaussian_filter(shares, (0, 3, 3, 3))
    found = by_mixture(image, blurred)
    assert min(tissue_dice(labels, found, labels > 0).values()) > 0.97
    np.testing.assert_array_equal(found, by_mixture(1000 * image, blurred))


def test_place_tells_apart_what_looks_alike():
    """Two balls of one intensity are two tissues where the atlas says so; intensities alone cannot tell."""
    rng, shape = np.random.default_rng(0), (30, 20, 20)
    image = np.where(np.indices(shape)[0] < 20, 0.5, 0.9) + rng.normal(0, 0.03, shape)
    truth = np.select([np.indices(shape)[0] < 10, np.indices(shape)[0] < 20], [1, 2], 3)
    shares = np.stack([np.where(truth == k, 0.8, 0.1) for k in (1, 2, 3)])
    assert (by_mixture(image, shares) == truth).mean() > 0.99
    assert (segment(image) == truth).mean() < 0.9


def test_weights_make_the_counts_agree():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([2, 3, 4], 5000).T
    labels = rng.choice([1, 2, 3], 5000, p=[0.1, 0.6, 0.3])
    weights = class_weights(shares, labels)
    found = np.bincount((shares * weights[:, None]).argmax(0), minlength=3) / 5000
    np.testing.assert_allclose(found, np.bincount(labels, minlength=4)[1:] / 5000, atol=0.01)
    assert weights.max() == 1


def test_counts_that_agree_already_and_too_few_voxels_change_nothing():
    shares = np.random.default_rng(0).dirichlet([2, 3, 4], 3000).T
    np.testing.assert_allclose(class_weights(shares, 1 + shares.argmax(0)), 1, atol=1e-6)
    np.testing.assert_array_equal(class_weights(shares[:, :99], np.ones(99, int)), 1)


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


def test_the_whole_brain_is_labelled_the_hole_included(data, made_tissue):
    labels = made_tissue.labels
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 3}
    seen = (data.voided != 0) & ~data.mask
    assert labels[seen].all() and not labels[~seen & ~data.mask].any()
    brain = data.mask & (data.tissue > 0)
    assert (labels[brain] > 0).mean() > 0.9
    assert tissue_dice(data.tissue, labels, seen)["mean"] > 0.7
    assert (labels[brain] == data.tissue[brain]).mean() > 0.5


def test_what_lies_under_the_mask_decides_nothing(data, fast_registration):
    image, affine, mask = data.voided / data.scale, data.source.affine, data.mask
    filled = np.where(mask, np.random.default_rng(0).uniform(0, 1, mask.shape), image).astype(np.float32)
    with fast_registration():
        ours, theirs = (tissue_from_scan(v, affine, mask).labels for v in (image, filled))
    np.testing.assert_array_equal(ours, theirs)


def test_a_lesion_is_labelled_from_the_atlas_like_the_hole(data, fast_registration):
    image, affine = data.voided / data.scale, data.source.affine
    lesion = ndimage.binary_dilation(data.mask, iterations=2) & ~data.mask & (image > 0)
    dark = np.where(lesion, 0.05, image).astype(np.float32)
    with fast_registration():
        known, taken_for_tissue = (tissue_from_scan(dark, affine, data.mask, lesion=k).labels for k in (lesion, None))
    assert (taken_for_tissue[lesion] == 1).mean() > 0.95 > 0.9 > (known[lesion] == 1).mean()


def test_without_refinement_the_atlas_decides_everywhere(data, fast_registration):
    with fast_registration():
        made = tissue_from_scan(data.voided / data.scale, data.source.affine, data.mask, refine="none")
    shares = made.registration.carry(made.registration.atlas.shares)
    told = (made.labels > 0) & shares.any(0)
    np.testing.assert_array_equal(made.labels[told], 1 + shares.argmax(0)[told])


def test_a_failed_registration_is_not_refined(data, fast_registration, monkeypatch):
    monkeypatch.setattr(tissue_segmentation, "by_mixture", lambda *_: pytest.fail("was refined"))
    noise = np.where(data.voided > 0, np.random.default_rng(0).uniform(0.2, 1, data.mask.shape), 0)
    with fast_registration():
        assert tissue_from_scan(noise, data.source.affine, data.mask).registration.flaw


def test_another_refinement_is_refused(data):
    with pytest.raises(ConfigError, match="refine: 'fast' given, allowed are mixture, hmrf, none"):
        tissue_from_scan(data.voided, data.source.affine, data.mask, refine="fast")
