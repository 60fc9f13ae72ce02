"""Laws of calibration: an exchangeable ground truth is covered as often as expected, however few the samples."""

import numpy as np
import pytest

from ldm_lib.evaluation.calibration import calibration_rows, coverage, ranks, spread_skill_ratio

N = 40_000


def drawn(count, spread=1.0, seed=0):
    """K samples of one spread around a common middle, and a truth of spread 1 around it."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(0, 3, N)
    return middle + spread * rng.normal(size=(count, N)), middle + rng.normal(size=N)


@pytest.mark.parametrize("count", [3, 16])
def test_a_truth_like_the_samples_is_covered_as_often_as_expected(count):
    samples, truth = drawn(count)
    rank = ranks(samples, truth)
    assert np.bincount(rank, minlength=count + 1) / N == pytest.approx(1 / (count + 1), abs=0.01)
    rows = coverage(rank, count)
    assert [row["expected"] for row in rows] == sorted(row["expected"] for row in rows)
    assert rows[-1]["expected"] == pytest.approx((count - 1) / (count + 1)) and len(rows) == count // 2
    for row in rows:
        assert row["found"] == pytest.approx(row["expected"], abs=0.01)
    assert spread_skill_ratio(samples, truth) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_too_sure_and_not_sure_enough(spread):
    """The ratio is known: sqrt((K + 1) / K s^2 / (1 + s^2 / K))."""
    samples, truth = drawn(8, spread)
    found = [row["found"] - row["expected"] for row in coverage(ranks(samples, truth), 8)]
    assert (np.array(found) < -0.05).all() if spread < 1 else (np.array(found) > 0.05).all()
    expected = np.sqrt(9 / 8 * spread**2 / (1 + spread**2 / 8))
    assert spread_skill_ratio(samples, truth) == pytest.approx(expected, rel=0.02)


def test_ties_take_any_place_among_their_equals():
    """Air that all samples know is neither too high nor too low."""
    samples, truth = np.zeros((4, N)), np.zeros(N)
    assert np.bincount(ranks(samples, truth)) / N == pytest.approx(0.2, abs=0.01)
    samples[:2] = -1
    assert np.bincount(ranks(samples, truth), minlength=5) / N == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3], abs=0.01)
    assert np.isnan(spread_skill_ratio(np.zeros((4, N)), truth))


def test_each_case_has_rows_of_its_own_whatever_its_size():
    few, many = drawn(4, 2.0), drawn(4, 0.3)
    few = few[0][:, :500], few[1][:500]
    covered, each = calibration_rows([({"case": "few"}, *few), ({"case": "many"}, *many)])
    expected = [
        {"case": name} | row for name, pair in (("few", few), ("many", many)) for row in coverage(ranks(*pair), 4)
    ]
    assert covered == expected
    assert [row["case"] for row in each] == ["few", "many"]
    assert each[0]["spread-skill ratio"] > 1 > each[1]["spread-skill ratio"]
