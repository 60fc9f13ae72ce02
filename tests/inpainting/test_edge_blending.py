"""Laws of the correction at the mask's edge: none where nothing is wrong, closed forms, and reach."""

import numpy as np
import pytest

from ldm_lib.inpainting.edge_blending import EdgeCorrection, rim


def corrected(decoded, known, mask, reach_vox):
    return EdgeCorrection(mask, reach_vox=reach_vox)(decoded, known)


@pytest.fixture
def ball():
    return np.square(np.indices((25, 25, 25)) - 12).sum(axis=0) < 64


def test_nothing_is_added_where_the_decoder_is_right_around_the_mask(ball):
    known = np.random.default_rng(0).random(ball.shape)
    decoded = np.where(rim(ball) & ~ball, known, 7)
    assert not corrected(decoded, known, ball, 4.0).any()


def test_without_fading_a_linear_error_is_taken_away_everywhere(ball):
    """Linear functions are harmonic, so that the whole error is known from the edge."""
    x, y, z = np.indices(ball.shape)
    error = 2 + 0.3 * x - 0.2 * y + 0.1 * z
    found = corrected(np.zeros(ball.shape), error, ball, 1e6)
    np.testing.assert_allclose(found, error[ball], rtol=2e-3)


@pytest.mark.parametrize("reach", [1.5, 4.0])
def test_from_a_flat_edge_it_fades_as_the_screened_equation_says(reach):
    """A slab as wide as the volume: r(d) = sinh(k (L - d)) / sinh(k L) with 2 cosh k - 2 = 1 / reach^2 on a grid."""
    mask = np.zeros((6, 5, 40), bool)
    mask[:, :, 5:35] = True
    known = np.zeros(mask.shape)
    known[:, :, 4] = 3.0
    found = np.zeros(mask.shape)
    found[mask] = corrected(np.zeros(mask.shape), known, mask, reach)
    k = np.arccosh(1 + 1 / (2 * reach**2))
    depth = np.arange(1, 31)
    np.testing.assert_allclose(found[2, 2, 5:35], 3 * np.sinh(k * (31 - depth)) / np.sinh(31 * k), atol=3e-3)
    np.testing.assert_allclose(found, np.broadcast_to(found[2:3, 2:3], mask.shape), atol=1e-3)


def test_only_the_rim_is_looked_at(ball):
    rng = np.random.default_rng(2)
    known, decoded = rng.random(ball.shape), rng.random(ball.shape)
    around = rim(ball) & ~ball
    first = corrected(decoded, known, ball, 3.0)
    again = corrected(np.where(around, decoded, 9), np.where(around, known, -9), ball, 3.0)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("place", [np.s_[:3, :4, :5], np.s_[:, :, :]])
def test_at_the_volumes_border_nothing_flows(place):
    """A mask in a corner, and one that covers everything and has no edge."""
    mask = np.zeros((8, 9, 10), bool)
    mask[place] = True
    found = corrected(np.zeros(mask.shape), np.full(mask.shape, 2.0), mask, 1e6)
    np.testing.assert_allclose(found, 0 if mask.all() else 2, atol=1e-2)


def test_it_lies_between_the_errors_at_the_edge(ball):
    error = np.random.default_rng(1).uniform(-1, 3, ball.shape)
    found = corrected(np.zeros(ball.shape), error, ball, 5.0)
    assert found.min() >= -1 and found.max() <= 3 and found.std() > 0.1
