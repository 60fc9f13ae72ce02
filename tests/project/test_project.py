"""The files around the library say one thing each, and the same thing."""

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in PROJECT["dependencies"]}
ASKED = [
    "torch", "monai", "monai-generative", "einops", "lightning", "jupyterlab", "papermill", "nibabel", "nilearn",
    "dipy", "scipy", "matplotlib", "ipywidgets", "wandb", "mlflow", "pydantic", "safetensors", "tqdm",
]  # fmt: skip


def test_every_package_asked_for_is_there_with_a_ceiling():
    assert set(ASKED) <= PACKAGES
    assert all("<" in line or "==" in line for line in PROJECT["dependencies"])
    assert "torch==2.13.*" in PROJECT["dependencies"]


def test_environment_names_nothing_that_pyproject_does_not():
    lines = [line.strip("- ").strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    listed = lines[lines.index("dependencies:") + 1 :]
    assert [line for line in listed if line] == ["python=3.11", "pip", "pip:", "editable .[dev]"]
    assert "conda-forge" in lines and "defaults" not in lines


def test_versions_agree():
    import ldm_lib

    assert ldm_lib.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_licence_is_the_one_named():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text and PROJECT["license"] == "Apache-2.0"


MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {t for line in re.findall(r"^([a-z0-9][a-z0-9 -]*):", MAKEFILE, re.M) for t in line.split()}


def test_make_alone_prints_every_target():
    told = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {word for line in told.splitlines() if line.startswith("  ") for word in line.split("  ")[1].split()}
    assert named == TARGETS


def test_readme_names_only_targets_there_are():
    named = set(re.findall(r"(?:`|^ {4})make ([a-z0-9][a-z0-9-]*)", (ROOT / "README.md").read_text(), re.M))
    assert named <= TARGETS and {"run", "test", "lab"} <= named


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in (ROOT / "README.md").read_text()


def test_volumes_and_weights_are_never_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".nii", ".nii.gz", ".ckpt", ".dcm"))]
    assert [name for name in tracked if name.startswith("outputs/")] in ([], ["outputs/README.md"])
