"""Folders of cases that are wrong as a set: nothing found, cases twice, files that change, paths written oddly."""

import gzip
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import spoilt
from bad_places import Place

from ldm_lib.__main__ import main
from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import audit, find_cases, split_patients
from ldm_lib.errors import InputError
from ldm_lib.experiment.cohort_file import read_cohort, write_cohort
from ldm_lib.images.options import ReadOptions

FIRST, SECOND = "BraTS-GLI-00001-000", "BraTS-GLI-00002-000"

pytestmark = pytest.mark.usefixtures("outputs")


def error_line(root: Path | str, capsys) -> str:
    """What `validate` says, in one line, of a folder that it cannot work on at all."""
    assert main(["validate", str(root)]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("ERROR ") and " Fix: " in line
    return line


# ---- no case at all


def _ordinary(folder: Path, identity: str) -> Place:
    """A folder of BraTS as it comes: a t1n and a segmentation, no mask."""
    place = Place(folder, identity, complete=True)
    for role in ("t1n-voided", "mask", "mask-healthy", "mask-unhealthy"):
        place.paths[role].unlink()
    for contrast in ("t1c", "t2w", "t2f"):
        place.save(place.head.t1n, place.folder / f"{identity}-{contrast}.nii.gz")
    place.save(np.where(place.m > 0, 3, 0).astype(np.uint8), place.folder / f"{identity}-seg.nii.gz")
    return place


def test_the_segmentations_of_ordinary_folders_are_masks_by_their_labels(tmp_path, capsys):
    place = _ordinary(tmp_path, FIRST)
    assert main(["validate", str(tmp_path)]) == 1
    assert "name the labels of its segmentation to inpaint, such as --mask-labels 1,2,3" in capsys.readouterr().out
    assert main(["validate", str(tmp_path), "--mask-labels", "1,2,3"]) == 0
    (case,) = find_cases(tmp_path, read_options=ReadOptions(mask_labels="1,2,3"))
    np.testing.assert_array_equal(load_case(case).mask, place.m > 0)
    (mask,) = find_cases(Place(tmp_path / "with", SECOND).root, read_options=ReadOptions(mask_labels="1"))
    assert mask.mask.name == f"{SECOND}-mask.nii.gz"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_folder_that_is_too_high_is_named_with_the_right_one(tmp_path, capsys, depth):
    inner = tmp_path.joinpath(*["a", "b"][:depth])
    _ordinary(inner, FIRST)
    assert main(["validate", str(tmp_path), "--mask-labels", "3"]) == 1
    assert f"Fix: give the folder {inner.relative_to(tmp_path)}, " in capsys.readouterr().out


def test_folders_of_operating_systems_are_passed_over(tmp_path):
    Place(tmp_path, FIRST)
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".Trashes"):
        (tmp_path / name / FIRST).mkdir(parents=True)
        (tmp_path / name / FIRST / f"._{FIRST}-mask.nii.gz").write_bytes(b"Mac OS X")
    (tmp_path / FIRST / f"._{FIRST}-mask.nii.gz").write_bytes(b"Mac OS X")
    rows = list(audit(tmp_path))
    assert [(row.key, row.status) for row in rows] == [(FIRST, "ok")]


def test_the_error_of_a_folder_without_cases_names_what_was_looked_for_and_what_is_there(tmp_path, capsys):
    for name in ("notes.txt", "scan.nii.gz"):
        (tmp_path / name).touch()
    assert re.search(r"looked for .*mask.*found 0.*present: notes\.txt, scan\.nii\.gz", error_line(tmp_path, capsys))


