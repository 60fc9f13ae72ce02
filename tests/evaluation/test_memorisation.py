"""Laws of looking for copies: a planted one is found wherever it was put, and brute force agrees."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_lib.data.case import load_case
from ldm_lib.evaluation.memorisation import COPY, REACH_MM, Patch, memorisation_rows, one_per_patient
from ldm_lib.images.volume import normalise


@pytest.fixture(scope="module")
def heads(cases):
    return [load_case(case) for case in one_per_patient(cases)]


def planted(data, other, shift=(0, 0, 0), *, mirrored=False):
    """The case, its mask filled with another's voxels moved by a shift in LPS."""
    image = normalise(data.lps(other.target), other.scale) * data.scale
    image = np.roll(np.flip(image, 0) if mirrored else image, shift, axis=(0, 1, 2))
    return np.where(data.mask, image, data.voided)  # the synthetic cohort is stored LPS


def test_one_case_a_patient(cases):
    assert [case.key for case in one_per_patient(cases)] == [cases[0].key, cases[2].key, cases[4].key]


@pytest.mark.parametrize(("shift", "mirrored"), [((0, 0, 0), False), ((1, -1, 1), True)])
def test_a_copy_is_found_with_its_patient(heads, shift, mirrored):
    assert max(map(abs, shift)) * 8 <= REACH_MM
    data, *others = heads
    patch = Patch.of(data, planted(data, others[1], shift, mirrored=mirrored), method="copy")
    (row,) = memorisation_rows([patch], others)
    assert row["nearest"] == others[1].case.patient and row["patients"] == 2
    assert row["distance"] == pytest.approx(0, abs=1e-6) and row["distance ratio"] < 1e-4 < COPY
    assert (row["case"], row["method"]) == (data.case.key, "copy")


def test_the_distance_is_that_of_brute_force(heads):
    data, other, _ = heads
    patch, image = Patch.of(data, data.target), normalise(other.lps(other.target), other.scale)
    reach, padded, found = round(REACH_MM / 8), np.pad(image, 10), []
    for side in (padded, np.flip(padded, 0)):
        for shift in np.ndindex(*[2 * reach + 1] * 3):
            corner = np.array(patch.corner) + 10 - reach + shift
            place = side[tuple(slice(c, c + n) for c, n in zip(corner, patch.compared.shape, strict=True))]
            found.append(np.sqrt(np.square(place - patch.values)[patch.compared].mean()))
    assert patch.distance(image) == pytest.approx(min(found), rel=1e-6)


def test_voxels_around_the_mask_are_not_compared(heads):
    data, *others = heads
    around = np.where(data.mask, data.target, 5 * data.scale)
    rows = [memorisation_rows([Patch.of(data, volume)], others) for volume in (data.target, around)]
    assert rows[0] == rows[1]


def test_few_patients_and_other_voxel_sizes(heads):
    data, other, third = heads
    patch = Patch.of(data, data.target)
    (alone,) = memorisation_rows([patch], [other])
    assert alone["patients"] == 1 and np.isnan(alone["distance ratio"]) and alone["distance"] > 0
    coarse = replace(third, source=replace(third.source, affine=third.source.affine @ np.diag([2, 2, 2, 1])))
    (row,) = memorisation_rows([patch], [coarse])
    assert row["patients"] == 0 and row["nearest"] == "" and np.isnan(row["distance"])


def test_another_patients_truth_is_no_copy(heads):
    data, *others = heads
    (row,) = memorisation_rows([Patch.of(data, data.target)], others)
    assert row["distance ratio"] > COPY and row["distance"] > 0.05
