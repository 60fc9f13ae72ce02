"""Random appearance of T1n: closed forms of each step, and what must never change."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm_lib.anatomy.appearance import RANGES, Appearance, change_appearance, expand
from ldm_lib.anatomy.tissue import smooth_field, spline_coefficients

SHAPE, OWN = (12, 10, 14), (0.3, 0.6, 0.8)
PLAIN = Appearance(
    csf=None, gm=0.7, grey_field=np.zeros((5, 5, 5), np.float32), in_plane_mm=0.0, thick_mm=0.0, axis=0,
    gain=np.zeros((5, 5, 5), np.float32), noise=0.0, gamma=1.0,
)  # fmt: skip
BRAIN = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
BRAIN[..., :2] = False
NOISE = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(0))


def changed(values, **properties):
    image = torch.as_tensor(values, dtype=torch.float32).expand(1, 1, *SHAPE) * BRAIN
    return change_appearance(image, BRAIN, [OWN], [replace(PLAIN, **properties)], spacing_mm=1.0, noise=NOISE)


@pytest.mark.parametrize(
    ("value", "becomes"), [(0.3, 0.2), (0.6, 0.85), (0.8, 1.0), (0.15, 0.1), (0.7, 0.925), (1.6, 2)]
)
def test_the_tissues_get_the_drawn_intensities_and_others_lie_in_between(value, becomes):
    found = changed(value, csf=0.2, gm=0.85)
    torch.testing.assert_close(found[BRAIN], torch.full_like(found[BRAIN], becomes))
    assert not found[~BRAIN].any(), "air stays 0"


def test_white_matter_becomes_1_when_the_contrast_is_kept():
    assert torch.allclose(changed(0.8)[BRAIN], torch.tensor(1.0))
    assert torch.allclose(changed(0.6)[BRAIN], torch.tensor(0.75))


def test_a_field_changes_grey_matter_and_neither_csf_nor_white_matter():
    field = {"csf": 0.2, "gm": 0.7, "grey_field": spline_coefficients(np.random.default_rng(0), SHAPE, 30.0) * 0.1}
    assert changed(0.6, **field)[BRAIN].std() > 0.004
    for value, becomes in ((0.3, 0.2), (0.8, 1.0)):
        assert torch.allclose(changed(value, **field)[BRAIN], torch.tensor(becomes))


@pytest.mark.parametrize("axis", range(3))
def test_thick_slices_blur_along_one_axis_only_and_never_mix_in_air(axis):
    assert torch.allclose(changed(0.8, thick_mm=2.0, axis=axis)[BRAIN], torch.tensor(1.0), atol=1e-5), (
        "a constant stays"
    )
    steps = torch.zeros(3)
    pattern = torch.from_numpy(np.random.default_rng(1).random(SHAPE)).float()
    before, after = changed(pattern), changed(pattern, thick_mm=2.0, axis=axis)
    inside = (..., slice(2, None))
    for along in range(3):
        steps[along] = after[inside].diff(dim=2 + along).abs().mean() / before[inside].diff(dim=2 + along).abs().mean()
    assert steps.argmin() == axis and steps[axis] < 0.4 * steps.sum() / 3


def test_resolution_in_the_slices_is_that_of_all_axes_in_a_thin_scan():
    pattern = torch.from_numpy(np.random.default_rng(1).random(SHAPE)).float()
    for thick_mm, alike in ((0.0, True), (2.0, False)):
        steps = [
            changed(pattern, in_plane_mm=0.8, thick_mm=thick_mm)[..., 2:].diff(dim=2 + k).abs().mean() for k in range(3)
        ]
        assert (max(steps) < 1.2 * min(steps)) == alike and float(max(steps)) < 0.2


def test_noise_of_the_magnitude_is_rician():
    """Mean square of |v + n1 + i n2| is v^2 + 2 sd^2; for large v its standard deviation is sd."""
    found = changed(0.8, noise=0.04)[BRAIN].double()
    assert float(found.square().mean()) == pytest.approx(1 + 2 * 0.04**2, rel=4 * 2 * 0.04 / found.numel() ** 0.5)
    assert float(found.std()) == pytest.approx(0.04, rel=0.1)


def test_gain_and_gamma_have_their_closed_forms():
    gain = spline_coefficients(np.random.default_rng(0), SHAPE, 60.0) * 0.1
    expected = expand(torch.from_numpy(gain)[None, None], SHAPE, 1.0, 60.0).exp()
    torch.testing.assert_close(changed(0.6, gain=gain)[BRAIN], (0.75 * expected)[BRAIN])
    assert torch.allclose(changed(0.6, gamma=1.2)[BRAIN], torch.tensor(0.75**1.2))


def test_a_spline_field_is_that_of_the_synthetic_brains():
    rngs = [np.random.default_rng(3) for _ in range(2)]
    positions = [np.arange(n) * 2.0 for n in SHAPE]
    extent = [n * 2.0 for n in SHAPE]
    found = expand(torch.from_numpy(spline_coefficients(rngs[0], extent, 9.0))[None, None], SHAPE, 2.0, 9.0)
    np.testing.assert_allclose(found[0, 0], smooth_field(rngs[1], positions, 9.0, extent), atol=1e-5)


def test_a_draw_is_a_function_of_its_seed_and_stays_in_the_ranges():
    draws = [Appearance.draw(np.random.default_rng(k), (96.0,) * 3) for k in range(400)]
    again = Appearance.draw(np.random.default_rng(7), (96.0,) * 3)
    assert (again.gm, again.thick_mm, again.noise) == (draws[7].gm, draws[7].thick_mm, draws[7].noise)
    for name in ("gm", "noise", "gamma"):
        values = np.array([getattr(each, name) for each in draws])
        low, high = getattr(RANGES, name)
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    assert 0.15 < np.mean([each.csf is None for each in draws]) < 0.35
    assert all(each.csf < each.gm for each in draws if each.csf is not None)
    assert {each.axis for each in draws} == {0, 1, 2}


def test_images_of_a_batch_do_not_mix():
    looks = [Appearance.draw(np.random.default_rng(k), SHAPE) for k in range(3)]
    image = torch.rand(3, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    brain, noise = image > 0.2, torch.randn(3, 2, *SHAPE)
    own = [OWN, (0.2, 0.5, 0.9), (0.1, 0.5, 1.0)]
    both = change_appearance(image, brain, own, looks, spacing_mm=1.0, noise=noise)
    for k in range(3):
        one = [part[k : k + 1] for part in (image, brain, noise)]
        alone = change_appearance(one[0], one[1], own[k : k + 1], looks[k : k + 1], spacing_mm=1.0, noise=one[2])
        torch.testing.assert_close(both[k], alone[0])
