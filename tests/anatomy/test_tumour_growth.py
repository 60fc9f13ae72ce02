"""Laws and closed forms of Fisher-Kolmogorov growth."""

import doctest
import time

import numpy as np
import pytest
import torch

from ldm_lib.anatomy import tumour_growth
from ldm_lib.anatomy.tumour_growth import (
    GROWTH_THRESHOLD,
    GrowthRates,
    grow_tumour,
    random_tumour,
    seed_voxel,
    solve,
    stable_step_days,
    threshold_growth,
)
from ldm_lib.errors import ConfigError, InputError


def rates(diffusion=0.1, proliferation=0.05, ratio=10.0):
    return GrowthRates(diffusion_white_mm2_per_day=diffusion, diffusion_ratio=ratio,
                       proliferation_per_day=proliferation)  # fmt: skip


def grow(white, grey, start, *, spacing_mm=1.0, days, **given):
    """Solve for numpy arrays."""
    fields = (torch.as_tensor(np.ascontiguousarray(field), dtype=torch.float32) for field in (white, grey, start))
    return solve(*fields, spacing_mm=spacing_mm, days=days, rates=rates(**given)).numpy()


def random_tissue(shape, seed=0):
    white = np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)
    grey = 1 - white
    empty = np.random.default_rng(seed + 1).uniform(size=shape) < 0.2
    white[empty] = grey[empty] = 0
    return white, grey


def front_speed(tissue, spacing_mm, days, **given):
    """Growth of mass in a rod between two times, mm per day."""
    white, grey = tissue
    start = np.zeros_like(white)
    start[:5] = 1
    mass = [grow(white, grey, start, spacing_mm=spacing_mm, days=d, **given).sum(dtype=float) for d in days]
    return spacing_mm * (mass[1] - mass[0]) / (days[1] - days[0])


def test_front_moves_at_twice_the_root_of_d_rho():
    assert 0.05 * 2000 >= 100 and np.sqrt(0.1 / 0.05) >= 2.4 * 0.5  # long enough, and the front resolved
    rod = np.ones((800, 1, 1), np.float32)
    assert front_speed((rod, 0 * rod), 0.5, (2000, 2200)) == pytest.approx(2 * np.sqrt(0.1 * 0.05), rel=0.05)


def test_grey_matter_slows_the_front_by_the_root_of_the_ratio():
    rod = np.ones((300, 1, 1), np.float32)
    speed = front_speed((0 * rod, rod), 0.4, (600, 800), ratio=2.5)
    assert speed == pytest.approx(2 * np.sqrt(0.04 * 0.05), rel=0.05)


def test_diffusion_alone_conserves_tumour_cells():
    white, grey = random_tissue((14, 12, 10))
    start = np.random.default_rng(2).uniform(0, 0.5, white.shape).astype(np.float32) * (white + grey)
    end = grow(white, grey, start, spacing_mm=(1, 2, 3), days=200, diffusion=0.2, proliferation=0)
    assert end.sum(dtype=float) == pytest.approx(start.sum(dtype=float), rel=1e-5)
    tissue = (white + grey) > 0
    assert end[tissue].std() < 0.5 * start[tissue].std()


def test_diffusion_alone_widens_a_gaussian_by_2dt():
    x = np.arange(161) - 80.0
    start = np.exp(-(x**2) / (2 * 5.0**2))[:, None, None]
    end = grow(np.ones_like(start), 0 * start, start, days=300, diffusion=0.2, proliferation=0)[:, 0, 0]
    assert (end * x**2).sum() / end.sum() == pytest.approx(5.0**2 + 2 * 0.2 * 300, rel=1e-3)


def test_growth_without_diffusion_is_logistic():
    start = np.full((2, 2, 2), 0.1)
    end = grow(np.ones_like(start), 0 * start, start, days=50, diffusion=0)
    np.testing.assert_allclose(end, 0.1 * np.exp(2.5) / (0.9 + 0.1 * np.exp(2.5)), rtol=0.03)


def test_nothing_crosses_or_enters_what_is_not_tissue():
    white, start = np.ones((21, 9, 9)), np.zeros((21, 9, 9))
    white[10], start[5, 4, 4] = 0, 1
    end = grow(white, 0 * white, start, days=400)
    assert end[:10].min() > 0.9 and not end[10:].any()


def test_axes_are_equivalent():
    white, grey = random_tissue((12, 10, 8))
    start = np.random.default_rng(4).uniform(0, 0.5, white.shape)
    one = grow(white, grey, start, spacing_mm=(1, 1.5, 2), days=60, diffusion=0.3)
    turned = [field.transpose(2, 0, 1) for field in (white, grey, start)]
    other = grow(*turned, spacing_mm=(2, 1, 1.5), days=60, diffusion=0.3)
    np.testing.assert_allclose(other, one.transpose(2, 0, 1), atol=1e-6)


def test_a_batch_equals_its_elements():
    pairs = [random_tissue((9, 8, 7), seed) for seed in (0, 5)]
    pairs[1] = tuple(0.5 * fraction for fraction in pairs[1])
    fields = [(white, grey, 0.3 * (white + grey)) for white, grey in pairs]
    batch = grow(*(np.stack(field) for field in zip(*fields, strict=True)), days=40)
    for grown, own in zip(batch, fields, strict=True):
        np.testing.assert_array_equal(grown, grow(*own, days=40))


