"""Cases are found by their exact names, checked against each other, and split by patient."""

import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_lib.data.case import Case, load_case
from ldm_lib.data.cohort import audit, find_cases, source_digests, split_patients, survey_cases, with_target
from ldm_lib.errors import InputError
from ldm_lib.experiment.cohort_file import read_cohort, write_cohort
from ldm_lib.images.volume import write_map

SHAPE = (12, 11, 10)
LPS = np.diag([-1.0, -1, 1, 1])
T1N = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
HEALTHY, UNHEALTHY = np.zeros((2, *SHAPE), bool)
HEALTHY[2:5, 2:5, 2:5] = UNHEALTHY[7:10, 6:9, 5:8] = True
MASK = HEALTHY | UNHEALTHY
TISSUE = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
GROWTH = np.where(UNHEALTHY, np.float32(0.7), np.float32(0))
VOXELS = {
    "t1n": T1N,
    "t1n-voided": np.where(MASK, 0, T1N),
    "mask": MASK.astype(np.uint8),
    "mask-healthy": HEALTHY.astype(np.uint8),
    "mask-unhealthy": UNHEALTHY.astype(np.uint8),
}
FIELD = "12x11x10 voxels of 1x1x1 mm are not BraTS's field of view of 240x240x155 mm: out of training domain"
CHALLENGE, SEVERAL = "BraTS-GLI-00007-001", "BraTS2021_00000"


