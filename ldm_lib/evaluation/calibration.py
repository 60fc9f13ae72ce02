"""Measure the calibration of K samples: whether their standard deviation matches their error, for any distribution.

If the ground truth is as likely as any sample, its rank among them is uniform from 0 to K, so that the interval from
the i-th smallest sample to the i-th largest contains it with probability (K + 1 - 2i) / (K + 1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def ranks(samples: np.ndarray, target: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return the rank of the ground truth (n,) among K samples (K, n): the number of samples below it, 0 to K.

    Where samples equal the ground truth (air is 0 in all of them) its rank among these is random: any fixed rank would
    count correct voxels as too high or too low.

    Source: Hamill 2001 (Monthly Weather Review 129, 550), section 2.
    """
    below, equal = (samples < target).sum(axis=0), (samples == target).sum(axis=0)
    return below + np.random.default_rng(seed).integers(0, equal + 1)


def coverage(rank: np.ndarray, samples: int) -> list[dict[str, float]]:
    """Compute how often the ground truth lies in each interval between two samples of equal rank from either end.

    Rows have "expected", the probability if the samples are calibrated, and "found", the fraction of the voxels; the
    narrowest interval is first. `rank` is (n,) of `ranks`, among K = `samples`.
    """
    found = {i: float(((rank >= i) & (rank <= samples - i)).mean()) for i in range(samples // 2, 0, -1)}
    return [{"expected": (samples + 1 - 2 * i) / (samples + 1), "found": value} for i, value in found.items()]


def spread_skill_ratio(samples: np.ndarray, target: np.ndarray) -> float:
    """Compute the standard deviation of K samples over the error of their mean: 1 is calibrated, below 1 overconfident.

    sqrt((K + 1) / K x mean unbiased variance) / root mean square error of the mean; NaN if that error is 0.

    Source: Fortin et al. 2014 (Journal of Hydrometeorology 15, 1708), eq. 15.
    """
    count = len(samples)
    std = np.sqrt((count + 1) / count * samples.var(axis=0, ddof=1, dtype=np.float64).mean())
    error = np.sqrt(np.square(samples.mean(axis=0, dtype=np.float64) - target).mean())
    return float(std / error) if error > 0 else np.nan


def calibration_rows(
    cases: Sequence[tuple[dict[str, str], np.ndarray, np.ndarray]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compute two lists of rows, per case and interval those of `coverage`, and per case the `spread_skill_ratio`.

    Args:
        cases: a row's first columns, samples (K, n) and ground truth (n,) of each; K is the same for all.
    """
    covered = [about | row for about, s, target in cases for row in coverage(ranks(s, target), len(s))]
    return covered, [about | {"spread-skill ratio": spread_skill_ratio(s, target)} for about, s, target in cases]