def test_the_surroundings_of_the_tissue_change_no_bit():
    white, grey = random_tissue((9, 8, 7))
    fields = white, grey, 0.3 * (white + grey)
    alone = grow(*fields, days=40)
    padded = grow(*(np.pad(field, [(3, 5), (0, 2), (4, 1)]) for field in fields), days=40)
    np.testing.assert_array_equal(padded[3:-5, :-2, 4:-1], alone)
    assert np.count_nonzero(padded) == np.count_nonzero(alone)


@pytest.mark.parametrize("spacing_mm", [1.0, (0.5, 1.0, 4.0)])
def test_the_step_is_stable_for_the_roughest_start(spacing_mm):
    white = np.ones((8, 8, 8))
    start = 0.5 * (np.indices(white.shape).sum(0) % 2)
    limit = stable_step_days(0.3, spacing_mm)
    end = grow(white, 0 * white, start, spacing_mm=spacing_mm, days=300 * limit, diffusion=0.3, proliferation=0)
    np.testing.assert_allclose(end, 0.25, atol=1e-3)
    assert limit == pytest.approx(1 / (2 * 0.3 * np.sum(1 / np.broadcast_to(spacing_mm, 3) ** 2)))


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


SEED_MM = (10, -20, 30)


def ball(size, radius_mm, spacing_mm):
    """White matter in a ball, CSF around it, and the affine of such a grid, its centre at `SEED_MM`."""
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = np.array(SEED_MM) - affine[:3, :3] @ np.full(3, (size - 1) / 2)
    distance = np.linalg.norm((np.indices((size,) * 3) - (size - 1) / 2) * spacing_mm, axis=0)
    return np.where(distance < radius_mm, 3, 1).astype(np.uint8), affine


def test_millimetres_and_days_mean_the_same_on_any_grid():
    radii = []
    for size, spacing_mm in ((51, 1.0), (27, 2.0)):
        tissue, affine = ball(size, 24, spacing_mm)
        grown = grow_tumour(tissue, affine, 120, seed_mm=SEED_MM)
        radii.append(spacing_mm * (3 / (4 * np.pi) * (grown >= GROWTH_THRESHOLD).sum()) ** (1 / 3))
        assert not grown[tissue == 1].any()
    assert radii[0] == pytest.approx(radii[1], abs=1) and 8 < radii[0] < 22


def test_grey_matter_and_slower_rates_hold_a_tumour_back():
    tissue, affine = ball(27, 24, 2.0)
    runs = {"white": (tissue, rates(0.2)), "grey": (np.where(tissue == 3, 2, tissue), rates(0.2)),
            "slow": (tissue, rates(0.05))}  # fmt: skip
    grown = {name: grow_tumour(t, affine, 100, seed_mm=SEED_MM, rates=r).sum() for name, (t, r) in runs.items()}
    assert grown["grey"] < grown["slow"] < grown["white"]


def test_a_segmentation_is_a_start_too():
    tissue, affine = ball(27, 24, 2.0)
    segmentation = np.zeros(tissue.shape, bool)
    segmentation[10:16, 10:16, 10:16] = True
    np.testing.assert_array_equal(grow_tumour(tissue, affine, 0, segmentation=segmentation), segmentation)
    later = grow_tumour(tissue, affine, 40, segmentation=segmentation)
    assert (later >= 0.2).sum() > segmentation.sum()


def test_a_seed_outside_the_tissue_is_rejected():
    tissue, affine = ball(27, 24, 2.0)
    with pytest.raises(
        InputError, match=r"\(10, -20, 80\) mm is voxel \(13, 13, 38\) of \(27, 27, 27\), outside white"
    ):
        seed_voxel(tissue, affine, (10, -20, 80))
    assert seed_voxel(tissue, affine, SEED_MM) == (13, 13, 13)


@pytest.mark.slow
def test_a_hundred_days_at_one_millimetre_take_less_than_a_minute():
    tissue, affine = ball(160, 78, 1.0)
    started = time.monotonic()
    grown = grow_tumour(tissue, affine, 100, seed_mm=SEED_MM, rates=rates(0.5))
    assert time.monotonic() - started < 60 and (grown >= GROWTH_THRESHOLD).any()


TISSUE, AFFINE = ball(9, 6, 2.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tissue": None}, InputError, "tissue: no tissue map"),
        ({"seed_mm": None}, InputError, "exactly one start"),
        ({"segmentation": TISSUE == 3}, InputError, "exactly one start"),
        ({"seed_mm": None, "segmentation": TISSUE[1:]}, InputError, r"segmentation: shape \(8, 9, 9\), but .*\(9, 9"),
        ({"seed_mm": None, "segmentation": TISSUE == 1}, InputError, "starts outside white and grey matter"),
        ({"days": -1}, ConfigError, "days: -1 given"),
        ({"days": np.inf}, ConfigError, "days: inf given"),
    ],
)
def test_errors_name_what_is_wrong(change, error, match):
    given = {"tissue": TISSUE, "affine": AFFINE, "days": 1, "seed_mm": SEED_MM, **change}
    with pytest.raises(error, match=match):
        grow_tumour(**given)


@pytest.mark.parametrize("wrong", [{"diffusion_ratio": 0}, {"proliferation_per_day": np.inf},
                                   {"diffusion_white_mm2_per_day": -1}])  # fmt: skip
def test_rates_out_of_range_are_rejected_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GrowthRates.parse(wrong)


def test_examples_run():
    found = doctest.testmod(tumour_growth)
    assert found.attempted and not found.failed


def test_no_days_change_nothing():
    start = np.random.default_rng(0).random((3, 3, 3), np.float32)
    np.testing.assert_array_equal(grow(np.ones_like(start), 0 * start, start, days=0), start)
