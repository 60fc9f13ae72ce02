"""Notebook 01 in a real JupyterLab in a real browser, as a researcher opens it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from browser import settled

from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import STAGES

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
AUDIT = next(iter(STAGES))


def small(path):
    """Write notebook 01 with the parameters of the smoke preset."""
    notebook = nbformat.read(NOTEBOOKS / f"{AUDIT}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters = resolve("smoke", {"synthetic_patients": 3})[AUDIT].model_dump()
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(notebook, path)


@contextmanager
def jupyterlab(folder):
    """JupyterLab with settings of its own: the address that opens a file of the folder, with a token."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    own, token = folder.parent / "jupyter", secrets.token_hex(20)
    own.mkdir()
    (own / "jupyter_server_config.json").write_text(json.dumps({"IdentityProvider": {"token": token}}))
    environment = os.environ | {f"JUPYTER_{name}_DIR": str(own) for name in ("CONFIG", "RUNTIME", "DATA")}
    environment |= {"LDM_OUTPUTS": str(folder / "outputs"), "LDM_HEADLESS": "0"}
    words = ["lab", "--no-browser", "--allow-" + "root", "--ServerApp.ip=127.0.0.1", f"--port={port}"]
    with (own / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", *words, f"--ServerApp.root_dir={folder}"],
                                  env=environment, stdout=log, stderr=log)  # fmt: skip
    try:
        while not list(own.glob("jpserver-*.json")):
            assert server.poll() is None, (own / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_all_cells_run_and_a_slider_changes_the_picture(tmp_path, browser):
    folder = tmp_path / "project"
    folder.mkdir()
    small(folder / "notebook.ipynb")
    with jupyterlab(folder) as address:
        tab = browser.new_page(viewport={"width": 1300, "height": 8000})  # cells that are not in view are not rendered
        tab.goto(address.format("notebook.ipynb"))
        tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_text("Run All Cells", exact=True).click()
        picture = tab.locator("img.widget-image")
        picture.wait_for(timeout=180_000)
        done = folder / "outputs" / "lab" / AUDIT / "done.json"
        for _ in range(300):
            if done.exists():
                break
            tab.wait_for_timeout(200)
        assert done.exists() and tab.locator(".jp-OutputArea-output[data-mime-type$='jupyter.error']").count() == 0
        before = settled(picture)
        slider = tab.locator(".widget-hslider").filter(has_text="z, up").locator(".noUi-handle")
        slider.focus()
        for _ in range(3):
            slider.press("ArrowRight")
        assert settled(picture, unlike=before) != before
