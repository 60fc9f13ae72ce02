"""The files around the library agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in PROJECT["dependencies"]}
REQUIRED = [
    "torch", "monai", "monai-generative", "einops", "lightning", "jupyterlab", "papermill", "nibabel", "nilearn",
    "scipy", "matplotlib", "ipywidgets", "wandb", "mlflow", "pydantic", "safetensors", "tqdm",
]  # fmt: skip


def test_required_packages_are_dependencies_with_upper_bounds():
    assert set(REQUIRED) <= PACKAGES
    assert all("<" in line or "==" in line for line in PROJECT["dependencies"])
    assert "torch==2.13.*" in PROJECT["dependencies"]


def test_the_conda_environment_takes_its_packages_from_pyproject():
    lines = [line.strip("- ").strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    listed = lines[lines.index("dependencies:") + 1 :]
    assert [line for line in listed if line] == ["python=3.11", "pip", "pip:", "editable .[dev]"]
    assert "conda-forge" in lines and "defaults" not in lines


def test_version_is_the_newest_release_or_in_development_of_a_later_one():
    import ldm_lib

    citation = (ROOT / "CITATION.cff").read_text()
    date, cited = (re.search(rf"^{key}: (\S+)$", citation, re.M).group(1) for key in ("date-released", "version"))
    entries = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert next(entry for entry in entries if entry != "Unreleased") == f"{cited} ({date})"
    version = Version(PROJECT["version"])
    assert ldm_lib.__version__ == PROJECT["version"]
    if "Unreleased" in entries:
        assert version.is_devrelease and version > Version(cited)
    else:
        assert version == Version(cited)


def test_the_metadata_declare_posix():
    assert "Operating System :: POSIX" in PROJECT["classifiers"]


def test_the_wheel_holds_every_room_and_the_notebooks():
    rooms = {f"ldm_lib.{path.parent.name}" for path in (ROOT / "ldm_lib").glob("*/__init__.py")}
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == rooms | {"ldm_lib", "ldm_lib.notebooks"}
    assert setuptools["package-dir"]["ldm_lib.notebooks"] == "notebooks"


def test_the_licence_file_is_the_one_in_the_metadata():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text and PROJECT["license"] == "Apache-2.0"


MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {t for line in re.findall(r"^([a-z0-9][a-z0-9 -]*):", MAKEFILE, re.M) for t in line.split()}


def test_make_alone_prints_every_target():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {word for line in printed.splitlines() if line.startswith("  ") for word in line.split("  ")[1].split()}
    assert named == TARGETS


def test_the_readme_names_existing_targets_only():
    named = set(re.findall(r"(?:`|^ {4})make ([a-z0-9][a-z0-9-]*)", (ROOT / "README.md").read_text(), re.M))
    assert named <= TARGETS and {"run", "test", "lab"} <= named


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in (ROOT / "README.md").read_text()


def test_volumes_and_weights_are_never_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".nii", ".nii.gz", ".ckpt", ".dcm"))]
    assert [name for name in tracked if name.startswith("outputs/")] in ([], ["outputs/README.md"])
