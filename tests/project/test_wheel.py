"""The wheel, installed outside the checkout, gives a command `ldm` that works from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources: a build leaves files in its folder."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ldm_lib", "notebooks", "tests/support", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", output, source], check=True)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def ldm(wheel, tmp_path_factory):
    """Run the installed command in an empty folder; dependencies come from this environment."""
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)

    def run(*words, **environment):
        kept = {name: value for name, value in os.environ.items() if name not in ("LDM_OUTPUTS", "PYTHONPATH")}
        command = [sys.executable, site / "bin" / "ldm", *map(str, words)]
        return subprocess.run(command, cwd=work, env=kept | {"PYTHONPATH": str(site)} | environment,
                              capture_output=True, text=True)  # fmt: skip

    run.site, run.work = site, work
    return run


def test_the_wheel_holds_notebooks_weights_and_types_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    notebooks = {Path(name).name for name in names if name.startswith("ldm_lib/notebooks/")}
    assert notebooks == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {"ldm_lib/py.typed", "ldm_lib/pretrained/model.safetensors", "ldm_lib/pretrained/config.json",
            "ldm_lib/pretrained/autoencoder/model.safetensors", "ldm_lib/plots/page.html"} <= set(names)  # fmt: skip
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ldm_lib"}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ldm_lib").rglob("*.py")}
    assert library == {name for name in names if name.endswith(".py")}


def test_help_and_doctor_work_from_any_folder(ldm):
    helped = ldm("--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: ldm ")
    examined = ldm("doctor", LDM_OUTPUTS=str(ldm.work / "elsewhere"))
    assert f"{ldm.work / 'elsewhere'}, " in examined.stdout and "ok  packages" in examined.stdout
    assert f"{ldm.work / 'outputs'}, " in ldm("doctor").stdout


def test_cases_are_validated_and_inpainted(ldm, cases, cohort_folder):
    validated = ldm("validate", cohort_folder)
    assert validated.returncode == 0 and "6 cases: 6 usable" in validated.stdout
    case, output = cases[0], ldm.work / "inpainted.nii.gz"
    done = ldm("inpaint", "--t1n-voided", case.t1n_voided, "--mask", case.mask, "--tissue", case.tissue,
               "--output", "inpainted.nii.gz", "--steps", "1", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    voided, mask, result = (np.asarray(nib.load(p).dataobj) for p in (case.t1n_voided, case.mask, output))
    assert (result[mask == 0] == voided[mask == 0]).all() and (result[mask == 1] > 0).any()


def test_a_stage_runs_with_the_notebooks_of_the_wheel(ldm):
    done = ldm("run", "01", "--preset", "smoke")
    assert done.returncode == 0, done.stderr
    assert (ldm.work / "outputs" / "smoke" / "01_data_audit" / "done.json").is_file()
    assert not (ldm.site / "outputs").exists()
