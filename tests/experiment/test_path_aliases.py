"""Paths are replaced by aliases in all that a run keeps, and can be restored from them."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from ldm_lib.data.cohort import find_cases, split_patients
from ldm_lib.errors import InputError, RunError
from ldm_lib.experiment import path_aliases, runner
from ldm_lib.experiment.cohort_file import read_cohort, write_cohort
from ldm_lib.experiment.run_folder import read_record

PERSON = "JOHN_DOE 1950"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Aliases that a test sets are forgotten after it."""
    for name in path_aliases.ALIASES.values():
        monkeypatch.setenv(name, "")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "lab"
    folder.mkdir(parents=True)
    return folder


def test_only_paths_that_are_given_get_an_alias():
    given = {"data_dir": "/data/x", "conditioning_dir": "", "seed": 3, "run": "lab"}
    assert path_aliases.with_aliases(given) == {
        "data_dir": "$LDM_DATA_DIR",
        "conditioning_dir": "",
        "seed": 3,
        "run": "lab",
    }


def test_paths_are_kept_in_one_private_file_and_in_the_environment(run_folder, tmp_path):
    path_aliases.remember_paths(run_folder, {"data_dir": str(tmp_path / PERSON), "seed": 1}, {"autoencoder_dir": ""})
    assert path_aliases.known_paths(run_folder) == {"LDM_DATA_DIR": str(tmp_path / PERSON)}
    assert os.environ["LDM_DATA_DIR"] == str(tmp_path / PERSON)
    assert stat.S_IMODE((run_folder / path_aliases.FILE).stat().st_mode) == 0o600
    path_aliases.remember_paths(run_folder, {"data_dir": "$LDM_DATA_DIR"})
    assert path_aliases.known_paths(run_folder) == {"LDM_DATA_DIR": str(tmp_path / PERSON)}, "an alias is not a path"


@pytest.mark.parametrize(
    ("file", "alias"),
    [
        ("data/a/a.nii.gz", "$LDM_DATA_DIR/a/a.nii.gz"),
        ("conditioning_data/x.nii.gz", "$LDM_DATA_DIR/../conditioning_data/x.nii.gz"),
        ("maps/x.nii.gz", "$LDM_CONDITIONING_DIR/x.nii.gz"),
    ],
)
def test_a_path_is_restored_from_its_alias(run_folder, tmp_path, file, alias):
    root = tmp_path / PERSON
    for folder in ("data", "maps"):
        (root / folder).mkdir(parents=True)
    path_aliases.remember_paths(run_folder, {"data_dir": str(root / "data"), "conditioning_dir": str(root / "maps")})
    assert path_aliases.to_alias(root / file, run_folder) == alias
    assert Path(os.path.normpath(path_aliases.from_alias(alias, run_folder))) == root / file


def test_an_unknown_or_absent_folder_is_rejected(run_folder):
    with pytest.raises(RunError, match=r"^lab: its data are in \$LDM_DATA_DIR, which is not known here\. Fix: set"):
        path_aliases.from_alias("$LDM_DATA_DIR/a.nii.gz", run_folder)
    assert path_aliases.from_alias("/x/a.nii.gz", run_folder) == Path("/x/a.nii.gz")
    path_aliases.remember_paths(run_folder, {"data_dir": str(run_folder / "gone")})
    with pytest.raises(RunError, match=r"^lab: its folder \$LDM_DATA_DIR does not exist any more\. Fix: restore it"):
        path_aliases.from_alias("$LDM_DATA_DIR/a.nii.gz", run_folder)


def test_the_longest_path_in_a_text_is_replaced_first(run_folder, tmp_path):
    root = tmp_path / PERSON
    path_aliases.remember_paths(run_folder, {"data_dir": str(root), "conditioning_dir": str(root / "maps")})
    text = f"{root}/a.nii {root}/maps/b.nii {run_folder}/d {sys.prefix}/bin {Path.home()}"
    hidden = path_aliases.hide_paths(text, run_folder)
    assert hidden == "$LDM_DATA_DIR/a.nii $LDM_CONDITIONING_DIR/b.nii lab/d $PYTHON/bin $HOME"


def test_a_cohort_is_read_from_wherever_its_data_have_moved(run_folder, cohort_folder, tmp_path):
    data = shutil.copytree(cohort_folder.parent, tmp_path / PERSON) / "data"
    path_aliases.remember_paths(run_folder, {"data_dir": str(data)})
    cases, path = find_cases(data), run_folder / "01_data_audit" / "cohort.json"
    path.parent.mkdir()
    split = split_patients([case.patient for case in cases], seed=0, validation_fraction=0.4)
    write_cohort(path, cases, split, path.parent)
    assert PERSON not in path.read_text() and str(tmp_path) not in path.read_text()
    read = [case for side in read_cohort(path, path.parent) for case in side]
    assert {case.key: case.mask for case in read} == {case.key: case.mask for case in cases}
    moved = (tmp_path / PERSON).rename(tmp_path / "elsewhere") / "data"
    path_aliases.remember_paths(run_folder, {"data_dir": str(moved)})
    again = [c for side in read_cohort(path, path.parent) for c in side]
    assert {c.mask.parent.parent for c in again} == {moved} and all(c.mask.is_file() for c in again)


@pytest.mark.pipeline
def test_a_failed_stage_reveals_no_path_outside_one_private_file(outputs, cohort_folder, tmp_path):
    """One patient is too few to split: notebook, traceback and log are about data in a folder with a patient's name."""
    first = sorted(cohort_folder.iterdir())[0].name
    data = tmp_path / PERSON / "data"
    shutil.copytree(cohort_folder / first, data / first)
    command = [f"data_dir={data}", "autoencoder_dir=", "run"]
    with pytest.raises(RunError, match="1 patient, need at least 2"):
        runner.run_stages(
            ["01_data_audit"], run="lab", preset="smoke", overrides={"data_dir": str(data)}, command=command
        )
    kept = [path for path in outputs.rglob("*") if path.is_file() and path.name != path_aliases.FILE]
    assert {"notebook.partial.ipynb", "log.txt", "run.json", "config.json", "cases.csv"} <= {p.name for p in kept}
    secrets = [
        word.encode() for word in (PERSON, str(tmp_path), sys.prefix, str(Path(path_aliases.__file__).parents[1]))
    ]
    assert not [(path.name, word) for path in kept for word in secrets if word in path.read_bytes()]
    expected = ["data_dir=$LDM_DATA_DIR", "autoencoder_dir=", "run"]
    assert read_record(outputs / "lab" / "run.json")["command"] == expected


def test_a_cohort_of_a_version_before_08_is_read(run_folder, cases, tmp_path):
    path = run_folder / "01_data_audit" / "cohort.json"
    path.parent.mkdir()
    split = split_patients([case.patient for case in cases], seed=0, validation_fraction=0.4)
    write_cohort(path, cases, split, path.parent)
    content = json.loads(path.read_text())
    for row in content["cases"]:
        del row["read_options"]
        row["allow"] = {"assume_orientation": "", "nan_as_zero": True, "mask_labels": [1, 4], "scrub_header": False}
    path.write_text(json.dumps(content))
    read = read_cohort(path, path.parent)[0][0].read_options
    assert read.nan_as_zero and read.labels == (1, 4)
    content["cases"][0]["allow"] = {"mask_labels": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"cohort\.json: is damaged .* Fix: run 01_data_audit again"):
        read_cohort(path, path.parent)
