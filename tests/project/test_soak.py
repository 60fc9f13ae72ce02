"""The soak finds what it looks for: its own judgement, in small. `make soak` is run by hand."""

import shutil

import pytest
import soak_cases
import soak_faults
from bad_inputs import ROWS

from ldm_lib.data.cohort import audit
from ldm_lib.experiment.stages import STAGES

WORDS = {"refused": "refuse", "warning": "warn", "ok": "accept"}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return soak_cases.cohort(tmp_path_factory.mktemp("soak") / "data", 20, seed=0)


@pytest.fixture
def told(members):
    """What the gate says of the cohort."""
    return {row.key: (WORDS[row.status], row.reason) for row in audit(members[0].place.root)}


def test_one_case_in_five_is_bad_and_the_gate_is_as_it_must_be(members, told):
    assert [m.row is not None for m in members] == [k % 5 == 4 for k in range(20)]
    assert len({m.row for m in members}) == 5, "each kind of bad in its turn"
    assert soak_cases.judge(members, told, filling=False) == []


def test_what_is_lost_silent_or_wrongly_refused_is_found(members, told):
    refused = next(m for m in members if m.row and ROWS[m.row].must == "refuse")
    key = soak_cases._key(refused.place.id)
    for spoiled, finding in (
        ({k: v for k, v in told.items() if k != key}, f"lost: {key}"),
        (told | {key: ("accept", "")}, f"silent: {key}"),
        (told | {key: ("refuse", "no reason")}, f"says otherwise: {key}"),
        (told | {members[0].place.id: ("refuse", "empty")}, f"refused: {members[0].place.id} (good)"),
    ):
        (found,) = soak_cases.judge(members, spoiled, filling=False)
        assert found.startswith(finding)


def test_a_voxel_changed_outside_the_hole_is_found(members, tmp_path):
    place = members[0].place
    same = shutil.copy(place.P, tmp_path / "same.nii.gz")
    assert soak_cases.unlike(members[0], same) == []
    other = shutil.copy(place.P, tmp_path / "other.nii.gz")
    place.save(place.x + (place.x == place.x.max()), other)
    assert soak_cases.unlike(members[0], other) == ["other.nii.gz: outside changed"]


def test_blows_are_spread_over_the_whole_run_in_every_way():
    seconds = dict(zip(STAGES, (3.0, 10.0, 5.0, 30.0, 8.0, 6.0), strict=True))
    trials = soak_faults.plan(seconds, 30, seed=0)
    assert {t.stage for t in trials} == set(STAGES) and {t.way for t in trials} == set(soak_faults.WAYS)
    assert all(0 <= t.after_s < seconds[t.stage] for t in trials)
    assert sum(t.twice for t in trials) == 6 and trials == soak_faults.plan(seconds, 30, seed=0)
    assert trials != soak_faults.plan(seconds, 30, seed=1)
