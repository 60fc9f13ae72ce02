"""Laws and closed forms of Fisher-Kolmogorov growth."""

import time

import numpy as np
import pytest
import torch

from ldm_lib.anatomy.tumour_growth import (
    GROWTH_THRESHOLD,
    Rates,
    grow_in_labels,
    random_tumour,
    seed_voxel,
    simulate_growth,
    stable_step_days,
    threshold_growth,
)
from ldm_lib.errors import ConfigError, InputError

RATES = {"diffusion_white_mm2_per_day": 0.1, "proliferation_per_day": 0.05}


def _random_tissue(shape, seed=0):
    white = np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)
    grey = 1 - white
    empty = np.random.default_rng(seed + 1).uniform(size=shape) < 0.2
    white[empty] = grey[empty] = 0
    return white, grey


def test_front_moves_at_twice_the_root_of_d_rho():
    white = np.ones((800, 1, 1), np.float32)
    start = np.zeros_like(white)
    start[:5] = 1
    assert 0.05 * 2000 >= 100 and np.sqrt(0.1 / 0.05) >= 2.4 * 0.5  # long enough, and the front resolved
    mass = [
        simulate_growth(white, 0 * white, initial=start, spacing_mm=0.5, days=days, **RATES).sum(dtype=float)
        for days in (2000, 2200)
    ]
    assert 0.5 * (mass[1] - mass[0]) / 200 == pytest.approx(2 * np.sqrt(0.1 * 0.05), rel=0.05)


def test_grey_matter_slows_the_front_by_the_root_of_the_ratio():
    grey = np.ones((300, 1, 1), np.float32)
    start = np.zeros_like(grey)
    start[:5] = 1
    mass = [
        simulate_growth(0 * grey, grey, initial=start, spacing_mm=0.4, days=days, diffusion_ratio=2.5, **RATES).sum(
            dtype=float
        )
        for days in (600, 800)
    ]
    assert 0.4 * (mass[1] - mass[0]) / 200 == pytest.approx(2 * np.sqrt(0.04 * 0.05), rel=0.05)


def test_diffusion_alone_conserves_cells():
    white, grey = _random_tissue((14, 12, 10))
    start = np.random.default_rng(2).uniform(0, 0.5, white.shape).astype(np.float32) * (white + grey)
    end = simulate_growth(
        white, grey, initial=start, spacing_mm=(1, 2, 3), days=200,
        diffusion_white_mm2_per_day=0.2, proliferation_per_day=0.0,
    )  # fmt: skip
    assert end.sum(dtype=float) == pytest.approx(start.sum(dtype=float), rel=1e-5)
    tissue = (white + grey) > 0
    assert end[tissue].std() < 0.5 * start[tissue].std()


def test_diffusion_alone_widens_a_gaussian_by_2dt():
    x = np.arange(161) - 80.0
    start = np.exp(-(x**2) / (2 * 5.0**2)).astype(np.float32)[:, None, None]
    end = simulate_growth(
        np.ones_like(start), 0 * start, initial=start, spacing_mm=1, days=300,
        diffusion_white_mm2_per_day=0.2, proliferation_per_day=0.0,
    )[:, 0, 0]  # fmt: skip
    assert (end * x**2).sum() / end.sum() == pytest.approx(5.0**2 + 2 * 0.2 * 300, rel=1e-3)


def test_growth_without_diffusion_is_logistic():
    start = np.full((2, 2, 2), 0.1, np.float32)
    end = simulate_growth(
        np.ones_like(start), 0 * start, initial=start, spacing_mm=1, days=50,
        diffusion_white_mm2_per_day=0.0, proliferation_per_day=0.05,
    )  # fmt: skip
    exact = 0.1 * np.exp(2.5) / (0.9 + 0.1 * np.exp(2.5))
    np.testing.assert_allclose(end, exact, rtol=0.03)


def test_nothing_crosses_or_enters_what_is_not_tissue():
    white = np.ones((21, 9, 9), np.float32)
    white[10] = 0
    end = simulate_growth(white, 0 * white, seed_vox=(5, 4, 4), seed_sigma_mm=1, spacing_mm=1, days=400, **RATES)
    assert end[:10].min() > 0.9
    assert not end[10:].any()


