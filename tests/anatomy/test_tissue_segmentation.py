"""Laws of the tissue map: known classes are recovered, and voxels under the mask have no influence."""

import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy import registration, tissue_segmentation
from ldm_lib.anatomy.tissue_segmentation import mixture_labels, tissue_from_scan, tissue_weights
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


def test_the_mixture_recovers_three_tissues_in_any_unit(onion):
    labels, image = onion
    fractions = np.stack([(labels == k) for k in (1, 2, 3)]).astype(np.float32)
    blurred = ndimage.gaussian_filter(fractions, (0, 3, 3, 3))
    found = mixture_labels(image, blurred)
    assert min(tissue_dice(labels, found, labels > 0).values()) > 0.97
    np.testing.assert_array_equal(found, mixture_labels(1000 * image, blurred))


def test_position_separates_tissues_of_equal_intensity():
    """Two regions of one intensity are two tissues according to the atlas."""
    rng, shape = np.random.default_rng(0), (30, 20, 20)
    image = np.where(np.indices(shape)[0] < 20, 0.5, 0.9) + rng.normal(0, 0.03, shape)
    truth = np.select([np.indices(shape)[0] < 10, np.indices(shape)[0] < 20], [1, 2], 3)
    fractions = np.stack([np.where(truth == k, 0.8, 0.1) for k in (1, 2, 3)])
    assert (mixture_labels(image, fractions) == truth).mean() > 0.99


def test_weights_make_the_frequencies_agree():
    rng = np.random.default_rng(0)
    fractions = rng.dirichlet([2, 3, 4], 5000).T
    labels = rng.choice([1, 2, 3], 5000, p=[0.1, 0.6, 0.3])
    weights = tissue_weights(fractions, labels)
    found = np.bincount((fractions * weights[:, None]).argmax(0), minlength=3) / 5000
    np.testing.assert_allclose(found, np.bincount(labels, minlength=4)[1:] / 5000, atol=0.01)
    assert weights.max() == 1


def test_frequencies_that_agree_and_too_few_voxels_give_weights_of_one():
    fractions = np.random.default_rng(0).dirichlet([2, 3, 4], 3000).T
    np.testing.assert_allclose(tissue_weights(fractions, 1 + fractions.argmax(0)), 1, atol=1e-6)
    np.testing.assert_array_equal(tissue_weights(fractions[:, :99], np.ones(99, int)), 1)


@pytest.fixture(scope="module")
def data(cases):
    return load_case(cases[0])


def test_the_whole_brain_is_labelled_including_the_mask(data, made_tissue):
    labels = made_tissue.labels
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 3}
    visible = (data.voided != 0) & ~data.mask
    assert labels[visible].all() and not labels[~visible & ~data.mask].any()
    brain = data.mask & (data.tissue > 0)
    assert (labels[brain] > 0).mean() > 0.9
    assert tissue_dice(data.tissue, labels, visible)["mean"] > 0.7
    assert (labels[brain] == data.tissue[brain]).mean() > 0.5


@pytest.fixture(scope="module")
def scan(data):
    """Normalised image, affine and mask."""
    return data.voided / data.scale, data.source.affine, data.mask


@pytest.fixture(scope="module")
def plain(scan, fast_registration):
    with fast_registration():
        return tissue_from_scan(*scan)


@pytest.fixture
def hidden(plain, monkeypatch):
    """The masks that registrations are made without; each returns the registration of `plain`."""
    masks = []
    monkeypatch.setattr(
        tissue_segmentation, "register", lambda _, __, mask, **___: masks.append(mask) or plain.registration
    )
    return masks


def test_voxels_under_the_mask_have_no_influence(scan, plain, fast_registration):
    image, affine, mask = scan
    filled = np.where(mask, np.random.default_rng(0).uniform(0, 1, mask.shape), image).astype(np.float32)
    with fast_registration():
        np.testing.assert_array_equal(tissue_from_scan(filled, affine, mask).labels, plain.labels)


def test_a_lesion_is_labelled_from_the_atlas_like_the_mask(scan, hidden):
    image, affine, mask = scan
    lesion = ndimage.binary_dilation(mask, iterations=2) & ~mask & (image > 0)
    dark = np.where(lesion, 0.05, image).astype(np.float32)
    excluded, included = (tissue_from_scan(dark, affine, mask, lesion=given).labels for given in (lesion, None))
    assert (included[lesion] == 1).mean() > 0.95 > 0.9 > (excluded[lesion] == 1).mean()
    np.testing.assert_array_equal(hidden, [mask | lesion, mask])


def test_without_refinement_all_labels_are_the_atlass(scan, hidden):
    made = tissue_from_scan(*scan, refine="none")
    fractions = made.registration.to_patient(made.registration.atlas.fractions)
    labelled = (made.labels > 0) & fractions.any(0)
    np.testing.assert_array_equal(made.labels[labelled], 1 + fractions.argmax(0)[labelled])


def test_a_failed_registration_is_not_refined(scan, hidden, monkeypatch):
    monkeypatch.setattr(tissue_segmentation, "mixture_labels", lambda *_: pytest.fail("was refined"))
    monkeypatch.setattr(registration, "MIN_DICE", 1.01)
    assert tissue_from_scan(*scan).registration.failure


def test_other_refinements_are_rejected(data):
    for refine, removed in (("fast", ""), ("hmrf", r" \('hmrf' was removed in version 0.8\)")):
        with pytest.raises(ConfigError, match=f"refine: '{refine}' given, allowed are mixture, none{removed}"):
            tissue_from_scan(data.voided, data.source.affine, data.mask, refine=refine)


def test_a_lost_orientation_is_named_in_the_order_of_the_file(data, fast_registration):
    """The file is LPS and states RAS; inside, it is reordered to LPS by what it states."""
    with fast_registration():
        lost = tissue_from_scan(data.voided / data.scale, np.diag([8.0, 8, 8, 1]), data.mask).registration
        right = tissue_from_scan(data.voided / data.scale, data.affine, data.mask).registration
    assert "it fits better as LPS than as stated, RAS (" in lost.failure and not right.better_orientation
    assert lost.failure.endswith("--assume-orientation LPS")