def _write(folder, identity, roles=tuple(VOXELS), *, masks=("",)):
    """A patient folder: t1n once, the other roles for every mask."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in roles:
        for mask in masks if role != "t1n" else ("",):
            write_map(folder / f"{identity}-{role}{mask}.nii.gz", VOXELS[role], LPS)
    return folder


def _write_maps(conditioning, identity):
    for folder, voxels in (("growth_model", GROWTH), ("tissue_segmentation", TISSUE)):
        (conditioning / folder).mkdir(parents=True, exist_ok=True)
        write_map(conditioning / folder / f"{identity}.nii.gz", voxels, LPS)


@pytest.fixture
def data(tmp_path):
    """One patient of three masks in the training layout, one in the challenge layout, maps for both."""
    root = tmp_path / "data"
    _write(root / SEVERAL, SEVERAL, masks=("-0000", "-0001", "-0002"))
    folder = _write(root / CHALLENGE, CHALLENGE)
    write_map(folder / f"{CHALLENGE}-t1n.nii.gz", T1N + np.int16(1), LPS)  # or it were one patient under two names
    write_map(folder / f"{CHALLENGE}-t1n-voided.nii.gz", np.where(MASK, 0, T1N + np.int16(1)), LPS)
    for identity in (SEVERAL, CHALLENGE):
        _write_maps(root / "conditioning_data", identity)
    return root


def _only(root):
    cases, exclusions = survey_cases(root)
    assert exclusions == []
    (case,) = cases
    return case


def test_both_layouts_are_found_with_every_file(data):
    cases, exclusions = survey_cases(data)
    assert exclusions == []
    assert [c.key for c in cases] == [CHALLENGE, f"{SEVERAL}-0000", f"{SEVERAL}-0001", f"{SEVERAL}-0002"]
    assert [c.patient for c in cases] == ["BraTS-GLI-00007", SEVERAL, SEVERAL, SEVERAL]
    assert cases[0].result_name == f"{CHALLENGE}-t1n-inference.nii.gz"
    assert cases[2].result_name == f"{SEVERAL}-t1n-inference-0001.nii.gz"
    maps = data / "conditioning_data"
    assert cases[2].files() == {
        "t1n": data / SEVERAL / f"{SEVERAL}-t1n.nii.gz",
        "t1n_voided": data / SEVERAL / f"{SEVERAL}-t1n-voided-0001.nii.gz",
        "mask": data / SEVERAL / f"{SEVERAL}-mask-0001.nii.gz",
        "mask_healthy": data / SEVERAL / f"{SEVERAL}-mask-healthy-0001.nii.gz",
        "mask_unhealthy": data / SEVERAL / f"{SEVERAL}-mask-unhealthy-0001.nii.gz",
        "growth": maps / "growth_model" / f"{SEVERAL}.nii.gz",
        "tissue": maps / "tissue_segmentation" / f"{SEVERAL}.nii.gz",
    }
    assert cases[0].files()["mask_healthy"].name == f"{CHALLENGE}-mask-healthy.nii.gz"


def test_the_brain_mask_of_a_scan_is_that_of_all_its_masks(data):
    for identity in (SEVERAL, CHALLENGE):
        write_map(data / identity / f"{identity}-brain-mask.nii.gz", np.ones(SHAPE, np.uint8), LPS)
    write_map(data / SEVERAL / f"{SEVERAL}-brain-mask-0001.nii.gz", np.ones(SHAPE, np.uint8), LPS)
    cases, exclusions = survey_cases(data)
    assert exclusions == []
    assert {case.id: case.brain_mask for case in cases} == {
        identity: data / identity / f"{identity}-brain-mask.nii.gz" for identity in (SEVERAL, CHALLENGE)
    }
    assert "their names are not of this case and its masks" in cases[-1].notes[0]


def test_a_loaded_case_is_its_files(data):
    loaded = load_case(find_cases(data)[1])
    np.testing.assert_array_equal(loaded.target, T1N)
    np.testing.assert_array_equal(loaded.voided, np.where(MASK, 0, T1N))
    for found, expected in (
        (loaded.mask, MASK),
        (loaded.healthy, HEALTHY),
        (loaded.unhealthy, UNHEALTHY),
        (loaded.growth, GROWTH),
        (loaded.tissue, TISSUE),
    ):
        np.testing.assert_array_equal(found, expected)
    assert loaded.scale == pytest.approx(np.percentile(T1N[~MASK], 99.5))
    assert loaded.warnings == (FIELD,)
    assert loaded.source.lateral_axis == 0


def test_a_validation_case_has_only_the_voided_image_and_the_mask(tmp_path):
    _write(tmp_path / CHALLENGE, CHALLENGE, ("t1n-voided", "mask"))
    loaded = load_case(_only(tmp_path))
    assert loaded.target is loaded.healthy is loaded.unhealthy is loaded.growth is loaded.tissue is None
    assert loaded.warnings == (FIELD,)


def test_without_a_voided_image_the_full_one_is_voided(tmp_path):
    _write(tmp_path / CHALLENGE, CHALLENGE, ("t1n", "mask"))
    loaded = load_case(_only(tmp_path))
    np.testing.assert_array_equal(loaded.voided, np.where(MASK, 0, T1N))
    np.testing.assert_array_equal(loaded.target, T1N)


def test_what_lies_under_the_mask_is_not_looked_at(tmp_path):
    path = _write(tmp_path / CHALLENGE, CHALLENGE, ("t1n-voided", "mask")) / f"{CHALLENGE}-t1n-voided.nii.gz"
    before = load_case(_only(tmp_path))
    write_map(path, np.where(MASK, 32000, T1N), LPS)
    after = load_case(_only(tmp_path))
    assert after.scale == before.scale
    np.testing.assert_array_equal(after.voided, before.voided)
    assert f"{MASK.sum()} of {MASK.sum()} voxels under the mask were not void; voided here" in after.warnings


def test_images_that_differ_outside_the_mask_are_a_warning(tmp_path):
    folder = _write(tmp_path / CHALLENGE, CHALLENGE)
    other = T1N + np.eye(12, 11, dtype=np.int16)[:, :, None] * ~MASK
    write_map(folder / f"{CHALLENGE}-t1n.nii.gz", other.astype(np.int16), LPS)
    assert "voxels outside the mask differ between t1n" in "; ".join(load_case(_only(tmp_path)).warnings)


@pytest.mark.parametrize("role", ["t1n", "mask-healthy"])
def test_stray_bytes_are_reported_for_every_file(tmp_path, role):
    path = _write(tmp_path / CHALLENGE, CHALLENGE) / f"{CHALLENGE}-{role}.nii.gz"
    path.write_bytes(path.read_bytes() + gzip.compress(b"tail"))
    assert f"{path.name}: 4 bytes after the last voxel are ignored" in load_case(_only(tmp_path)).warnings


CONTRADICTIONS = {
    "healthy outside the mask": ("mask-healthy", np.roll(HEALTHY, 1, 0), r"9 voxels of mask-healthy lie outside"),
    "both": ("mask-unhealthy", MASK, r"27 voxels are both healthy and unhealthy"),
    "not all": ("mask-healthy", HEALTHY & (np.arange(10) > 2), r"9 voxels differ between the mask and healthy \+ unh"),
    "mask of everything": ("mask", MASK | True, r"1266 of 1320 voxels under the mask were not void: it shows the gr"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_rejected(tmp_path, name):
    role, voxels, match = CONTRADICTIONS[name]
    folder = _write(tmp_path / CHALLENGE, CHALLENGE)
    write_map(folder / f"{CHALLENGE}-{role}.nii.gz", voxels.astype(np.int16), LPS)
    with pytest.raises(InputError, match=f"{CHALLENGE}.*{match}"):
        load_case(_only(tmp_path))


def test_the_unhealthy_mask_is_never_taken_for_the_healthy_one(tmp_path):
    _write(tmp_path / CHALLENGE, CHALLENGE, ("t1n-voided", "mask", "mask-unhealthy"))
    case = _only(tmp_path)
    assert case.mask_healthy is None
    assert case.mask_unhealthy.name == f"{CHALLENGE}-mask-unhealthy.nii.gz"
    assert load_case(case).healthy is None


@pytest.mark.parametrize(
    ("roles", "key", "reason"),
    [
        ((), SEVERAL, "no mask file; present: nothing"),
        (("t1n",), SEVERAL, f"no mask file; present: {SEVERAL}-t1n.nii.gz"),
        (("mask",), f"{SEVERAL}-0000", "neither t1n nor t1n-voided next to its mask"),
        (("t1n", "t1n-voided"), f"{SEVERAL}-0000", "no mask file next to its t1n-voided"),
    ],
)
def test_an_incomplete_case_is_excluded_with_its_reason(tmp_path, roles, key, reason):
    _write(tmp_path / CHALLENGE, CHALLENGE)
    _write(tmp_path / SEVERAL, SEVERAL, roles, masks=("-0000",))
    cases, exclusions = survey_cases(tmp_path)
    assert [c.key for c in cases] == [CHALLENGE]
    (exclusion,) = exclusions
    assert exclusion.case == key and exclusion.reason.startswith(f"{SEVERAL}: {reason}. Fix: ")


@pytest.mark.parametrize("name", ["a b", "x\n", "p" * 129, "$(reboot)"])
def test_a_folder_name_that_is_no_patient_id_is_excluded(tmp_path, name):
    _write(tmp_path / CHALLENGE, CHALLENGE)
    _write(tmp_path / name, "a")
    cases, exclusions = survey_cases(tmp_path)
    assert [c.key for c in cases] == [CHALLENGE]
    assert exclusions[0].case == repr(name)
    assert exclusions[0].reason.startswith("folder name is not a patient id: letters, digits")


def test_no_case_at_all_is_an_error_that_lists_what_is_there(tmp_path):
    for k in range(7):
        (tmp_path / f"note{k}.txt").touch()
    with pytest.raises(InputError, match=r"found 0 cases; present: note0\.txt, .*note4\.txt and 2 more\. Fix"):
        find_cases(tmp_path)
    _write(tmp_path / SEVERAL, SEVERAL, ("mask",))
    (tmp_path / SEVERAL / f"{SEVERAL}-mask.nii.gz").rename(tmp_path / SEVERAL / f"{SEVERAL}-mask.NII.GZ")
    with pytest.raises(InputError, match=rf"; {SEVERAL}: {SEVERAL}: neither t1n nor t1n-voided next to its mask"):
        find_cases(tmp_path)


def test_an_unreadable_folder_is_excluded(tmp_path, monkeypatch):
    _write(tmp_path / CHALLENGE, CHALLENGE)
    (tmp_path / SEVERAL).mkdir()
    list_folder = type(tmp_path).iterdir

    def forbid(path):
        if path.name == SEVERAL:
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", forbid)
    _, exclusions = survey_cases(tmp_path)
    reason = "cannot be listed (Permission denied). Fix: check the rights of its folder."
    assert [(e.case, e.reason) for e in exclusions] == [(SEVERAL, reason)]


def test_maps_are_looked_for_inside_next_to_and_in_the_given_folder(data, tmp_path):
    inside = data / "conditioning_data"
    for place in (data.parent / "conditioning_data", data / "maps", tmp_path / "elsewhere"):
        inside.rename(place)
        cases, exclusions = survey_cases(data, "" if place.name == "conditioning_data" else place)
        assert exclusions == []
        assert cases[0].growth == place / "growth_model" / f"{CHALLENGE}.nii.gz"
        inside = place
    assert find_cases(data)[0].growth is None
    with pytest.raises(InputError, match=r"absent: no such folder.*leave CONDITIONING_DIR empty"):
        find_cases(data, data / "absent")


def test_a_row_of_the_audit_says_what_was_read(data):
    (data / "empty").mkdir()
    rows = [row.as_dict() for row in audit(data)]
    assert [row["status"] for row in rows] == ["refused", *["warning"] * 4] and "no mask file" in rows[0]["reason"]
    assert rows[1] == {
        "case": CHALLENGE, "status": "warning", "patient": "BraTS-GLI-00007", "shape": "12x11x10", "spacing_mm": 1.0,
        "orientation": "LPS", "dtype": "int16", "scale": rows[1]["scale"], "mask_ml": 0.1, "healthy_ml": 0.0,
        "growth": True, "tissue": True, "reason": FIELD,
    }  # fmt: skip


def test_the_split_depends_on_ids_and_seed_alone():
    patients = [f"p{k:03d}" for k in range(50)]
    split = split_patients(patients, seed=3, validation_fraction=0.2)
    assert len(split["validation"]) == 10
    assert sorted(split["train"] + split["validation"]) == patients
    shuffled = np.random.default_rng(0).permutation(patients * 3).tolist()
    assert split_patients(shuffled, seed=3, validation_fraction=0.2) == split
    assert split_patients(patients, seed=4, validation_fraction=0.2) != split


def test_neither_side_of_a_split_is_empty():
    for fraction, count in ((0.01, 1), (0.5, 2), (0.99, 2)):
        split = split_patients(["a", "b", "c"], seed=0, validation_fraction=fraction)
        assert (len(split["train"]), len(split["validation"])) == (3 - count, count)
    with pytest.raises(InputError, match="1 patient, need at least 2"):
        split_patients(["a", "a"], seed=0, validation_fraction=0.5)


def test_time_points_and_masks_of_a_patient_stay_together(tmp_path):
    identities = [f"BraTS-GLI-{k:05d}-{t:03d}" for k in range(4) for t in (0, 1)]
    for identity in identities:
        _write(tmp_path / identity, identity, ("t1n", "mask"))
    _write(tmp_path / "PATIENT-100", "PATIENT-100", ("t1n", "mask"), masks=("-0000", "-0001", "-0002"))
    cases = find_cases(tmp_path)
    for seed in range(10):
        split = split_patients((c.patient for c in cases), seed=seed, validation_fraction=0.4)
        write_cohort(tmp_path / "cohort.json", cases, split, tmp_path)
        train, validation = read_cohort(tmp_path / "cohort.json", tmp_path)
        assert len(train) + len(validation) == len(cases) == 11
        for sides in ({c.id[:15] for c in side} for side in (train, validation)):
            assert sides
        assert not {c.id[:15] for c in train} & {c.id[:15] for c in validation}


def test_a_cohort_moves_with_its_run_folder(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    data.rename(run / "data")
    outside = _write(tmp_path / "far" / "BraTS-GLI-00009-000", "BraTS-GLI-00009-000")
    (run / "data" / outside.name).symlink_to(outside)
    cases = find_cases(run / "data")
    cases += find_cases(tmp_path / "far")
    split = split_patients((c.patient for c in cases), seed=0, validation_fraction=0.3)
    write_cohort(run / "cohort.json", cases, split, run)
    text = (run / "cohort.json").read_text()
    moved = run.rename(tmp_path / "moved")
    train, validation = read_cohort(moved / "cohort.json", moved)
    assert {c.patient for c in train} == set(split["train"])
    assert {c.patient for c in validation} == set(split["validation"])
    assert text.count(str(tmp_path)) == 5, "only the five files of the patient outside"
    assert {c.key for c in train + validation} == {c.key for c in cases}
    for case in train + validation:
        for path in case.files().values():
            assert path.is_relative_to(moved) or path.is_relative_to(tmp_path / "far")
            assert path.exists()


def test_a_cohort_is_written_relative_to_a_relative_root(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = find_cases("data")
    split = split_patients((c.patient for c in cases), seed=0, validation_fraction=0.3)
    write_cohort(tmp_path / "cohort.json", cases, split, data.parent)
    assert os.fspath(tmp_path) not in (tmp_path / "cohort.json").read_text()


def test_the_digest_of_a_data_folder_changes_with_any_byte_of_a_case(data):
    assert source_digests("") == {}
    before = source_digests(data)
    (data / SEVERAL / "notes.txt").write_text("not a case's file")
    assert source_digests(data) == before
    write_map(data / "conditioning_data" / "growth_model" / f"{SEVERAL}.nii.gz", GROWTH / 2, LPS)
    changed = source_digests(data)
    assert changed != before
    (data / SEVERAL / f"{SEVERAL}-mask-0001.nii.gz").unlink()
    (data / SEVERAL / f"{SEVERAL}-mask-0001.nii.gz").symlink_to("nowhere")
    assert source_digests(data) not in (before, changed), "a broken link is no reason to crash"


def test_only_cases_with_their_full_image_train():
    known = Case("a", "a", "", Path("t"), Path("v"), Path("m"), None, None, None, None)
    blind = replace(known, id="b", t1n=None)
    assert with_target([blind, known]) == [known]
    with pytest.raises(InputError, match="none of 2 cases has a t1n"):
        with_target([blind, blind])


@pytest.mark.parametrize(("given", "kind"), [("folder", "str"), (3, "int"), ([None], "NoneType")])
def test_what_is_no_case_is_rejected_in_one_line(given, kind):
    with pytest.raises(InputError, match=rf"^cases: needs cases, not {kind}\. Fix: take find_cases\(folder\)\.$"):
        with_target(given)


def test_other_maps_are_checked_and_replace_those_of_a_case(cases):
    data = load_case(cases[0])
    growth = np.zeros(data.mask.shape)
    with pytest.raises(TypeError, match="mask"):
        data.with_maps(mask=data.mask)
    other = data.with_maps(growth=growth.tolist())
    assert other.growth.dtype == np.float32 and not other.growth.any() and other.tissue is data.tissue
    without = other.with_maps(growth=None, tissue=None)
    assert (without.growth, without.tissue) == (None, None)
    np.testing.assert_array_equal(data.affine, data.source.affine)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("growth", lambda a: a[1:], r"growth map of \S+: shape \(29, 30, 20\), but the case has \(30, 30, 20\)"),
        ("growth", lambda a: a * np.nan, r"values from nan to nan, must lie in \[0, 1\]"),
        ("tissue", lambda a: a * 0 + 7, r"tissue map of \S+: labels 7 \(\d+ voxels\) are not among \(0, 1, 2, 3\)"),
    ],
)
def test_maps_of_another_shape_or_range_are_rejected(cases, kind, change, match):
    data = load_case(cases[0])
    with pytest.raises(InputError, match=match):
        data.with_maps(**{kind: change(getattr(data, kind))})


def test_maps_are_rejected_out_of_range_and_resampled_from_another_grid(data):
    case = find_cases(data)[0]
    write_map(case.growth, GROWTH * 2, LPS)
    with pytest.raises(InputError, match=r"values from 0 to 1\.4, must lie in \[0, 1\]"):
        load_case(case)
    write_map(case.growth, GROWTH, LPS)
    write_map(case.tissue, TISSUE + np.uint8(1), LPS)
    with pytest.raises(InputError, match=r"labels 4 \(\d+ voxels\) are not among \(0, 1, 2, 3\)"):
        load_case(case)
    shifted = LPS.copy()
    shifted[0, 3] = 1
    write_map(case.tissue, TISSUE, shifted)
    assert any("resampled from its grid" in warning for warning in load_case(case).warnings)


def test_a_voided_image_without_its_mask_is_excluded_and_the_others_stay(data):
    (data / SEVERAL / f"{SEVERAL}-mask-0001.nii.gz").unlink()
    cases, exclusions = survey_cases(data)
    assert [c.index for c in cases] == ["", "0000", "0002"]
    assert [e.case for e in exclusions] == [f"{SEVERAL}-0001"]


def test_a_map_that_only_some_cases_lack_is_a_warning_of_the_audit(data):
    maps = sorted((data / "conditioning_data" / "growth_model").iterdir())
    maps[0].unlink()
    lacking = [row.reason for row in audit(data)]
    assert "no growth map, which other cases have" in "".join(lacking) and FIELD in lacking
    shutil.rmtree(data / "conditioning_data")
    assert {row.reason for row in audit(data)} == {FIELD}
