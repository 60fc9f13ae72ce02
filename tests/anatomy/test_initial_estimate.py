"""The first guess: what it is exactly where that can be said, and that it never looks under the mask."""

import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy import initial_estimate as module
from ldm_lib.anatomy.initial_estimate import initial_estimate
from ldm_lib.data.synthetic_cohort import make_patient
from ldm_lib.inpainting.baselines import harmonic_fill

SHAPE = (40, 44, 36)
RNG = np.random.default_rng(0)
LABELS = (1 + np.digitize(ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 3), (-0.01, 0.01))).astype(np.uint8)
HOLE = np.zeros(SHAPE, bool)
HOLE[12:26, 14:30, 10:24] = True
UNKNOWN = np.zeros(SHAPE, np.uint8)


def smoothed(label, width_mm, spacing_mm=1.0):
    return ndimage.gaussian_filter((label == LABELS).astype(np.float32), width_mm / spacing_mm)


def test_what_the_labels_explain_is_found_wherever_it_is_not_seen(monkeypatch):
    monkeypatch.setattr(module, "TRUST", 1.0)
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    image = 0.2 + 0.5 * smoothed(2, 2.0) + 0.7 * smoothed(3, 4.0) - 0.1 * smoothed(1, 4.0)
    np.testing.assert_allclose(initial_estimate(image, HOLE, LABELS, spacing_mm=1.0), image, atol=2e-3)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_without_labels_it_is_the_harmonic_continuation(monkeypatch, trust):
    monkeypatch.setattr(module, "TRUST", trust)
    image = np.abs(ndimage.gaussian_filter(RNG.standard_normal(SHAPE), 2)).astype(np.float32) * 10
    found = initial_estimate(image, HOLE, UNKNOWN, spacing_mm=1.0)
    np.testing.assert_allclose(found, harmonic_fill(image, HOLE), atol=1e-3)


def test_what_is_linear_in_place_is_continued_as_it_is():
    x, y, z = np.indices(SHAPE)
    image = (1 + 0.02 * x - 0.01 * y + 0.005 * z).astype(np.float32)
    np.testing.assert_allclose(initial_estimate(image, HOLE, UNKNOWN, spacing_mm=1.0), image, atol=1e-3)


def test_nothing_under_the_mask_is_looked_at_and_nothing_outside_is_changed():
    image = (0.5 + 0.3 * smoothed(2, 1.0)).astype(np.float32)
    other = np.where(HOLE, RNG.random(SHAPE), image).astype(np.float32)
    found = initial_estimate(image, HOLE, LABELS, spacing_mm=1.0)
    np.testing.assert_array_equal(found, initial_estimate(other, HOLE, LABELS, spacing_mm=1.0))
    np.testing.assert_array_equal(found[~HOLE], image[~HOLE])
    assert found.dtype == np.float32 and found.min() >= 0


def test_the_unit_of_length_is_the_millimetre():
    """The same head in voxels half as wide."""
    image = (0.5 + 0.3 * smoothed(2, 2.0)).astype(np.float32)
    fine = [np.kron(volume, np.ones((2, 2, 2), volume.dtype)) for volume in (image, HOLE, LABELS)]
    found = initial_estimate(*fine, spacing_mm=0.5)
    coarse = found.reshape(*(n for size in SHAPE for n in (size, 2))).mean((1, 3, 5))
    assert np.abs(coarse - initial_estimate(image, HOLE, LABELS, spacing_mm=1.0))[HOLE].mean() < 0.01


@pytest.mark.parametrize("hole", [np.zeros(SHAPE, bool), np.ones(SHAPE, bool)])
def test_no_hole_and_nothing_but_hole(hole):
    image = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(initial_estimate(image, hole, LABELS, spacing_mm=1.0), np.where(hole, 0, image))


def test_a_brain_is_filled_better_than_by_its_edge_alone():
    phantom = make_patient(0, 3, spacing_mm=4.0, masks=2)
    image = phantom.t1n / np.percentile(phantom.t1n[phantom.t1n > 0], 99.5)
    for healthy, _ in phantom.masks:
        found, edge = initial_estimate(image, healthy, phantom.tissue, spacing_mm=4.0), harmonic_fill(image, healthy)
        errors = [float(np.square(guess - image)[healthy].mean()) for guess in (found, edge)]
        assert errors[0] < 0.8 * errors[1], errors
