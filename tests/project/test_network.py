"""No run uses or needs the network, executes HTML in names, or leaves files that others can read."""

import functools
import os
import shutil
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import pytest

from ldm_lib.experiment.report import POLICY
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE

ROOT = Path(__file__).parents[2]
BLOCKED = Path(__file__).parents[1] / "support" / "blocked"
IMAGE = "<img src=x onerror=alert(1)>"
CANARY = "DOE^JOHN 19500101"
TINY = {"synthetic_patients": 3, "autoencoder_steps": 20, "max_epochs": 1, "num_inference_steps": 2,
        "multipliers": "1,1", "attention_rates": "2", "wandb_mode": "offline", "use_mlflow": "true"}  # fmt: skip


@functools.cache
def empty_network():
    """The words before a command that give it an empty network namespace, with loopback down."""
    words = ["unshare", "--net", "--map-root-user"]
    found = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if found else None


needs_namespace = pytest.mark.skipif(empty_network() is None, reason="this system gives no network namespace")


def confined(words, folder, *, before=()):
    """Run a Python command with sockets blocked; return its result, its processes and its connections."""
    log = folder / "sockets"
    paths = os.pathsep.join([str(BLOCKED), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths, "SOCKETS_LOG": str(log), OUTPUTS_VARIABLE: str(folder / "outputs")}
    command = [*before, sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    noted = log.read_text().splitlines()
    return done, noted, [line for line in noted if "'asked'" in line]


@pytest.fixture(scope="module")
def audited(tmp_path_factory, cohort_folder):
    """Stage 01 on data with a malicious folder name and a name in a header: the run, processes, connections."""
    folder = tmp_path_factory.mktemp("audit")
    data = folder / "data"
    shutil.copytree(cohort_folder, data)
    shutil.copytree(next(data.iterdir()), data / IMAGE)
    path = sorted(data.glob("Synthetic*/*-t1n.nii.gz"))[0]
    image = nib.load(path)
    image.header["descrip"] = CANARY.encode()
    nib.save(nib.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
    old = os.umask(0o022)  # what most systems have
    words = ["-m", "ldm_lib", "run", "01", "--preset", "smoke", "--run", "lab", "--set", f"data_dir={data}"]
    done, noted, asked = confined(words, folder)
    os.umask(old)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "outputs" / "lab", noted, asked


def test_a_stage_and_its_kernel_do_not_use_the_network(audited):
    _, noted, asked = audited
    assert [line for line in noted if "'ldm_lib'" in line] and [line for line in noted if "ipykernel" in line]
    assert asked == []


def test_a_connection_would_be_noticed(tmp_path):
    """The test above relies on this."""
    script = "import socket, urllib.request as r\ntry:\n r.urlopen('http://127.0.0.1:9')\nexcept OSError as e: print(e)"
    done, _, asked = confined(["-c", script], tmp_path)
    assert "names are not looked up here" in done.stdout and len(asked) == 1


def test_html_in_a_name_is_shown_as_text(audited):
    """A data folder can have any name; reports show it in a table."""
    folder, *_ = audited
    report = folder / "01_data_audit" / "report.html"
    assert IMAGE in (folder / "01_data_audit" / "exclusions.csv").read_text()
    for page in (report, folder / "index.html"):
        found = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes, found=found: found.append((tag, dict(attributes)))
        parser.feed(page.read_text())
        assert not [tag for tag, attributes in found if tag == "script" or any(k.startswith("on") for k in attributes)]
        assert [a["content"] for tag, a in found if a.get("http-equiv") == "Content-Security-Policy"] == [POLICY]
    assert "&lt;img src=x onerror=alert(1)&gt;" in report.read_text()


def test_personal_data_of_a_header_are_in_no_artefact(audited):
    """Free text of a header is kept in results written like their source only."""
    files = [path for path in audited[0].rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if b"DOE^JOHN" in path.read_bytes()]


def test_files_of_a_run_are_readable_by_their_owner_only(audited):
    paths = [audited[0], *audited[0].rglob("*")]
    open_to_others = {
        path.name: oct(path.stat().st_mode) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077
    }
    assert not open_to_others
    assert {path.suffix for path in paths} >= {".csv", ".html", ".ipynb", ".json", ".png", ".txt"}


@needs_namespace
def test_cases_are_validated_and_inpainted_without_any_network(tmp_path, cases, tiny_model_folder):
    """In an empty network namespace, with sockets blocked too."""
    case, output = cases[0], tmp_path / "inpainted.nii.gz"
    inpaint = ["inpaint", "--t1n-voided", case.t1n_voided, "--mask", case.mask, "--output", output,
               "--model", tiny_model_folder, "--steps", "2", "--device", "cpu"]  # fmt: skip
    commands = [["validate", case.mask.parents[1]], inpaint]
    script = "import sys\nfrom ldm_lib.__main__ import main\nsys.exit(max(main(c) for c in {!r}))"
    script = script.format([[str(word) for word in command] for command in commands])
    done, noted, asked = confined(["-c", script], tmp_path, before=empty_network())
    assert done.returncode == 0, done.stderr
    assert len(noted) == 1 and asked == []
    assert nib.load(output).shape == nib.load(case.t1n_voided).shape
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


@pytest.mark.slow
@needs_namespace
def test_all_six_notebooks_run_without_any_network(tmp_path):
    """With both trackers on and loopback down, no connection is attempted and every stage is done."""
    settings = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    words = ["-m", "ldm_lib", "run", "--preset", "smoke", "--run", "alone", *settings]
    done, noted, asked = confined(words, tmp_path, before=empty_network())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in noted if "ipykernel" in line]) == 6
    assert asked == []
    run = tmp_path / "outputs" / "alone"
    assert len(list(run.glob("*/done.json"))) == 6 and (run.parent / "mlflow.db").exists()
    assert list(run.rglob("*.wandb")) and "WARNING" not in (run / "log.txt").read_text()
    shared = [p for p in run.parent.rglob("*") if not p.is_symlink() and stat.S_IMODE(p.stat().st_mode) & 0o077]
    assert not shared
