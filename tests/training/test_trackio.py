"""Trackio holds metrics, parameters and pictures of a run in a folder next to the runs, and uses no network."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from ldm_lib.experiment.presets import resolve
from ldm_lib.training.trackers import PROJECT, trackers

ROOT = Path(__file__).parents[2]
BLOCKED = Path(__file__).parents[1] / "support" / "blocked"
# Each would make Trackio send what it gets to a server, or ask one for the user's name.
ELSEWHERE = {"TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=canary", "TRACKIO_WRITE_TOKEN": "canary",
             "TRACKIO_SPACE_ID": "canary/space", "TRACKIO_WEBHOOK_URL": "http://127.0.0.1:9", "HF_TOKEN": "hf_canary",
             "TRACKIO_DIR": "elsewhere"}  # fmt: skip
TRAIN = """
import sys
from pathlib import Path
from ldm_lib.experiment.presets import resolve
from ldm_lib.training.trackers import trackers
folder = Path(sys.argv[1]) / "04_training"
folder.mkdir(parents=True)
config = resolve("smoke", {"run": folder.parent.name, "use_trackio": True})["04_training"]
for run in (1, 2):  # a second training in the same process is a run of its own
    found = trackers(config, config, folder)
    found.log({"val_loss": 0.0625 * run, "epoch": 0}, 3)
    found.log({"train_loss": 1 / 3}, 3)
    found.panel(Path(sys.argv[2]), 3)
    found.log({"train_loss": 0.5}, 7)
    found.close(failed=run == 2)
other = Path(sys.argv[1] + "-elsewhere") / "tracked" / "04_training"
other.mkdir(parents=True)
trackers(config, config, other).close(failed=False)
"""


def test_without_the_package_a_warning_says_how_to_get_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ldm_lib.training.trackers.find_spec", lambda name: None)
    folder = tmp_path / "outputs" / "tracked" / "04_training"
    folder.mkdir(parents=True)
    config = resolve("smoke", {"use_trackio": True})["04_training"]
    trackers(config, config, folder).close(failed=False)
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("Trackio failed: ImportError: not installed; `pip install trackio`; training goes on")


@pytest.mark.skipif(not find_spec("trackio"), reason="needs the package trackio")
def test_it_holds_metrics_parameters_and_pictures_and_neither_a_place_nor_a_name(tmp_path):
    panel, outputs, log = tmp_path / "panel.png", tmp_path / "outputs", tmp_path / "sockets"
    Image.new("L", (48, 32), 99).save(panel)
    paths = os.pathsep.join([str(BLOCKED), str(ROOT)])
    environment = os.environ | ELSEWHERE | {"PYTHONPATH": paths, "SOCKETS_LOG": str(log), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", TRAIN, str(outputs / "tracked"), str(panel)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "'asked'" not in log.read_text()
    warning = "Trackio failed: ValueError: this process logs to another outputs folder; start a new one; training goes"
    assert [line[: len(warning)] for line in done.stderr.splitlines()] == [warning]
    with sqlite3.connect(outputs / "trackio" / f"{PROJECT}.db") as store:
        logged = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = [json.loads(text) for (text,) in store.execute("select config from configs")]
    assert {name for name, *_ in logged} == {"tracked"}
    rows = [(step, json.loads(text)) for _, step, text in logged]
    first, second = rows[:4], rows[4:]
    assert first[0] == (3, {"val_loss": 0.0625, "epoch": 0}) and second[0] == (3, {"val_loss": 0.125, "epoch": 0})
    for own in (first, second):
        assert own[1] == (3, {"train_loss": 1 / 3}) and own[3] == (7, {"train_loss": 0.5})
        kept = Path(own[2][1]["panel"]["file_path"])
        assert Image.open(outputs / "trackio" / "media" / kept).tobytes() == Image.open(panel).tobytes()
    assert len(configs) == 2 and all(c["base_width"] == 16 and c["_Username"] is None for c in configs)
    files = [path for path in outputs.rglob("*") if path.is_file()]
    words = [str(tmp_path), "canary", str(ROOT), sys.prefix]
    assert not [(path, word) for path in files for word in words if word.encode() in path.read_bytes()]
    assert not (tmp_path / "elsewhere").exists()
