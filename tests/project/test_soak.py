"""The soak test finds what it looks for, on a small scale. `make soak` is run by hand."""

import shutil

import pytest
import soak_cases
import soak_faults
from bad_inputs import ROWS

from ldm_lib.data.cohort import audit
from ldm_lib.experiment.stages import STAGES

WORDS = {"refused": "reject", "warning": "warn", "ok": "accept"}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return soak_cases.cohort(tmp_path_factory.mktemp("soak") / "data", 20, seed=0)


@pytest.fixture
def audited(members):
    """The input validation of the cohort."""
    return {row.key: (WORDS[row.status], row.reason) for row in audit(members[0].place.root)}


def test_one_case_in_five_is_bad_and_validation_finds_it(members, audited):
    assert [m.row is not None for m in members] == [k % 5 == 4 for k in range(20)]
    assert len({m.row for m in members}) == 5, "each kind of bad in its turn"
    assert soak_cases.judge(members, audited, inpainted=False) == []


def test_lost_silent_and_wrongly_rejected_cases_are_found(members, audited):
    rejected = next(m for m in members if m.row and ROWS[m.row].must == "reject")
    key = soak_cases._key(rejected.place.id)
    for spoiled, finding in (
        ({k: v for k, v in audited.items() if k != key}, f"lost: {key}"),
        (audited | {key: ("accept", "")}, f"silent: {key}"),
        (audited | {key: ("reject", "no reason")}, f"says otherwise: {key}"),
        (audited | {members[0].place.id: ("reject", "empty")}, f"rejected: {members[0].place.id} (good)"),
    ):
        (found,) = soak_cases.judge(members, spoiled, inpainted=False)
        assert found.startswith(finding)


def test_a_voxel_changed_outside_the_mask_is_found(members, tmp_path):
    place = members[0].place
    same = shutil.copy(place.P, tmp_path / "same.nii.gz")
    assert soak_cases.unlike(members[0], same) == []
    other = shutil.copy(place.P, tmp_path / "other.nii.gz")
    place.save(place.x + (place.x == place.x.max()), other)
    assert soak_cases.unlike(members[0], other) == ["other.nii.gz: outside changed"]


def test_kills_are_distributed_over_the_whole_run_in_every_way():
    seconds = dict(zip(STAGES, (3.0, 10.0, 5.0, 30.0, 8.0, 6.0), strict=True))
    trials = soak_faults.plan(seconds, 30, seed=0)
    assert {t.stage for t in trials} == set(STAGES) and {t.way for t in trials} == set(soak_faults.WAYS)
    assert all(0 <= t.after_s < seconds[t.stage] for t in trials)
    assert sum(t.twice for t in trials) == 6 and trials == soak_faults.plan(seconds, 30, seed=0)
    assert trials != soak_faults.plan(seconds, 30, seed=1)