def test_axes_are_alike():
    white, grey = _random_tissue((12, 10, 8))
    settings = {"days": 60, "proliferation_per_day": 0.05, "diffusion_white_mm2_per_day": 0.3}
    one = simulate_growth(white, grey, seed_vox=(6, 5, 4), spacing_mm=(1, 1.5, 2), **settings)
    turned = simulate_growth(
        white.transpose(2, 0, 1), grey.transpose(2, 0, 1), seed_vox=(4, 6, 5), spacing_mm=(2, 1, 1.5), **settings
    )
    np.testing.assert_allclose(turned, one.transpose(2, 0, 1), atol=1e-6)


def test_a_batch_equals_its_elements():
    pairs = [_random_tissue((9, 8, 7), seed) for seed in (0, 5)]
    pairs[1] = tuple(0.5 * share for share in pairs[1])
    starts = [0.3 * (w + g) for w, g in pairs]
    white, grey = (np.stack(shares) for shares in zip(*pairs, strict=True))
    batch = simulate_growth(white, grey, initial=np.stack(starts), spacing_mm=1, days=40, **RATES)
    for k, ((w, g), start) in enumerate(zip(pairs, starts, strict=True)):
        np.testing.assert_array_equal(batch[k], simulate_growth(w, g, initial=start, spacing_mm=1, days=40, **RATES))


@pytest.mark.parametrize("spacing_mm", [1.0, (0.5, 1.0, 4.0)])
def test_the_step_is_stable_for_the_roughest_start(spacing_mm):
    white = np.ones((8, 8, 8), np.float32)
    start = 0.5 * (np.indices(white.shape).sum(0) % 2)
    limit = stable_step_days(0.3, spacing_mm)
    end = simulate_growth(
        white, 0 * white, initial=start, spacing_mm=spacing_mm, days=300 * limit,
        diffusion_white_mm2_per_day=0.3, proliferation_per_day=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(end, 0.25, atol=1e-3)
    assert limit == pytest.approx(1 / (2 * 0.3 * np.sum(1 / np.broadcast_to(spacing_mm, 3) ** 2)))


def test_no_days_change_nothing_and_tensors_stay_tensors():
    white = torch.ones(3, 3, 3)
    start = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))
    end = simulate_growth(white, 0 * white, initial=start, spacing_mm=1, days=0, **RATES)
    assert torch.equal(end, start)


def test_threshold_keeps_what_reaches_it():
    growth = np.array([0.0, 0.1999, 0.2, 0.7], np.float32)
    np.testing.assert_array_equal(threshold_growth(growth), np.array([0, 0, 0.2, 0.7], np.float32))
    assert torch.equal(threshold_growth(torch.tensor([0.1, 0.4]), 0.05), torch.tensor([0.1, 0.4]))
    assert threshold_growth(growth).dtype == np.float32


def test_random_tumours_start_where_allowed_and_differ():
    white = np.ones((40, 40, 40), np.float32)
    allowed = np.zeros(white.shape, bool)
    allowed[20, 20, 20] = True
    tumours = [random_tumour(white, 0 * white, allowed, np.random.default_rng(k), spacing_mm=3) for k in range(3)]
    for tumour in tumours:
        assert np.unravel_index(tumour.argmax(), tumour.shape) == (20, 20, 20)
        radius_mm = 3 * (3 / (4 * np.pi) * (tumour >= GROWTH_THRESHOLD).sum()) ** (1 / 3)
        assert 9 < radius_mm < 45
    assert len({tumour.sum() for tumour in tumours}) == 3


def test_what_lies_around_the_tissue_changes_no_bit():
    white, grey = _random_tissue((9, 8, 7))
    start = 0.3 * (white + grey)
    alone = simulate_growth(white, grey, initial=start, spacing_mm=1, days=40, **RATES)
    white, grey, start = (np.pad(field, [(3, 5), (0, 2), (4, 1)]) for field in (white, grey, start))
    padded = simulate_growth(white, grey, initial=start, spacing_mm=1, days=40, **RATES)
    np.testing.assert_array_equal(padded[3:-5, :-2, 4:-1], alone)
    assert np.count_nonzero(padded) == np.count_nonzero(alone)


def _ball(size, radius_mm, spacing_mm):
    """White matter in a ball, CSF around it, and the affine of such a grid, its centre at 10, -20, 30 mm."""
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = np.array([10, -20, 30]) - affine[:3, :3] @ np.full(3, (size - 1) / 2)
    distance = np.linalg.norm((np.indices((size,) * 3) - (size - 1) / 2) * spacing_mm, axis=0)
    return np.where(distance < radius_mm, 3, 1).astype(np.uint8), affine


