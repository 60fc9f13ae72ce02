"""Weights & Biases and MLflow hold the metrics, reveal nobody and no path, and may fail at any moment."""

import getpass
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from listening import LOOPBACK, addresses
from PIL import Image

from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import TrainingConfig
from ldm_lib.training.trackers import ANONYMOUS, LOGGED_TEXTS, PROJECT, Wandb, logged_parameters, trackers

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def settings(**changes):
    return resolve("smoke", {"run": "tracked", **changes})["04_training"]


def place(tmp_path, run="tracked"):
    """The folder of stage 04 of a run."""
    folder = tmp_path / "outputs" / run / "04_training"
    folder.mkdir(parents=True)
    return folder


def track(config, folder):
    return trackers(config, config, folder)


def records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB of chunks: checksum, length, kind, content."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(path):
    """Step -> what wandb holds of it, without its own times."""
    rows = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
    return rows


def query(outputs, text):
    """What the MLflow store says."""
    with sqlite3.connect(outputs / "mlflow.db") as store:
        return store.execute(text).fetchall()


def test_every_text_among_the_parameters_was_looked_at():
    """A new parameter that is a text, such as a path, is not logged before it is named in LOGGED_TEXTS."""
    config, logged = settings(), logged_parameters(settings())
    texts = {name for name, value in config.model_dump().items() if isinstance(value, str)}
    assert texts - {"start_dir"} == LOGGED_TEXTS and set(logged) == set(TrainingConfig.model_fields) - {"start_dir"}

    class Careless(TrainingConfig):
        data_dir: str = "/a/path"

    assert "data_dir" not in logged_parameters(Careless())


@pytest.fixture
def panel(tmp_path):
    """A small picture."""
    Image.new("L", (48, 32), 99).save(tmp_path / "panel.png")
    return tmp_path / "panel.png"


def test_both_hold_metrics_parameters_and_pictures_of_a_run_of_its_own(tmp_path, panel, caplog):
    folder, config = place(tmp_path), settings(wandb_mode="offline", use_mlflow=True)
    for run in (1, 2):  # a second training in the same process is a run of its own
        found = track(config, folder)
        found.log({"val_loss": 0.0625 * run, "epoch": 0}, 3)
        found.log({"train_loss": 1 / 3}, 3)
        found.panel(panel, 3)
        found.log({"train_loss": float("nan")}, 7)
        found.close(failed=run == 2)
    assert not caplog.records
    kept = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(kept) == 2
    for run, path in enumerate(kept, start=1):
        rows = history(path)
        assert rows[3]["val_loss"] == 0.0625 * run and rows[3]["train_loss"] == 1 / 3 and list(rows) == [3, 7]
        assert (path.parent / "files" / rows[3]["panel.path"]).read_bytes() == panel.read_bytes()
        begun = next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
        logged = {item.key: item.value_json for item in begun.config.update}
        assert (begun.project, begun.display_name, begun.host) == (PROJECT, "tracked", "")
        assert logged["base_width"] == "16" and logged["run"] == '"tracked"'
    assert not list(folder.glob("wandb/**/*.log"))
    outputs = tmp_path / "outputs"
    runs = query(outputs, "select name, status, user_id, artifact_uri from runs order by start_time")
    assert [run[:3] for run in runs] == [("tracked", "FINISHED", "unknown"), ("tracked", "FAILED", "unknown")]
    for *_, address in runs:
        shown = outputs / "mlflow" / address.removeprefix("mlflow-artifacts:/") / "panels" / "3.png"
        assert shown.read_bytes() == panel.read_bytes()
    values = sorted(query(outputs, "select value, step from metrics where key = 'val_loss'"))
    assert values == [(0.0625, 3), (0.125, 3)]
    assert dict(query(outputs, "select key, value from params"))["base_width"] == "16"
    assert dict(query(outputs, "select key, value from tags")) == ANONYMOUS | {"mlflow.runName": "tracked"}


def test_pictures_are_never_given_to_wandb_online(tmp_path, panel):
    online = Wandb.__new__(Wandb)  # without a run: it would raise if it tried
    online._offline = False
    online.panel(panel, 3)


CANARIES = {
    "WANDB_API_KEY": "0123456789canarykey0123456789abcdef01234",
    "MLFLOW_TRACKING_TOKEN": "canary-mlflow-token",
    "MLFLOW_TRACKING_URI": "http://canary-mlflow-uri.invalid",
    "WANDB_BASE_URL": "https://canary-wandb-url.invalid",
    "WANDB_HOST": "canary-host",
    "WANDB_MODE": "disabled",
    "USER": "canary-user",
    "LOGNAME": "canary-logname",
}
TRAIN = """
import sys
from pathlib import Path
from ldm_lib.experiment.presets import resolve
from ldm_lib.training.trackers import trackers
folder = Path(sys.argv[1]) / "04_training"
folder.mkdir(parents=True)
changes = {"run": folder.parent.name, "wandb_mode": sys.argv[2], "use_mlflow": True}
config = resolve("smoke", changes)["04_training"]
found = trackers(config, config, folder)
found.log({"val_loss": 0.5}, 1)
found.close(failed=False)
"""


def train(*arguments, **options):
    """A process that tracks one figure."""
    environment = os.environ | {"PYTHONPATH": str(MAKEFILE.parent)} | options.pop("env", {})
    command = [sys.executable, "-c", TRAIN, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options
    )


