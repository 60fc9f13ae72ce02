"""Cohorts of healthy scans: rigid, nothing leaks, equal bytes on every way, exclusions with their numbers."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fast_workers
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm_lib.__main__ import main
from ldm_lib.anatomy.atlas import mni152
from ldm_lib.anatomy.registration import register
from ldm_lib.anatomy.synthetic_brain import ATLAS_CENTRE_VOX, CENTRE_MM, brats_grid
from ldm_lib.anatomy.tissue_segmentation import tissue_from_scan
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD
from ldm_lib.data import scan_cohort as module
from ldm_lib.data.alignment import align, rigid_map
from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import survey_cases
from ldm_lib.data.layouts import list_scans
from ldm_lib.data.patients import patient_of
from ldm_lib.data.person import MASK_ML, align_head, read_head
from ldm_lib.data.scan_cohort import make_scan_cohort
from ldm_lib.data.synthetic_cohort import make_patient
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.images.volume import intensity_scale, write_map

SPACING_MM = 8.0
make_person = module.make_person  # before any test replaces it
SETTINGS = {"masks": 2, "spacing_mm": SPACING_MM, "draw": fast_workers.draw}
CASES = ["sub-01_ses-1", "sub-01_ses-2"]


def rigid(degrees, shift_mm):
    """A rotation about an oblique axis through the world's origin, and a translation: (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.array([1, 2, -2]) / 3 * degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def save(path, voxels, affine, orientation="LPS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", orientation)))
    image = nib.Nifti1Image(voxels, affine).as_reoriented(turn)
    write_map(path, np.asarray(image.dataobj), image.affine)
    return path


@pytest.fixture(scope="module")
def brains():
    """Two brains of 8 mm voxels, int16 (30 30 20), and their affine."""
    made = [make_patient(0, patient, spacing_mm=SPACING_MM, masks=0) for patient in (8000, 8001)]
    return [patient.t1n for patient in made], made[0].affine


