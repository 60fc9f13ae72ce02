"""Laws of the boundary scores: a continuation is invisible, and a step is counted."""

import numpy as np
import pytest

from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError
from ldm_lib.evaluation.boundary import BIAS, GRADIENT, STEP, boundary_scores
from ldm_lib.inpainting.baselines import harmonic_fill, mean_fill

SHAPE = (20, 22, 24)


@pytest.fixture
def mask():
    mask = np.zeros(SHAPE, bool)
    mask[6:13, 7:15, 8:17] = True
    return mask


def ramp(slope):
    return 100 + np.einsum("i,ixyz->xyz", np.array(slope, float), np.indices(SHAPE))


def test_a_ramp_that_goes_on_cannot_be_seen(mask):
    image = ramp((1, -2, 0.5))
    scores = boundary_scores(image, np.where(mask, 0, image), mask, 50.0)
    assert scores == pytest.approx({STEP: 1, BIAS: 0, GRADIENT: 1}, abs=1e-9)


def test_an_offset_is_counted_as_its_closed_form(mask):
    """Across x, |d + s| and |d - s| on the two sides; across y and z |d|, where the ramp has no step."""
    slope, offset, image = 3.0, 2.0, ramp((3, 0, 0))
    faces = {"x": 8 * 9, "y": 7 * 9, "z": 7 * 8}
    across = faces["x"] * (abs(offset + slope) + abs(offset - slope)) + 2 * (faces["y"] + faces["z"]) * offset
    scores = boundary_scores(image + offset * mask, np.where(mask, 0, image), mask, 50.0)
    assert scores[STEP] == pytest.approx(across / (2 * faces["x"] * slope))
    assert scores[BIAS] == pytest.approx(offset / 50) and scores[GRADIENT] == pytest.approx(1)


def test_only_known_brain_next_to_the_mask_counts(mask):
    image = ramp((3, 1, 2))
    voided = np.where(mask, 0, image)
    expected = boundary_scores(image, voided, mask, 1.0)
    noisy = image + np.random.default_rng(0).normal(0, 50, SHAPE) * ~mask
    noisy[4:15, 5:17, 6:19] = image[4:15, 5:17, 6:19]  # the mask and two voxels around it
    assert boundary_scores(noisy, np.where(mask, 0, noisy), mask, 1.0) == pytest.approx(expected)
    air = voided.copy()
    air[:6] = 0
    scores = boundary_scores(np.where(mask, image + 99 * (np.indices(SHAPE)[0] == 6), air), air, mask, 1.0)
    assert scores[STEP] < boundary_scores(image + 99 * mask, voided, mask, 1.0)[STEP]


@pytest.mark.parametrize("box", [np.s_[:4, :4, :4], np.s_[:, :, :], np.s_[0:0, :, :]])
def test_masks_at_the_border_and_without_an_edge(box):
    mask, image = np.zeros(SHAPE, bool), ramp((1, 1, 1))
    mask[box] = True
    scores = boundary_scores(image, np.where(mask, 0, image), mask, 1.0)
    seen = mask.any() and not mask.all()
    assert all(np.isfinite(value) == seen for value in scores.values())
    assert not seen or scores[STEP] == pytest.approx(1)


def test_of_a_head_the_truth_shows_least(cases):
    data = load_case(cases[0])
    fills = {"truth": data.target, "harmonic": harmonic_fill(data.voided, data.mask)}
    fills["mean"] = mean_fill(data.voided, data.mask)
    found = {name: boundary_scores(volume, data.voided, data.mask, data.scale) for name, volume in fills.items()}
    assert abs(found["truth"][STEP] - 1) < 0.25 and found["mean"][GRADIENT] == 0
    assert (
        found["harmonic"][STEP] < found["truth"][STEP] and found["harmonic"][GRADIENT] < 0.8 * found["truth"][GRADIENT]
    )


def test_a_smoother_fill_has_less_gradient_and_a_rougher_one_more(mask):
    rng = np.random.default_rng(0)
    image = 100 + rng.normal(0, 5, SHAPE)
    found = {}
    for spread in (0, 5, 20):
        filled = np.where(mask, 100 + rng.normal(0, spread, SHAPE), image)
        found[spread] = boundary_scores(filled, np.where(mask, 0, image), mask, 1.0)
    assert found[0][GRADIENT] == 0 and found[5][GRADIENT] == pytest.approx(1, abs=0.1)
    assert found[20][GRADIENT] == pytest.approx(4, rel=0.1)
    assert found[20][STEP] == pytest.approx(np.hypot(20, 5) / np.hypot(5, 5), rel=0.1)


def test_volumes_of_other_shapes_are_rejected(mask):
    with pytest.raises(InputError, match="shapes differ"):
        boundary_scores(np.zeros((2, 2, 2)), np.zeros(SHAPE), mask, 1.0)