@pytest.mark.slow
def test_no_secret_no_path_and_no_name_of_person_or_machine_is_kept(tmp_path):
    """Canaries in the environment, in the paths and in the git remote, searched for in every byte of every file."""
    home, repository = tmp_path / "canary-home", tmp_path / "canary-repository"
    outputs = tmp_path / "JOHN_DOE" / "outputs"
    for folder in (home, repository, outputs):
        folder.mkdir(parents=True)
    remote = "https://canary-git-token@example.invalid/a/b.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    environment = CANARIES | {"HOME": str(home)}
    process = train(outputs / "tracked", "offline", env=environment, cwd=repository)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, printed) == (0, "")  # nothing failed, and nothing was printed
    kept = [path for path in outputs.rglob("*") if path.is_file() or path.is_symlink()]
    names = {path.name for path in kept}
    assert {"mlflow.db", "metrics.csv"} < names and any(name.endswith(".wandb") for name in names)
    words = ["canary", "0123456789abcdef01234", "JOHN_DOE", str(tmp_path), tmp_path.name, str(MAKEFILE.parent),
             sys.executable, sys.prefix, socket.gethostname(), getpass.getuser()]  # fmt: skip
    for path in kept:
        assert not path.is_symlink() and path.suffix != ".log", path
        content = path.read_bytes() + str(path.relative_to(outputs)).encode()
        found = [
            word for word in words if re.search(rb"(?<![a-z_])" + re.escape(word.encode()) + rb"(?![a-z_])", content)
        ]
        assert not found, (path, found)


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_all_find_it_sound(tmp_path):
    (tmp_path / "outputs").mkdir()
    started = [train(tmp_path / "outputs" / name, "off") for name in "abc"]
    for process in started:
        printed, _ = process.communicate(timeout=120)
        assert (process.returncode, printed) == (0, "")
    runs = query(tmp_path / "outputs", "select name, status from runs")
    assert sorted(runs) == [("a", "FINISHED"), ("b", "FINISHED"), ("c", "FINISHED")]
    assert query(tmp_path / "outputs", "select value from metrics") == [(0.5,)] * 3


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(folder):
    """`make mlflow` in `folder`, on a free port: what asks it, as (method, path, body) -> (status, content)."""
    recipe = re.search(r"^mlflow:.*\n\t@((?:.*\\\n)*.*)$", MAKEFILE.read_text(), re.MULTILINE)[1]
    port = free_port()
    command = recipe.replace("$$", "$").replace("--port 5000", f"--port {port}")
    command = command.replace(".venv/bin/mlflow", f"'{sys.executable}' -m mlflow")
    assert f"127.0.0.1 --port {port}" in command

    def ask(method, path, body=None, **headers):
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    with (folder / "server.log").open("w") as output:
        server = subprocess.Popen(
            ["sh", "-c", command], cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(240):
            try:
                if ask("GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        assert addresses(server.pid) == {LOOPBACK}
        yield ask
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_make_mlflow_serves_the_metrics(tmp_path):
    found = track(settings(use_mlflow=True), place(tmp_path))
    for step in (3, 7):
        found.log({"val_loss": 1 / step}, step)
    found.close(failed=False)
    with served(tmp_path) as ask:
        status, answer = ask("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]})
        (run,) = json.loads(answer)["runs"]
        assert status == 200 and (run["info"]["run_name"], run["info"]["status"]) == ("tracked", "FINISHED")
        assert {"key": "base_width", "value": "16"} in run["data"]["params"]
        place_of = f"run_id={run['info']['run_id']}"
        _, answer = ask("GET", f"/api/2.0/mlflow/metrics/get-history?{place_of}&metric_key=val_loss")
        assert [(m["step"], m["value"]) for m in json.loads(answer)["metrics"]] == [(3, 1 / 3), (7, 1 / 7)]
        assert ask("GET", "/", Host="evil.example")[0] == 403
    assert str(tmp_path).encode() not in (tmp_path / "outputs" / "mlflow.db").read_bytes()


@pytest.mark.slow
def test_a_store_that_was_made_with_a_path_of_its_own_is_continued(tmp_path, caplog):
    """Stores of 0.3 and before: artifacts at a file: address."""
    from mlflow import MlflowClient

    folder, outputs = place(tmp_path), tmp_path / "outputs"
    older = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    older.create_run(older.create_experiment(PROJECT, (outputs / "mlflow").as_uri()), run_name="older")
    found = track(settings(use_mlflow=True), folder)
    found.log({"val_loss": 0.5}, 1)
    found.close(failed=False)
    assert not caplog.records and query(outputs, "select value from metrics") == [(0.5,)]


def failing(found, caplog, *, harm=lambda: None):
    """Track some steps with `harm` done after the first; return the only warning, if the table is complete."""
    found.log({"a": 1.0}, 0)
    harm()
    for step in range(1, 30):
        found.log({"a": float(step)}, step)
    found.close(failed=False)
    assert list(found.table.rows) == list(range(30))
    (warning,) = [record.message for record in caplog.records if record.name == "ldm_lib"]
    return warning


@pytest.mark.slow
def test_wandb_without_a_folder_to_write_to_does_not_disturb_a_training(tmp_path, caplog):
    folder = place(tmp_path)
    (folder / "wandb").write_text("in the way")
    found = track(settings(wandb_mode="offline"), folder)
    assert "wandb failed: " in failing(found, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["locked", "damaged"])
def test_an_mlflow_store_that_cannot_be_written_does_not_disturb_a_training(tmp_path, caplog, what):
    folder, outputs = place(tmp_path), tmp_path / "outputs"
    found = track(settings(use_mlflow=True), folder)
    with closing(sqlite3.connect(outputs / "mlflow.db", isolation_level=None)) as other:

        def harm():
            if what == "locked":
                other.execute("BEGIN EXCLUSIVE")
            else:
                (outputs / "mlflow.db").write_bytes(b"no store" * 9999)

        assert "MLflow failed: " in failing(found, caplog, harm=harm)