@pytest.fixture(scope="module")
def scans(tmp_path_factory, brains):
    """A BIDS data set: one person twice, on odd grids, a whole head, and a brain that is stored upside down."""
    folder, ((first, second), affine) = tmp_path_factory.mktemp("scans"), brains
    moved = rigid(12, (30, -20, 10)) @ affine
    save(folder / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", first[2:-3, 1:], moved @ shift(2, 1, 0), "SLA")
    save(folder / "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii", (second / 7).astype(np.float32), affine, "RAS")
    save(
        folder / "sub-02/anat/sub-02_T1w.nii.gz",
        first + 1 + np.arange(first.size, dtype=np.int16).reshape(first.shape) % 5,
        affine,
    )
    over = np.diag([1.0, -1, -1, 1])
    centre = affine @ [14.5, 14.5, 9.5, 1]
    over[:3, 3] = centre[:3] - over[:3, :3] @ centre[:3]
    save(folder / "sub-03/anat/sub-03_T1w.nii.gz", second, over @ affine)
    return folder


def shift(*voxels):
    matrix = np.eye(4)
    matrix[:3, 3] = voxels
    return matrix


@pytest.fixture(scope="module")
def made(tmp_path_factory, scans, fast_registration):
    """The cohort of `scans`: its folder, rows and exclusions."""
    folder = tmp_path_factory.mktemp("people")
    with fast_registration():
        return folder, *make_scan_cohort(scans, folder, **SETTINGS)


@pytest.fixture(scope="module")
def people(made):
    """(person, mask) -> the arrays of a case, read as users read them."""
    cases, exclusions = survey_cases(made[0] / "data")
    assert not exclusions and [case.id for case in cases] == sorted(2 * CASES)
    return [load_case(case) for case in cases]


def content(folder):
    """Name -> bytes of every file but pictures and locks."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(("pictures", ".lock"))}


# ---- the position


@pytest.mark.parametrize("spacing_mm", [1.0, SPACING_MM])
def test_the_rigid_map_has_the_rotation_of_the_affine_map_and_keeps_the_place_of_the_centre(spacing_mm):
    turn, stretch = rigid(35, (4, 5, -60)), np.diag([1.1, 0.9, 1.05, 1])
    stretch[0, 1] = stretch[1, 0] = 0.1  # symmetric and positive: a pure stretch, in whatever order
    grid = brats_grid(spacing_mm)
    for to_atlas in (stretch @ turn, turn @ stretch):
        fit = SimpleNamespace(atlas=mni152(), start=to_atlas)
        found = rigid_map(fit, grid)
        np.testing.assert_allclose(found[:3, :3], turn[:3, :3], atol=1e-12)
        centre = np.linalg.solve(to_atlas, mni152().affine @ [*ATLAS_CENTRE_VOX, 1])
        voxel = np.linalg.solve(grid.affine, found @ centre)[:3]
        np.testing.assert_allclose((voxel + 0.5) * spacing_mm, CENTRE_MM)


def test_a_known_rotation_and_translation_is_undone_and_the_size_is_kept(brains):
    (brain, _), affine = brains
    grid, found, centres = brats_grid(SPACING_MM), [], []
    for move in (np.eye(4), rigid(25, (40, -30, 20))):
        image, nothing = brain.astype(np.float32), np.zeros(brain.shape, bool)
        fit = register(image / intensity_scale(image, nothing), move @ affine, nothing)
        aligned = align(image, fit, grid)
        assert (aligned.image > 0).sum() == pytest.approx((brain > 0).sum(), rel=0.02)
        assert aligned.outside == 0 and aligned.image[aligned.image > 0].min() >= brain[brain > 0].min()
        found.append(aligned)
        centres.append(
            aligned.rigid @ move @ affine @ np.vstack([np.argwhere(brain > 0).T, np.ones((brain > 0).sum())])
        )
    assert np.linalg.norm(centres[0] - centres[1], axis=0).max() < SPACING_MM
    assert found[1].turned_degrees == pytest.approx(25, abs=8)
    both = (found[0].image > 0) & (found[1].image > 0)
    assert 2 * both.sum() / sum((each.image > 0).sum() for each in found) > 0.93
    assert np.corrcoef(found[0].image[both], found[1].image[both])[0, 1] > 0.8


def test_a_scan_that_lies_in_the_grid_already_is_returned_as_it_is(brains):
    (brain, _), affine = brains
    grid = brats_grid(SPACING_MM)
    centre = affine @ [*(np.array(CENTRE_MM) / SPACING_MM - 0.5), 1]
    atlas = mni152()
    to_scan = np.eye(4)
    to_scan[:3, 3] = (centre - atlas.affine @ [*ATLAS_CENTRE_VOX, 1])[:3]
    fit = register(brain / 1000, affine, np.zeros(brain.shape, bool))
    placed = replace(fit, start=np.linalg.inv(to_scan))
    aligned = align(brain.astype(np.float32), placed, grid)
    np.testing.assert_allclose(aligned.image, brain, atol=1e-3 * brain.max())
    np.testing.assert_array_equal(aligned.image > 0, brain > 0)


# ---- the cases


def test_the_files_are_of_the_training_layout_on_the_brats_grid(made, people):
    grid = brats_grid(SPACING_MM)
    for data in people:
        np.testing.assert_allclose(data.affine, grid.affine)
        assert data.source.raw.dtype == np.int16 and data.source.shape == grid.shape and data.warnings == ()
        assert data.case.patient == "sub-01"  # both time points are on one side of the split
        assert data.target.min() == 0 and data.target.max() < 3000
        np.testing.assert_array_equal(data.voided, np.where(data.mask, 0, data.target))
        np.testing.assert_array_equal(data.mask, data.healthy | data.unhealthy)
    assert not (made[0] / module.STAGING).exists() and not list(made[0].rglob("*.part"))


def hidden_in(people):
    """Id -> the voxels that any mask of this scan hides."""
    return {case: np.any([data.mask for data in people if data.case.id == case], axis=0) for case in CASES}


def test_there_is_nothing_outside_the_brain(people):
    for data in people:
        brain, visible = data.target > 0, ~hidden_in(people)[data.case.id]
        assert ndimage.label(brain)[1] == 1 and not data.growth[~brain].any()
        np.testing.assert_array_equal(data.tissue[visible] > 0, brain[visible])


def test_masks_follow_the_rules_of_the_challenge(people):
    for data in people:
        assert data.unhealthy[data.growth >= GROWTH_THRESHOLD].all() and data.unhealthy.any()
        assert not (data.healthy & data.unhealthy).any()
        assert ndimage.distance_transform_edt(~data.unhealthy, sampling=SPACING_MM)[data.healthy].min() >= 5
        assert (data.target > 0)[data.healthy].mean() >= 0.75
        assert MASK_ML[0] <= data.healthy.sum() * SPACING_MM**3 / 1000 <= MASK_ML[1]
    assert len({data.healthy.tobytes() for data in people}) == len(people)


def test_a_tumour_is_drawn_only_where_it_has_grown(made, scans, fast_registration, monkeypatch):
    """By the person's own tissues: as dark as its grey matter, or as its CSF."""
    monkeypatch.setattr("ldm_lib.data.person.draw_tumour", lambda values, *_: values)
    scan = list_scans(scans)[0]
    with fast_registration():
        healthy = module._make(scan, masks=2, seed=0, spacing_mm=SPACING_MM).made
    data = load_case(survey_cases(made[0] / "data")[0][0])
    changed = data.target != healthy.t1n
    assert changed.any() and (data.growth[changed] >= GROWTH_THRESHOLD).all()
    assert data.target[changed].mean() < healthy.t1n[changed].mean()


def test_the_tissue_map_is_made_from_what_no_mask_hides(people, fast_registration):
    first, hidden = people[0], hidden_in(people)[CASES[0]]
    image = first.target.copy()
    image[hidden] = np.random.default_rng(0).uniform(1, 2000, hidden.sum())  # must change nothing
    scale = intensity_scale(np.where(hidden, 0, image), hidden)
    with fast_registration():
        found = tissue_from_scan(np.where(hidden, 0, image) / scale, first.affine, hidden, refine="none")
    np.testing.assert_array_equal(found.labels, first.tissue)
    assert np.unique(first.tissue[hidden]).size > 1


# ---- equal bytes on every way


def test_one_or_two_workers_give_equal_bytes(made, scans, tmp_path):
    make_scan_cohort(scans, tmp_path, **SETTINGS, workers=2)
    assert content(tmp_path) == content(made[0])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"{case}.png" for case in [*CASES, "sub-03"]}