def test_millimetres_and_days_mean_the_same_on_any_grid():
    radii = []
    for size, spacing_mm in ((51, 1.0), (27, 2.0)):
        labels, affine = _ball(size, 24, spacing_mm)
        grown = grow_in_labels(labels, affine, days=120, seed_mm=(10, -20, 30))
        radii.append(spacing_mm * (3 / (4 * np.pi) * (grown >= GROWTH_THRESHOLD).sum()) ** (1 / 3))
        assert not grown[labels == 1].any()
    assert radii[0] == pytest.approx(radii[1], abs=1) and 8 < radii[0] < 22


def test_grey_matter_and_slower_rates_hold_a_tumour_back():
    labels, affine = _ball(27, 24, 2.0)
    grown = {
        name: grow_in_labels(tissue, affine, days=100, seed_mm=(10, -20, 30), rates=rates).sum()
        for name, tissue, rates in (("white", labels, Rates()), ("grey", np.where(labels == 3, 2, labels), Rates()),
                                    ("slow", labels, Rates(0.05, 10, 0.05)))
    }  # fmt: skip
    assert grown["grey"] < grown["slow"] < grown["white"]


def test_a_segmentation_is_a_start_too():
    labels, affine = _ball(27, 24, 2.0)
    segmentation = np.zeros(labels.shape, bool)
    segmentation[10:16, 10:16, 10:16] = True
    same = grow_in_labels(labels, affine, days=0, segmentation=segmentation)
    np.testing.assert_array_equal(same, segmentation)
    assert (grow_in_labels(labels, affine, days=40, segmentation=segmentation) >= 0.2).sum() > segmentation.sum()


@pytest.mark.parametrize(("seed_mm", "match"), [
    ((10, -20, 80), r"\(10, -20, 80\) mm is voxel \(13, 13, 38\) of \(27, 27, 27\), outside .* 28\.0 mm away, at \(10"),
    ((10, -20, 55), r"is voxel \(13, 13, 2[56]\) of .*the nearest of it is [23]\.\d mm away, at \("),
])  # fmt: skip
def test_a_seed_outside_the_tissue_is_refused_with_the_nearest_place(seed_mm, match):
    labels, affine = _ball(27, 24, 2.0)
    with pytest.raises(InputError, match=match):
        seed_voxel(labels, affine, seed_mm)
    assert seed_voxel(labels, affine, (10, -20, 30)) == (13, 13, 13)


@pytest.mark.slow
def test_a_hundred_days_at_one_millimetre_take_less_than_a_minute():
    labels, affine = _ball(160, 78, 1.0)
    started = time.monotonic()
    grown = grow_in_labels(labels, affine, days=100, seed_mm=(10, -20, 30), rates=Rates(0.5, 10, 0.05))
    took = time.monotonic() - started
    assert took < 60 and (grown >= GROWTH_THRESHOLD).any()


ONE = np.ones((4, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grey": np.ones((4, 4, 5))}, InputError, r"grey: shape \(4, 4, 5\), but white has \(4, 4, 4\)"),
        ({"white": 2 * ONE}, InputError, "white: values from 2 to 2"),
        ({"white": np.nan * ONE}, InputError, "white: values from nan"),
        ({"initial": ONE}, InputError, "exactly one"),
        ({"seed_vox": None}, InputError, "exactly one"),
        ({"seed_vox": (90, 0, 0)}, InputError, "outside the tissue"),
        ({"days": -1}, ConfigError, "days: -1 given"),
        ({"diffusion_ratio": 0}, ConfigError, "diffusion_ratio: 0 given, allowed is a finite number above 0"),
        ({"proliferation_per_day": np.inf}, ConfigError, "proliferation_per_day: inf"),
        ({"spacing_mm": 0}, ConfigError, "spacing_mm: 0"),
    ],
)
def test_refusals_name_what_is_wrong(change, error, match):
    given = {"white": ONE, "grey": 0 * ONE, "seed_vox": (1, 1, 1), "spacing_mm": 1, "days": 1, **RATES, **change}
    with pytest.raises(error, match=match):
        simulate_growth(given.pop("white"), given.pop("grey"), **given)
