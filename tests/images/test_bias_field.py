"""The bias field: a known one is recovered up to a factor, whatever else is in the scan."""

import numpy as np
from scipy import ndimage

from ldm_lib.images.bias_field import BEYOND, MIN_VOXELS, bias_field

SHAPE, MM = (40, 48, 32), (4.0, 4.0, 4.0)
X, Y, Z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
BALL, INNER = X**2 + Y**2 + Z**2 < 0.9, X**2 + Y**2 + Z**2 < 0.6
GAIN = np.exp(0.2 * X - 0.3 * Y**2 + 0.1 * X * Y * Z - 0.15 * Z + 0.2 * Z**3)  # of degree 3
WHITE = BALL & (np.sin(6 * X) + np.sin(7 * Y) + np.sin(5 * Z) > -0.5)
TISSUES = np.where(WHITE, 1.0, np.where(BALL, 0.6, 0.0)) * (1 + 0.03 * np.random.default_rng(0).standard_normal(SHAPE))


def deviation(found, expected):
    """Largest relative difference inside the brain between two fields, which are known up to a factor."""
    ratio = (found / expected)[INNER]
    return np.abs(ratio / np.exp(np.log(ratio).mean()) - 1).max()


def test_a_polynomial_gain_is_recovered():
    found = bias_field(TISSUES * GAIN, WHITE, spacing_mm=MM)
    assert deviation(found, GAIN) < 0.01
    assert found.dtype == np.float32 and found.shape == SHAPE and (found > 0).all()
    assert np.abs(np.log(found)[WHITE].mean()) < 0.02, "1 on average"


def test_it_does_not_depend_on_units_or_on_where_white_matter_is_darkened():
    """A lesion, and grey matter that an atlas calls white, are outliers."""
    found = bias_field(1000 * TISSUES * GAIN, WHITE, spacing_mm=MM)
    np.testing.assert_allclose(found, bias_field(TISSUES * GAIN, WHITE, spacing_mm=MM), rtol=1e-5)
    dark = TISSUES * GAIN * np.where((X - 0.3) ** 2 + Y**2 + Z**2 < 0.1, 0.6, 1)
    assert deviation(bias_field(dark, WHITE, spacing_mm=MM), GAIN) < 0.04
    misplaced = np.roll(WHITE, 1, axis=0) & BALL
    assert deviation(bias_field(TISSUES * GAIN, misplaced, spacing_mm=MM), GAIN) < 0.04


def test_without_a_bias_field_it_is_1_and_voxels_of_other_tissue_do_not_matter():
    np.testing.assert_allclose(bias_field(1.0 * BALL, WHITE, spacing_mm=MM), 1, rtol=1e-6)
    other = np.where(WHITE, TISSUES, 7.0)
    np.testing.assert_array_equal(bias_field(other, WHITE, spacing_mm=MM), bias_field(TISSUES, WHITE, spacing_mm=MM))


def test_it_is_constant_beyond_the_white_matter():
    """A polynomial would leave all bounds there."""
    found = bias_field(TISSUES * GAIN, WHITE & (np.abs(X) < 0.4), spacing_mm=MM)
    np.testing.assert_array_equal(found[0], found[8])
    assert (found[0] != found[20]).any()


def test_it_is_bounded_where_all_white_matter_is_in_an_oblique_plate():
    """As when a mask leaves one side of the brain: within the plate's bounding box a polynomial has no bound."""
    plate = WHITE & (np.abs(X + Y - 0.2 * Z) < 0.15)
    found = bias_field(TISSUES * GAIN, plate, spacing_mm=MM)
    least, largest = found[plate].min(), found[plate].max()
    assert found.min() > least * np.exp(-BEYOND) / 1.01 and found.max() < largest * np.exp(BEYOND) * 1.01
    assert found.max() > largest * 1.05, "a trend goes on a little further"


def test_voxels_at_the_border_of_white_matter_and_empty_ones_do_not_matter():
    border = WHITE & ~ndimage.binary_erosion(WHITE)
    image, expected = TISSUES * GAIN, bias_field(TISSUES * GAIN, WHITE, spacing_mm=MM)
    np.testing.assert_array_equal(bias_field(np.where(border, 0.8 * image, image), WHITE, spacing_mm=MM), expected)
    empty = WHITE & (np.random.default_rng(1).random(SHAPE) < 0.02)
    assert deviation(bias_field(np.where(empty, 0, image), WHITE, spacing_mm=MM), GAIN) < 0.01


def test_where_white_matter_is_lacking_it_is_1():
    """Voxels of its border do not count."""
    for white in (np.zeros(SHAPE, bool), BALL & (X**2 + Y**2 + Z**2 < 0.04)):
        assert ndimage.binary_erosion(white).sum() < MIN_VOXELS
        np.testing.assert_array_equal(bias_field(TISSUES * GAIN, white, spacing_mm=MM), np.ones(SHAPE, np.float32))
    enough = BALL & (X**2 + Y**2 + Z**2 < 0.06)
    assert ndimage.binary_erosion(enough).sum() > MIN_VOXELS
    assert (bias_field(TISSUES * GAIN, enough, spacing_mm=MM) != 1).any()


def test_voxels_of_other_sizes_give_the_same_field():
    fine = [np.repeat(array, 4, axis=0) for array in (TISSUES * GAIN, WHITE)]
    found = bias_field(*fine, spacing_mm=(1.0, 4.0, 4.0))
    assert deviation(found[1::4], GAIN) < 0.03
