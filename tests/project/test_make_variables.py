"""Values given to `make` reach the command unchanged, as one argument, and are never executed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ALLOW_ROOT = "--allow-" + "root"  # in two parts, for no file may hold it
MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()
HOSTILE = {
    "command": "x; touch PWNED",
    "substitution": "$(touch PWNED)",
    "make's own": "$(shell touch PWNED)",
    "backquotes": "`touch PWNED`",
    "quotes": "a'b\"c",
    "glob": "*",
    "spaces and lines": " a  b\nc; touch PWNED ",
    "end of quotes": '"; touch PWNED; "',
    "unicode": "é\u2028$HOME",
}
FROM_ENVIRONMENT = pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
# make expands a dollar sign on its own command line, which its user typed: see SECURITY.md.
TYPED = pytest.mark.parametrize("value", [v for v in HOSTILE.values() if "$" not in v and "\n" not in v])
OF_STAGES = ["DATA_DIR", "CONDITIONING_DIR", "BRAINS", "BATCH_SIZE", "LEARNING_RATE", "MAX_EPOCHS",
             "ACCUMULATE_GRAD_BATCHES", "DEVICES"]  # fmt: skip
ALL = {*OF_STAGES, "RUN", "PRESET", "OVERWRITE", "GRID", "JOBS", "NB", "RESULTS", "OUTPUT", "FULL"}
SETUP, PICTURE = {"PYTHON", "LOCKED"}, {"BRAIN"}  # with tests of their own
FAKE = """#!/bin/sh
if [ "$1" = -c ]; then exit 0; elif [ "$1" = --version ]; then echo 'Python 3.11.0'; exit; fi
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
printf '%s\\0' "$@" >> called; printf '\\n\\0' >> called
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile, a Python that records its arguments, and files that a glob would match."""
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE)
    fake.chmod(0o755)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name in ("pyproject.toml", "seed=1", "seed=2"):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv" / "ready").write_text("")
    return tmp_path


def called(folder, target, typed=(), **variables):
    """The calls of the fake Python, each a list of words."""
    path = f"{folder}/bin:/usr/local/bin:/usr/bin:/bin"
    subprocess.run(["make", target, *typed], cwd=folder, env={"PATH": path} | variables, check=True)
    assert not list(folder.rglob("PWNED"))
    calls = (folder / "called").read_bytes().decode().split("\n\0")[:-1]
    (folder / "called").unlink()
    return [call.split("\0")[:-1] for call in calls]


def expected(value):
    """Target -> the arguments of `python -m` when every variable is this text."""
    parameters = [name.lower() if name != "BRAINS" else "brains_dir" for name in OF_STAGES]
    stages = [word for name in parameters for word in ("--set", f"{name}={value}")]
    options = ["--run", value, "--preset", value, *stages, "--overwrite"]
    commands = {
        "run": ["run", *options],
        "05": ["run", "05", *options],
        "train": ["run", "01", "02", "03", "04", *options],
        "sweep": ["sweep", value, "--jobs", value],
        "params": ["params", value, "--preset", value],
        "validate": ["validate", value, "--conditioning-dir", value],
        "submission": ["submission", "--data", value, "--results", value, "--output", value],
        "doctor": ["doctor"],
    }
    return {target: ["ldm_lib", *words] for target, words in commands.items()} | {"bench": ["benchmarks", "--full"]}


@FROM_ENVIRONMENT
def test_from_the_environment_every_variable_is_one_argument(project, value):
    for target, words in expected(value).items():
        assert called(project, target, **dict.fromkeys(ALL, value)) == [["-m", *words]]


@TYPED
def test_typed_after_make_every_variable_is_one_argument(project, value):
    typed = [f"{name}={value}" for name in sorted(ALL)]
    for target, words in expected(value).items():
        assert called(project, target, typed) == [["-m", *words]]


@FROM_ENVIRONMENT
def test_set_is_split_at_spaces_and_otherwise_unchanged(project, value):
    words = ["seed=*", *value.split()]
    (call,) = called(project, "04", SET=" ".join(words))
    assert call[-2 * len(words) :] == [word for pair in words for word in ("--set", pair)]


def test_a_run_without_a_name_is_named_after_its_preset(project):
    for given, run in (({}, "demo"), ({"PRESET": "$(shell touch PWNED)"}, "$(shell touch PWNED)"), ({"RUN": "a"}, "a")):
        (call,) = called(project, "01", **given)
        assert call[4:] == ["--run", run, "--preset", given.get("PRESET", "demo")]


@pytest.mark.parametrize("by", ["environment", "line"])
def test_the_weights_target_trains_on_a_made_cohort_with_its_own_preset(project, by):
    how = {"typed": ["PRESET=coarse"]} if by == "line" else {"PRESET": "coarse"}
    stages, export = called(project, "weights", **how)
    assert stages[:8] == ["-m", "ldm_lib", "run", "01", "02", "03", "04", "--run"]
    assert stages[8:] == ["weights", "--preset", "weights"]
    assert export[2:4] == ["export", "outputs/weights/04_training/model"]
    assert export[4:] == ["--output", "ldm_lib/pretrained", "--temperature", "0.6"]
    on_people, _ = called(project, "weights", BRAINS="scans")
    assert on_people[8:] == ["people", "--preset", "people", "--set", "brains_dir=scans"]
    with pytest.raises(subprocess.CalledProcessError):
        called(project, "weights", DATA_DIR="patients")
    assert not (project / "called").exists()


@FROM_ENVIRONMENT
def test_validate_takes_set_as_its_options(project, value):
    words = [f"assume_orientation={word}" for word in value.split()]
    (call,) = called(
        project, "validate", DATA_DIR="d", SET=" ".join(["nan_as_zero=true", *words, "scrub_header=false"])
    )
    assert call[5:] == ["", "--nan-as-zero", *(word.replace("assume_o", "--assume-o") for word in words)]


def be(user, project):
    """Let `id` say that make is run by this user."""
    (project / "bin").mkdir()
    (project / "bin" / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (project / "bin" / "id").chmod(0o755)


@FROM_ENVIRONMENT
def test_lab_options_are_split_at_spaces_and_the_address_stays_local(project, value):
    (project / ".venv" / "bin" / "python").rename(project / ".venv" / "bin" / "jupyter")
    be(1000, project)
    (call,) = called(project, "lab", LAB_OPTIONS=value)
    words = value.split(" ") if "\n" not in value else value.split()
    assert call[1:-3] == [word for word in words if word]
    assert call[-3:-1] == ["--ServerApp.ip=127.0.0.1", "--ServerApp.root_dir=."]


@pytest.mark.parametrize("given", ["", "--no-browser --port=8890"])
def test_root_reads_how_to_start_the_lab_and_the_advice_works(project, given):
    (project / ".venv" / "bin" / "python").rename(project / ".venv" / "bin" / "jupyter")
    be(0, project)
    path = {"PATH": f"{project}/bin:/usr/local/bin:/usr/bin:/bin", "LAB_OPTIONS": given}
    refused = subprocess.run(["make", "lab"], cwd=project, env=path, capture_output=True, text=True)
    line = refused.stderr.splitlines()[0]
    assert refused.returncode == 2 and not (project / "called").exists() and line.startswith("ERROR lab: ")
    make, target, option = shlex.split(line.partition(" Fix: ")[2])
    assert (make, target) == ("make", "lab")
    (call,) = called(project, target, typed=[option])
    assert call[0] == "lab" and call[1:-3] == [*given.split(), ALLOW_ROOT]


def test_every_variable_of_the_makefile_is_tested():
    """PWD, HEAD and lower-case variables belong to the recipes."""
    read = set(re.findall(r"\$\$\{?([A-Z][A-Z_]+)", MAKEFILE)) | set(
        re.findall(r"for name in ([A-Z_ ]+);", MAKEFILE)[0].split()
    )
    assert read - {"PWD", "HEAD", "LDM_OUTPUTS"} == ALL | SETUP | PICTURE | {"SET", "LAB_OPTIONS"}
    assert not set(re.findall(r"(?<!\$)\$\(([A-Z_]+)\)", MAKEFILE)) & (ALL | SETUP | {"SET"}), "spliced by make itself"


@FROM_ENVIRONMENT
def test_a_picture_is_drawn_of_a_scan_of_any_name(project, value):
    scan = project / "scans" / value
    made = f"outputs/picture/{scan.name}"
    for folder in (scan.parent, project / made / "filled", project / "docs"):
        folder.mkdir(parents=True, exist_ok=True)
    scan.write_text("a scan")
    (project / made / "filled" / "case.png").write_text("a figure")
    cohort, evaluation = called(project, "picture", BRAIN=f"scans/{value}")
    assert cohort[2:7] == ["cohort", "--from", f"{made}/scan", "--output", made]
    assert evaluation[2:6] == ["evaluate", f"{made}/data", "--output", f"{made}/filled"]
    assert [path.read_text() for path in (project / made / "scan").iterdir()] == ["a scan"]
    assert (project / "docs" / "person.png").read_text() == "a figure"


@FROM_ENVIRONMENT
def test_setup_takes_a_python_of_any_name(project, value):
    (project / ".venv" / "bin" / "python").rename(project / "fake")
    (project / ".venv" / "ready").unlink()
    (project / "bin").mkdir()
    (project / "fake").rename(project / "bin" / value)
    calls = called(project, "setup", PYTHON=value)
    assert calls[0] == ["-m", "venv", ".venv"] and calls[1][-2:] == ["--editable", ".[dev]"] and len(calls) == 2


@pytest.mark.parametrize("locked", ["", "0", "1", "x; touch PWNED"])
def test_setup_installs_the_lock_on_request(project, locked):
    (project / ".venv" / "ready").unlink()
    (project / "bin").mkdir()
    (project / ".venv" / "bin" / "python").rename(project / "bin" / "python3.11")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    made = [[*pip, "--editable", ".[dev]"]]
    if locked not in ("", "0"):
        made = [[*pip, "--require-hashes", "--requirement", "requirements.lock"],
                [*pip, "--no-deps", "--no-build-isolation", "--editable", "."]]  # fmt: skip
    assert called(project, "setup", LOCKED=locked) == [["-m", "venv", ".venv"], *made]


def test_clean_removes_caches_and_no_folder_with_a_similar_name(project):
    kept = project / "notebooks" / "a"
    for folder in (kept, project / "notebooks" / "a b" / "__pycache__", project / "ldm_lib", project / "tests"):
        folder.mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=project, check=True, capture_output=True)
    assert kept.is_dir() and (project / "notebooks" / "a b").is_dir()
    assert not list(project.rglob("__pycache__"))
