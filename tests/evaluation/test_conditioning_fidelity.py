"""Closed forms of conditioning fidelity."""

import numpy as np
import pytest
from scipy.stats import norm

from ldm_lib.evaluation.conditioning_fidelity import (
    agreement,
    class_shift,
    growth_response,
    tissue_by_intensity,
    tissue_dice,
)

MEANS, STDS = np.array([0, 0.3, 0.6, 0.9]), np.array([0, 0.1, 0.05, 0.03])


@pytest.fixture
def scene():
    """Labels (20 cubed), an image drawn from them, and a mask in the middle."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (20, 20, 20)).astype(np.uint8)
    image = np.where(labels, rng.normal(MEANS[labels], STDS[labels]), 0)
    mask = np.zeros(labels.shape, bool)
    mask[5:15, 5:15, 5:15] = True
    return labels, image, mask


def test_the_most_likely_tissue_is_found(scene):
    labels, image, mask = scene
    found = tissue_by_intensity(image, labels, mask)
    seen = [image[(labels == k) & ~mask] for k in (1, 2, 3)]
    likelihood = np.stack([norm.logpdf(image[mask], s.mean(), s.std()) for s in seen])
    np.testing.assert_array_equal(found[mask], np.where(image[mask] != 0, 1 + likelihood.argmax(0), 0))
    assert not found[~mask].any()


def test_dice_is_counted(scene):
    labels, _, mask = scene
    other = np.random.default_rng(2).integers(0, 4, labels.shape)
    dice = tissue_dice(labels, other, mask)
    for k, name in ((1, "CSF"), (2, "GM"), (3, "WM")):
        a, b = set(np.flatnonzero((labels == k) & mask)), set(np.flatnonzero((other == k) & mask))
        assert dice[name] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    assert dice["mean"] == pytest.approx(np.mean([dice[n] for n in ("CSF", "GM", "WM")]))
    assert tissue_dice(labels, labels, mask) == {"CSF": 1, "GM": 1, "WM": 1, "mean": 1}


def test_a_tissue_in_neither_map_has_no_dice(scene):
    labels, _, mask = scene
    dice = tissue_dice(np.where(labels == 1, 2, labels), np.where(labels == 1, 3, labels), mask)
    assert np.isnan(dice["CSF"]) and dice["mean"] == pytest.approx((dice["GM"] + dice["WM"]) / 2)
    assert np.isnan(tissue_dice(0 * labels, 0 * labels, mask)["mean"])


def test_the_response_is_the_difference_of_means(scene):
    _, _, mask = scene
    growth = np.where(np.indices(mask.shape)[0] < 10, 0.2, 0.19)
    volume = np.where(growth >= 0.2, 3.0, 5.0)
    volume[6, 6, 6] = 0  # air does not count
    assert growth_response(volume, growth, mask, threshold=0.2) == {"inside": 3, "outside": 5, "difference": -2}
    assert np.isnan(growth_response(volume, 0 * growth, mask, threshold=0.2)["difference"])


def test_a_shift_is_in_standard_deviations(scene):
    labels, image, mask = scene
    moved = np.where(mask & (labels > 0), image + 0.2, image)
    shifts, still = (class_shift(v, labels, ~mask, mask) for v in (moved, image))
    for k, name in ((1, "CSF"), (2, "GM"), (3, "WM")):
        std = image[(labels == k) & ~mask].std()
        assert shifts[name] - still[name] == pytest.approx(0.2 / std, rel=1e-6)
        assert abs(still[name]) < 0.2
    assert set(class_shift(image, np.where(labels == 3, 0, labels), ~mask, mask)) == {"CSF", "GM"}


def test_a_map_of_the_hidden_image_agrees_and_a_blind_one_does_not(scene):
    labels, image, mask = scene
    blind = np.random.default_rng(3).integers(1, 4, labels.shape)
    assert agreement(tissue_by_intensity(image, labels, mask), image, labels, mask) == 1
    assert agreement(labels, image, labels, mask) > 0.95
    assert agreement(blind, image, labels, mask) == pytest.approx(1 / 3, abs=0.06)


def test_labels_in_the_mask_are_not_used(scene):
    labels, image, mask = scene
    other = np.where(mask, np.random.default_rng(1).integers(0, 4, mask.shape), labels)
    np.testing.assert_array_equal(tissue_by_intensity(image, other, mask), tissue_by_intensity(image, labels, mask))


def test_a_tissue_that_is_not_seen_outside_is_never_assigned(scene):
    labels, image, mask = scene
    without = np.where(labels == 2, 0, labels)
    assert set(np.unique(tissue_by_intensity(image, without, mask))) == {0, 1, 3}
