"""Paths are told by names in all that a run keeps, and found again by them."""

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from ldm_lib.data.cohort import find_cases, split_patients
from ldm_lib.errors import RunError
from ldm_lib.experiment import path_aliases, runner
from ldm_lib.experiment.cohort_file import read_cohort, write_cohort
from ldm_lib.experiment.run_folder import read_record

PERSON = "JOHN_DOE 1950"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Names that a test settles are forgotten after it."""
    for name in path_aliases.NAMES.values():
        monkeypatch.setenv(name, "")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "lab"
    folder.mkdir(parents=True)
    return folder


def test_only_paths_that_are_given_get_a_name():
    given = {"data_dir": "/data/x", "conditioning_dir": "", "seed": 3, "run": "lab"}
    assert path_aliases.named(given) == {"data_dir": "$LDM_DATA_DIR", "conditioning_dir": "", "seed": 3, "run": "lab"}


def test_what_is_settled_is_known_to_the_owner_and_the_environment_alone(run_folder, tmp_path):
    path_aliases.settle(run_folder, {"data_dir": str(tmp_path / PERSON), "seed": 1}, {"autoencoder_dir": ""})
    assert path_aliases.places_of(run_folder) == {"LDM_DATA_DIR": str(tmp_path / PERSON)}
    assert os.environ["LDM_DATA_DIR"] == str(tmp_path / PERSON)
    assert stat.S_IMODE((run_folder / path_aliases.FILE).stat().st_mode) == 0o600
    path_aliases.settle(run_folder, {"data_dir": "$LDM_DATA_DIR"})
    assert path_aliases.places_of(run_folder) == {"LDM_DATA_DIR": str(tmp_path / PERSON)}, "a name is not settled again"


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("data/a/a.nii.gz", "$LDM_DATA_DIR/a/a.nii.gz"),
        ("conditioning_data/x.nii.gz", "$LDM_DATA_DIR/../conditioning_data/x.nii.gz"),
        ("maps/x.nii.gz", "$LDM_CONDITIONING_DIR/x.nii.gz"),
    ],
)
def test_a_file_is_told_from_its_place_and_found_again(run_folder, tmp_path, file, told):
    root = tmp_path / PERSON
    for folder in ("data", "maps"):
        (root / folder).mkdir(parents=True)
    path_aliases.settle(run_folder, {"data_dir": str(root / "data"), "conditioning_dir": str(root / "maps")})
    assert path_aliases.told(root / file, run_folder) == told
    assert Path(os.path.normpath(path_aliases.found(told, run_folder))) == root / file


def test_a_place_that_is_not_known_here_is_asked_for(run_folder):
    with pytest.raises(RunError, match=r"^lab: its data lie in \$LDM_DATA_DIR, which is not known here\. Fix: set"):
        path_aliases.found("$LDM_DATA_DIR/a.nii.gz", run_folder)
    assert path_aliases.found("/x/a.nii.gz", run_folder) == Path("/x/a.nii.gz")
    path_aliases.settle(run_folder, {"data_dir": str(run_folder / "gone")})
    with pytest.raises(RunError, match=r"^lab: its folder \$LDM_DATA_DIR is not there any more\. Fix: put it back"):
        path_aliases.found("$LDM_DATA_DIR/a.nii.gz", run_folder)


def test_a_text_tells_the_longest_place_first_and_nothing_that_only_begins_alike(run_folder, tmp_path):
    root = tmp_path / PERSON
    path_aliases.settle(run_folder, {"data_dir": str(root), "conditioning_dir": str(root / "maps")})
    text = f"{root}/a.nii {root}/maps/b.nii {root}2/c.nii {run_folder}/d {sys.prefix}/bin {Path.home()}"
    told = path_aliases.hidden(text, run_folder)
    assert told.startswith("$LDM_DATA_DIR/a.nii $LDM_CONDITIONING_DIR/maps/b.nii".replace("/maps", ""))
    assert told.split()[-3:] == ["lab/d", "$PYTHON/bin", "$HOME"] and f"{PERSON}2/c.nii" in told


def test_a_cohort_is_read_back_wherever_its_data_have_moved(run_folder, cohort_folder, tmp_path):
    data = shutil.copytree(cohort_folder.parent, tmp_path / PERSON) / "data"
    path_aliases.settle(run_folder, {"data_dir": str(data)})
    cases, path = find_cases(data), run_folder / "01_data_audit" / "cohort.json"
    path.parent.mkdir()
    split = split_patients([case.patient for case in cases], seed=0, validation_fraction=0.4)
    write_cohort(path, cases, split, path.parent)
    assert PERSON not in path.read_text() and str(tmp_path) not in path.read_text()
    read = [case for side in read_cohort(path, path.parent) for case in side]
    assert {case.key: case.mask for case in read} == {case.key: case.mask for case in cases}
    moved = (tmp_path / PERSON).rename(tmp_path / "elsewhere") / "data"
    path_aliases.settle(run_folder, {"data_dir": str(moved)})
    again = [c for side in read_cohort(path, path.parent) for c in side]
    assert {c.mask.parent.parent for c in again} == {moved} and all(c.mask.is_file() for c in again)


@pytest.mark.pipeline
def test_a_stage_that_fails_names_no_place_and_no_person_but_in_one_private_file(outputs, cohort_folder, tmp_path):
    """One patient is too few to split: notebook, traceback and log tell of data in a folder with a patient's name."""
    first = sorted(cohort_folder.iterdir())[0].name
    data = tmp_path / PERSON / "data"
    shutil.copytree(cohort_folder / first, data / first)
    command = [f"data_dir={data}", "autoencoder_dir=", "run"]
    with pytest.raises(RunError, match="1 patient, need at least 2"):
        runner.run(["01_data_audit"], name="lab", preset="smoke", overrides={"data_dir": str(data)}, command=command,
                   say=print)  # fmt: skip
    kept = [path for path in outputs.rglob("*") if path.is_file() and path.name != path_aliases.FILE]
    assert {"notebook.partial.ipynb", "log.txt", "run.json", "config.json", "cases.csv"} <= {p.name for p in kept}
    secrets = [
        word.encode() for word in (PERSON, str(tmp_path), sys.prefix, str(Path(path_aliases.__file__).parents[1]))
    ]
    assert not [(path.name, word) for path in kept for word in secrets if word in path.read_bytes()]
    told = ["data_dir=$LDM_DATA_DIR", "autoencoder_dir=", "run"]
    assert read_record(outputs / "lab" / "run.json")["command"] == told