def test_a_missing_folder_and_a_file_in_its_place_are_errors(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "absent: no such folder" in error_line(tmp_path / "absent", capsys)
    assert "file: is a file" in error_line(tmp_path / "file", capsys)
    assert "no folder of cases is given" in error_line("", capsys)


def test_findings_are_never_written_among_the_cases(tmp_path, capsys):
    place = Place(tmp_path / "data", FIRST)
    before = place.K.read_bytes()
    assert main(["validate", str(place.root), "--json", str(place.K)]) == 1
    assert "lies inside the folder of cases" in capsys.readouterr().err and place.K.read_bytes() == before
    assert main(["validate", str(place.root), "--json", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "", "reported before the first case is read"


def test_names_with_control_or_undecodable_characters_are_printed_escaped(tmp_path, capsys):
    place = Place(tmp_path, FIRST)
    for name in (b"x\xff-mask.nii.gz", b"evil\x1b[2J\nOK all fine-mask.nii.gz"):
        Path(os.fsdecode(os.fsencode(place.folder) + b"/" + name)).touch()
    assert main(["validate", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    out.encode("utf-8", "strict")
    assert len(out.splitlines()) == 2 and "\x1b" not in out
    assert "x\\udcff-mask.nii.gz" in out and "evil\\x1b[2J\\nOK all fine-mask.nii.gz" in out


def test_names_that_nearly_match_are_reported(tmp_path):
    place = Place(tmp_path, FIRST, complete=True)
    place.move("mask-healthy", f"{FIRST}-mask_healthy.nii.gz")
    place.move("mask-unhealthy", f"{FIRST}-mask-unhealthy-0000.nii.gz")
    (tmp_path / f"{SECOND}-t1n-voided.nii.gz").touch()
    (row,) = audit(tmp_path)
    assert all(name in row.reason for name in (f"{FIRST}-mask_healthy.nii.gz", f"{FIRST}-mask-unhealthy-0000.nii.gz"))
    assert f"not in a folder of a case: {SECOND}-t1n-voided.nii.gz" in row.reason


def test_maps_are_distinguished_by_their_folders(tmp_path, cohort_folder):
    """Both maps of a case have the same name; links out of the data are reported."""
    data = shutil.copytree(cohort_folder, tmp_path / "in" / "data")
    maps = shutil.copytree(cohort_folder.parent / "conditioning_data", tmp_path / "in" / "conditioning_data")
    identity = find_cases(data)[0].id
    for folder in ("growth_model", "tissue_segmentation"):
        (maps / folder / f"{identity}.nii.gz").rename(tmp_path / f"{folder}.nii.gz")
        (maps / folder / f"{identity}.nii.gz").symlink_to(tmp_path / f"{folder}.nii.gz")
    first = next(iter(audit(data)))
    for message in (
        f"growth_model/{identity}.nii.gz is a link out of the data folder",
        f"tissue_segmentation/{identity}.nii.gz is a link out of the data folder",
    ):
        assert message in first.reason


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_an_unexpected_error_while_reading_excludes_only_its_case(tmp_path, monkeypatch, error):
    for identity in (FIRST, SECOND):
        Place(tmp_path, identity)

    def fails(case):
        if case.id == FIRST:
            raise error
        return load_case(case)

    monkeypatch.setattr("ldm_lib.data.cohort.load_case", fails)
    first, second = audit(tmp_path)
    assert first.status == "refused" and type(error).__name__ in first.reason and second.status != "refused"


def test_the_files_of_another_id_are_named(tmp_path, capsys):
    Place(tmp_path, FIRST)
    Place(tmp_path, SECOND).folder.rename(tmp_path / "BraTS-GLI-00003-000")
    assert main(["validate", str(tmp_path)]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "BraTS-GLI-00003-000" in line)
    assert "ERROR BraTS-GLI-00003-000: " in line and f"{SECOND}-mask.nii.gz" in line


# ---- the same case twice


def copied(first: Place, second: Place, *, level: int) -> None:
    """The voxels of the first in every file of the second, in other bytes."""
    for role, path in second.paths.items():
        path.write_bytes(gzip.compress(gzip.decompress(first.paths[role].read_bytes()), level))


def test_one_patients_voxels_under_two_ids_are_rejected(tmp_path):
    """By the voxels, not the bytes of header and file: else the one may train and the other validate."""
    first, second = Place(tmp_path, FIRST, complete=True), Place(tmp_path, SECOND, complete=True)
    for role, path in second.paths.items():
        voxels = np.frombuffer(gzip.decompress(first.paths[role].read_bytes())[352:], "u1" if "mask" in role else "<i2")
        second.save(voxels.reshape(second.x.shape, order="F").astype(">i4"), path)
    one, other = audit(tmp_path)
    assert one.status != "refused" and other.status == "refused"
    assert SECOND in other.reason and re.search(rf"same .*{FIRST}", other.reason)


def test_voxels_under_two_ids_may_be_inpainted(tmp_path):
    """Without a full image neither trains nor validates."""
    copied(Place(tmp_path, FIRST), Place(tmp_path, SECOND), level=9)
    assert all(row.status != "refused" for row in audit(tmp_path))


def test_masks_and_time_points_of_one_patient_are_no_copies(tmp_path):
    two_masks = Place(tmp_path, "BraTS2021_00000", complete=True)
    for role, path in two_masks.paths.items():
        if role != "t1n":
            path.with_name(f"{two_masks.id}-{role}-0001.nii.gz").write_bytes(path.read_bytes())
            path.rename(path.with_name(f"{two_masks.id}-{role}-0000.nii.gz"))
    copied(Place(tmp_path, FIRST, complete=True), Place(tmp_path, "BraTS-GLI-00001-001", complete=True), level=1)
    rows = list(audit(tmp_path))
    assert len(rows) == 4 and all(row.status != "refused" for row in rows), "always on one side of a split"


# ---- a file that changes


@pytest.mark.parametrize("role", ["t1n", "t1n-voided", "mask", "mask-healthy"])
def test_a_file_that_changes_during_a_run_excludes_its_case(tmp_path, role):
    root = tmp_path / "data"
    changed, kept = Place(root, FIRST, complete=True), Place(root, SECOND, complete=True)
    cases = find_cases(root)
    split = split_patients((case.patient for case in cases), seed=0, validation_fraction=0.5)
    write_cohort(tmp_path / "cohort.json", cases, split, tmp_path)
    path = changed.paths[role]
    before = path.stat()
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content, 1, mtime=1))  # the same voxels, size and, below, time
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = {case.id: case for side in read_cohort(tmp_path / "cohort.json", tmp_path) for case in side}
    with pytest.raises(InputError, match=rf"{re.escape(path.name)}.*changed since"):
        load_case(found[FIRST])
    np.testing.assert_array_equal(load_case(found[SECOND]).source.voxels, kept.x)


# ---- the path of the folder


def test_a_path_may_have_a_tilde_spaces_brackets_and_a_slash_at_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    Place(tmp_path / "my [data] é *", FIRST, complete=True)
    Place(tmp_path / "my data", SECOND, complete=True)
    for path in (
        "~/my [data] é *",
        "~/my [data] é */",
        f"{tmp_path}/my [data] é *//",
        f"{tmp_path}/x/../my [data] é *",
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert main(["validate", path]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [FIRST in line for line in lines[:-1]] == [True], "never a glob"


def test_a_variable_in_a_path_is_what_the_environment_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA", str(tmp_path))
    Place(tmp_path / "cases", FIRST, complete=True)
    assert main(["validate", "$DATA/cases"]) == 0
    assert FIRST in capsys.readouterr().out
    assert "$ABSENT: no such folder" in error_line(Path("$ABSENT"), capsys)


def test_nothing_is_written_next_to_the_data(tmp_path):
    """So that a read-only mount will do."""
    root = tmp_path / "data"
    Place(root, FIRST, complete=True)
    spoilt("truncated gz", root, SECOND)
    before = _listing(root)
    for folder in (path for path in [root, *root.rglob("*")] if path.is_dir()):
        folder.chmod(0o555)
    try:
        assert main(["validate", str(root), "--json", str(tmp_path / "found.json")]) == 1
    finally:
        for folder in (path for path in [root, *root.rglob("*")] if path.is_dir()):
            folder.chmod(0o755)
    assert _listing(root) == before


def _listing(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


# ---- more laws


def test_a_case_alone_is_a_cohort(tmp_path, capsys):
    Place(tmp_path, FIRST, complete=True)
    assert main(["validate", str(tmp_path)]) == 0