def counted(monkeypatch):
    """The ids of the people that are made from now on."""
    made = []
    monkeypatch.setattr(
        module, "make_person", lambda *args, **kwargs: made.append(args[1]) or make_person(*args, **kwargs)
    )
    return made


@pytest.fixture
def copied(made, tmp_path):
    """A finished cohort that a test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "people"))


@pytest.mark.parametrize("where", ["write_training_files", "_publish"])
def test_an_interruption_leaves_no_half_person_and_changes_no_byte(
    made, scans, copied, fast_registration, monkeypatch, where
):
    shutil.rmtree(copied / "data" / CASES[1])  # as if it had not been made yet
    real = getattr(module, where)

    def interrupted(*args):
        real(*args) if where == "write_training_files" else move_maps(*args)
        raise KeyboardInterrupt

    def move_maps(folder, identity, staging):
        for path in (staging / "conditioning_data").rglob(f"{identity}.nii.gz"):
            path.rename(folder / path.relative_to(staging))

    with fast_registration(), monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, where, interrupted)
        make_scan_cohort(scans, copied, **SETTINGS)
    assert [path.name for path in (copied / "data").iterdir()] == CASES[:1]
    assert not (copied / module.STAGING).exists()
    again = counted(monkeypatch)
    with fast_registration():
        make_scan_cohort(scans, copied, **SETTINGS)
    assert again == CASES[1:] and content(copied) == content(made[0])


def test_a_person_is_made_again_only_if_something_has_changed(scans, copied, fast_registration, monkeypatch, tmp_path):
    source = Path(shutil.copytree(scans, tmp_path / "source"))
    made = counted(monkeypatch)

    def people(**changes):
        made.clear()
        with fast_registration():
            make_scan_cohort(source, copied, **SETTINGS | changes)
        return list(made)

    assert people() == [] and people(masks=1, limit=1) == CASES[:1]
    assert len(list((copied / "data" / CASES[0]).glob("*-mask-0*"))) == 1
    next(copied.glob(f"conditioning_data/*/{CASES[1]}.nii.gz")).write_bytes(b"")
    assert people() == CASES
    (scan,) = source.glob("*/*/*/sub-01_ses-2*")
    save(scan, np.asarray(nib.load(scan).dataobj) * 2, nib.load(scan).affine)
    assert people() == CASES[1:]
    (copied / "data" / CASES[0] / f"{CASES[0]}.json").unlink()
    with pytest.raises(InputError, match=f"{CASES[0]}: exists and was not made from a scan. Fix: name another output"):
        people()


# ---- what is excluded, and why


def test_exclusions_state_their_numbers_and_keep_a_picture(made, scans, monkeypatch):
    folder, rows, exclusions = made
    assert [row["case"] for row in rows] == CASES and [e.case for e in exclusions] == ["sub-02", "sub-03"]
    head, over = (e.reason for e in exclusions)
    assert head == ("sub-02_T1w.nii.gz: not skull-stripped: 9.22 litres are not 0, a brain has at most 2.5. "
                    "Fix: strip the skull, for example with SynthStrip or HD-BET.")  # fmt: skip
    assert (
        "sub-03_T1w.nii.gz: the atlas does not fit: it fits better as LPS than as stated, LAI (correlation 0." in over
    )
    assert str(scans) not in over
    with (folder / "exclusions.csv").open() as stream:
        assert [row["reason"] for row in csv.DictReader(stream)] == [head, over]
    with (folder / "cohort.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert table[0]["orientation"] == "SLA" and table[0]["spacing_mm"] == "8x8x8" and table[1]["patient"] == "sub-01"
    assert (folder / "pictures" / "sub-03.png").is_file() and not (folder / "pictures" / "sub-02.png").exists()
    assert json.loads((folder / "excluded" / "sub-03.json").read_text())["excluded"] == over
    monkeypatch.setattr(module, "read_head", None)  # nothing is read again
    assert make_scan_cohort(scans, folder, **SETTINGS)[1] == exclusions


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v[:, :, 8:], r"the field of view of 240x240x96 mm is too small: \d\d+ cm2 of the brain lie on its "),
        (lambda v: v * (np.arange(30) < 10)[:, None, None], r"0\.\d\d litres of brain, expected at least 0.6"),
        (lambda v: np.where(v > 0, v - np.float32(np.median(v[v > 0])), 0), r"\d\d% of the voxels that are not 0"),
        (lambda v: v * 0, "the image is empty"),
    ],
)  # fmt: skip
def test_a_scan_without_a_whole_stripped_brain_is_rejected(brains, tmp_path, change, reason):
    (brain, _), affine = brains
    with pytest.raises(InputError, match=reason):
        read_head(save(tmp_path / "a.nii.gz", change(brain), affine))


def test_islands_that_the_strip_has_left_are_dropped(brains, tmp_path):
    (brain, _), affine = brains
    dirty = brain.copy()
    dirty[0:2, 0:2, 0:2] = 500
    clean, found = (read_head(save(tmp_path / f"{k}.nii.gz", v, affine)) for k, v in enumerate((brain, dirty)))
    np.testing.assert_array_equal(found.image, clean.image)
    np.testing.assert_array_equal(found.affine, clean.affine)


def test_a_brain_that_the_grid_cuts_is_rejected(brains, tmp_path, fast_registration):
    (brain, _), affine = brains
    head = read_head(save(tmp_path / "a.nii.gz", brain, affine))
    with fast_registration():
        fit = head.register()
    low = brats_grid(SPACING_MM)._replace(shape=(30, 30, 12))
    with pytest.raises(InputError, match=r"a: the grid of 240x240x155 mm cuts the brain: \d+\.\d% of it lie outside"):
        align_head(head, fit, low, where="a")


def test_without_a_usable_scan_there_is_no_cohort(scans, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    head = list_scans(scans)[2].path
    (source / head.name).write_bytes(head.read_bytes())
    with pytest.raises(InputError, match=r"0 of 1 scans are usable\. Fix: see exclusions\.csv"):
        make_scan_cohort(source, tmp_path / "out", **SETTINGS)
    assert "9.22 litres" in (tmp_path / "out" / "exclusions.csv").read_text()
    assert (tmp_path / "out" / "cohort.csv").read_text().strip() == ",".join(module.COLUMNS)


# ---- names


def test_ids_are_those_of_the_file_names(tmp_path):
    names = {"a_T1w.nii.gz": "a", "BraTS-GLI-00001-002-t1n.nii.gz": "BraTS-GLI-00001-002"}
    names |= {"sub-7_run-1_T1w.nii": "sub-7", "sub-8.nii": "sub-8"}
    for name in [*names, ".hidden.nii.gz", "notes.txt", "b (1).nii.gz", "c.nii.gz.part"]:
        (tmp_path / name).write_text("")
    assert {scan.path.name: scan.id for scan in list_scans(tmp_path)} == names
    ids = ["BraTS-GLI-00001-002", "sub-7_ses-a", "sub-7", "a"]
    assert [patient_of(identity) for identity in ids] == ["BraTS-GLI-00001", "sub-7", "sub-7", "a"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["sub-1_T1w.nii", "sub-1_run-2_T1w.nii"], [], "two files of one id, sub-1: sub-1_T1w.nii and sub-1_run-2_T1w"),
        (["a b.nii"], [], "a b.nii: its name is no id: letters, digits"),
        (["notes.txt"], [], r"0 scans found \(\*.nii.gz, .*\); present: notes.txt. Fix: give a folder"),
        (None, [], "nowhere: no such folder. Fix: give a folder of skull-stripped T1w, or a BIDS data set"),
        (["a.nii"], ["--masks", "9"], "--masks 9: allowed: integer from 1 to 8. Fix: see `ldm cohort"),
        (["a.nii"], ["--output", "{source}/out"], "lies inside the folder of cases"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(tmp_path, capsys, outputs, names, options, message):
    source = tmp_path / ("nowhere" if names is None else "source")
    for name in names or ():
        source.mkdir(exist_ok=True)
        (source / name).write_text("")
    words = ["cohort", "--from", str(source), "--output", str(tmp_path / "out")]
    assert main([*words, *(word.format(source=source) for word in options)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ERROR ") and re.search(message, line), line


def test_numbers_out_of_range_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"make_scan_cohort: masks 0, .* given; allowed are masks 1 to 8"):
        make_scan_cohort(tmp_path, tmp_path / "out", masks=0)
