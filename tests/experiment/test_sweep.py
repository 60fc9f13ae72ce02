"""Sweeps: reading the file, rejecting it before anything runs, sharing stages, stopping, continuing and the table."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ldm_lib.__main__ import main
from ldm_lib.errors import ConfigError, LdmError, RunError
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.experiment import report, run_folder, runner, sweep, sweep_table
from ldm_lib.experiment.run_folder import tracked
from ldm_lib.experiment.stages import STAGES
from ldm_lib.experiment.sweep_file import read_sweep
from ldm_lib.experiment.sweep_table import results, sweep_folder, write_results
from ldm_lib.files import sha256, write_json
from ldm_lib.options import safe_name

ROOT = Path(__file__).parents[2]
FIRST_THREE = list(STAGES)[:3]
GRID = """\
name: objectives
preset: smoke
set: {max_epochs: 20}
grid:
  prediction: [noise, velocity]
  learning_rate: [1e-4, 1e-3]
runs:
  - {prediction: noise, base_width: 32}
"""
NAMES = ["objectives-noise-0.0001", "objectives-noise-0.001", "objectives-velocity-0.0001",
         "objectives-velocity-0.001", "objectives-noise-32"]  # fmt: skip
pytestmark = pytest.mark.usefixtures("outputs")


@pytest.fixture
def grid_of(tmp_path):
    """Write a grid file and read it."""

    def read(text=GRID):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_sweep(path)

    return read


def names(grid):
    return [run.name for run in grid.runs]


# ---- the grid file


def test_every_combination_and_every_listed_run_with_its_whole_configuration(grid_of):
    grid = grid_of()
    assert names(grid) == NAMES and grid.stages == tuple(STAGES) and grid.preset == "smoke"
    assert grid.varying == ("prediction", "learning_rate", "base_width")
    training = [run.configs["04_training"] for run in grid.runs]
    assert [(c.prediction, c.learning_rate, c.base_width) for c in training] == [
        ("noise", 1e-4, 16), ("noise", 1e-3, 16), ("velocity", 1e-4, 16), ("velocity", 1e-3, 16), ("noise", 1e-3, 32)
    ]  # fmt: skip
    assert {c.max_epochs for c in training} == {20} and [c.run for c in training] == NAMES


def test_a_run_keeps_its_name_when_the_grid_grows_or_is_reordered(grid_of):
    before = names(grid_of())
    wider = names(grid_of(GRID.replace("[noise, velocity]", "[velocity, noise]").replace("1e-4,", "0.01, 0.0001, ")))
    assert set(before) < set(wider)


def test_values_are_converted_from_the_text_as_typed(grid_of):
    grid = grid_of("name: a\nset: {make_missing: no, multipliers: '1,2,2', synthetic_first: 0012}\nruns: [{}]\n")
    config = grid.runs[0].configs
    assert config["03_conditioning"].make_missing is False and config["01_data_audit"].synthetic_first == 12
    assert names(grid) == ["a"] and grid.preset == "demo"


def test_stages_are_put_in_order(grid_of):
    assert grid_of(f"{GRID}stages: [03, 1, 02_autoencoder_check]\n").stages == tuple(FIRST_THREE)


def test_paths_are_relative_to_the_working_directory(grid_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = grid_of("name: a\ngrid: {data_dir: [one/data, two/data]}\n")
    assert [run.configs["01_data_audit"].data_dir for run in grid.runs] == [
        f"{tmp_path}/{k}/data" for k in ("one", "two")
    ]
    assert names(grid) == ["a-one-data", "a-two-data"], "no name reveals a path of this machine"


def test_names_are_safe_unique_and_stable_whatever_the_values(grid_of):
    long = ",".join(["0"] * 90)
    text = f"name: a\ngrid:\n  guidance_scales: ['{long},1', '{long},2', '0, 1']\n  sampler: [dpm++2m, ddim]\n"
    found = names(grid_of(text))
    assert [safe_name(name) for name in found] == found and len(set(found)) == 6
    assert found[-2:] == ["a-0-1-dpm-2m", "a-0-1-ddim"]
    assert set(found[:2]) <= set(names(grid_of(text.replace("'0, 1'", "'7'"))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not a mapping\. Fix: write `parameter"),
        ("name: a\n", r"0 runs; from 1 to 1000 are allowed"),
        ("name: a\ngrid: {seed: []}\n", r"0 runs; "),
        ("name: a\ngrid: {seed: 1}\n", r"grid.seed = '1': allowed: list \(text\)\. Fix: see the documentation"),
        ("name: a\ngrid: {seed: [[1, 2]]}\n", "aliases and nesting deeper than 3"),
        ("name: a\nset: {channels: [8, 8]}\nruns: [{}]\n", r"set.channels = .*'8'\]: allowed: text\."),
        ("- a\n", r"is not a mapping"),
        ("name: a\nruns: {seed: 1}\n", r"runs = \{'seed': '1'\}: allowed: list \(mapping of names to values\)\."),
        ("name: a\nruns: [1]\n", r"runs.0 = '1': allowed: mapping of names to values\."),
        ("name: a\nruns: [{seed: 2}, {samples: 2}]\n", r"two runs have the same name 'a-2'"),
        ("name: a\n? [b]\n: c\n", r"is not valid YAML \("),
        ("name: a\n---\nname: b\n", r"is not valid YAML \("),
        ("name: a/b\nruns: [{}]\n", r"name = 'a/b': allowed: letters, digits"),
        ("runs: [{}]\n", r"^[^:]*: no 'name' is given\. Fix: see the documentation"),
        ("name: a\ngrids: {seed: [1]}\n", r"unknown parameter 'grids'. Fix: did you mean 'grid'\?"),
        ("name: a\npreset: huge\nruns: [{}]\n", r"no preset 'huge'"),
        ("name: a\nstages: [09]\nruns: [{}]\n", r"no stage '09'"),
        ("name: a\nruns: [{max_epoch: 1}]\n", r"unknown parameter 'max_epoch'. Fix: did you mean 'max_epochs'\?"),
        ("name: a\nruns: [{seed: 1}, {seed: x}]\n", r"seed = 'x': allowed: integer from 0, below 2,147,483,648\."),
        ("name: a\nset: {seed: 1}\nruns: [{seed: 2}]\n", r"'seed' is in `set` and varies\. Fix: keep one"),
        ("name: a\nset: {run: b}\nruns: [{}]\n", r"'run' cannot be set"),
        ("name: a\ngrid: {learning_rate: [1e-3, 0.001]}\n", r"two runs have the same name 'a-0\.001'"),
        ("name: a\nset: &x {seed: 1}\nruns: [*x]\n", "aliases and nesting"),
        ("name: !!python/object/apply:os.system [id]\n", r"name = \['id'\]: allowed: letters, digits"),
        ("name: a\nruns: [{]\n", r"is not valid YAML \(.*line 2"),
        (f"name: a\ngrid: {{seed: {list(range(101))}, samples: {list(range(1, 11))}}}\n", r"1010 runs; from 1 to 1000"),
        ("name: a\ngrid:\n" + "".join(f"  p{k}: [{'1,' * 99}1]\n" for k in range(100)), r"0{20} runs; from 1 to 1000"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_rejected_in_one_line(grid_of, text, message):
    with pytest.raises(ConfigError, match=message) as rejected:
        grid_of(text)
    assert "grid.yaml" in rejected.value.where and "\n" not in str(rejected.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 65537, "is larger than 65536 bytes"),
        (b"name: \xff", r"is not valid YAML \(.*invalid start byte"),
        (b"name: a\nruns: " + b"[" * 60000, "nesting deeper than 3 are not allowed"),
        (None, r"grid\.yaml: cannot be read \(No such file"),
    ],
)
def test_a_file_that_cannot_be_read_or_would_cost_much_is_rejected_at_once(tmp_path, content, message):
    if content:
        (tmp_path / "grid.yaml").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(LdmError, match=message):
        read_sweep(tmp_path / "grid.yaml")
    assert time.monotonic() - start < 5


def test_the_example_is_accepted():
    assert len(read_sweep(ROOT / "docs" / "sweep.yaml").runs) == 4


# ---- processes, with a stand-in for `python -m ldm_lib run`

STAND_IN = """\
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
name, calls = words[words.index("--run") + 1], pathlib.Path(os.environ["CALLS"])
values = dict(word.split("=", 1) for word in words if "=" in word)
def record(event):
    entry = {"run": name, "event": event, "time": time.monotonic(), "words": words, "pid": os.getpid(),
              "threads": os.environ.get("OMP_NUM_THREADS"), "cwd": os.getcwd()}
    with calls.open("a") as stream:
        stream.write(json.dumps(entry) + "\\n")
def end(*_):
    record("terminated")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
record("started")
time.sleep(float(os.environ.get("TAKES", "0.3")))
if values["seed"] in os.environ.get("FAILS", "").split(","):
    print("ERROR 04_training: loss is nan. Fix: a lower rate.\\nand more", flush=True)
    sys.exit(1)
record("ended")
"""
SEEDS = "name: seeds\npreset: smoke\nstages: [01, 02]\nset: {data_dir: a=b c}\ngrid: {seed: [0, 1, 2, 3]}\n"


STOPPED = "ERROR stopped. Fix: give the same command again: it continues, finished runs are not repeated."


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The record of the stand-in, event by event."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "a=b c").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, str(tmp_path / "stand_in.py"), "run"))
    monkeypatch.setattr(sweep, "POLL_S", 0.02)
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.fixture
def seeds(tmp_path):
    """The path of a grid of four runs."""
    path = tmp_path / "seeds.yaml"
    path.write_text(SEEDS)
    return str(path)


def most_at_once(events):
    """The largest number of runs at the same time."""
    level, most = 0, 0
    for event in sorted(events, key=lambda event: event["time"]):
        level += 1 if event["event"] == "started" else -1
        most = max(most, level)
    return most


@pytest.mark.parametrize("jobs", [1, 4])
def test_jobs_is_the_number_of_concurrent_runs_which_divide_the_cores(calls, seeds, jobs, capsys):
    assert main(["sweep", seeds, "--jobs", str(jobs)]) == 0
    events = calls()
    assert most_at_once(events) == jobs
    assert sorted(e["run"] for e in events if e["event"] == "ended") == [f"seeds-{k}" for k in range(4)]
    threads = None if jobs == 1 else str(max(1, len(os.sched_getaffinity(0)) // jobs))
    assert {e["threads"] for e in events} == {threads}
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[1/4] seeds-0: started, log in ") and said[0].endswith("seeds-0.txt")
    ends = [line for line in said if re.fullmatch(r"\[\d/4\] seeds-\d: done after \d+ s; \d left", line)]
    assert [line.split("; ")[1][0] for line in ends] == ["3", "2", "1", "0"]


def test_a_run_is_started_by_the_command_of_users(calls, seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["sweep", seeds, "--jobs", "2", "--only", "3"]) == 0
    (event,) = [event for event in calls() if event["event"] == "started"]
    assert event["words"] == [
        "run", "01_data_audit", "02_autoencoder_check", "--run", "seeds-3", "--preset", "smoke",
        "--set", "data_dir=a=b c", "--set", "seed=3",
    ]  # fmt: skip
    assert event["threads"] == "7" and event["cwd"] == str(tmp_path), "as the user has decided; where it was typed"
    assert not (sweep_folder("seeds") / "table.csv").exists(), "tasks of an array do not write the table of all"


def test_a_failed_run_stops_no_other_and_is_reported_at_the_end(calls, seeds, capsys, monkeypatch):
    monkeypatch.setenv("FAILS", "0,2")
    monkeypatch.setenv("TAKES", "0")
    assert main(["sweep", seeds]) == 1
    assert sorted(e["run"] for e in calls() if e["event"] == "ended") == ["seeds-1", "seeds-3"]
    reason = "ended with status 1 (ERROR 04_training: loss is nan. Fix: a lower rate.)"
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-2:] == [f"ERROR seeds-0: {reason}", f"ERROR seeds-2: {reason}"]
    assert f"[1/4] seeds-0: {reason} after 0 s; 3 left" in printed.err.splitlines()
    assert [row["state"] for row in results(read_sweep(seeds))] == ["failed", "missing", "failed", "missing"]
    monkeypatch.setenv("FAILS", "")
    assert main(["sweep", seeds]) == 0
    assert [row["state"] for row in results(read_sweep(seeds))] == ["missing"] * 4, "nothing of it failed any more"


@pytest.mark.parametrize(("sent", "status"), [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)
])  # fmt: skip
def test_a_stopped_sweep_stops_its_runs_first(calls, seeds, tmp_path, sent, status):
    script = (
        "import sys\nfrom ldm_lib.experiment import sweep\nfrom ldm_lib.__main__ import main\n"
        "sweep.COMMAND = (sys.executable, 'stand_in.py', 'run')\nsys.exit(main(['sweep', sys.argv[1], '--jobs', '2']))"
    )
    environment = {**os.environ, "TAKES": "60"}
    command = [sys.executable, "-c", script, seeds]
    # Tests that were started in the background ignore SIGINT, and so would their children.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    end = time.monotonic() + 30
    while not (tmp_path / "calls").exists() or len(calls()) < 2:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and errors.splitlines()[-1] == STOPPED
    events = calls()
    assert sorted(e["event"] for e in events) == ["started"] * 2 + ["terminated"] * 2, "and no other was started"
    assert not [e for e in events if Path(f"/proc/{e['pid']}").exists()]
    assert [row["state"] for row in results(read_sweep(seeds))] == ["missing"] * 4, "stopped is not failed"


def test_a_run_that_ignores_sigterm_is_killed(calls, seeds, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE_S", 0.2)
    ignoring = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE)
    process.stdout.readline()
    sweep._stop([process])
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "4"], "ERROR --only 4: the runs are 0 to 3. Fix: see --count for their number."),
        (["--only", "-1"], "ERROR --only -1: the runs are 0 to 3. Fix: "),
        (["--jobs", "0"], "ERROR --jobs 0: at least 1. Fix: write for example --jobs 2."),
    ],
)
def test_invalid_options_are_rejected_before_anything_runs(calls, seeds, tmp_path, words, message, capsys):
    assert main(["sweep", seeds, *words]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "calls").exists()


def test_one_invalid_run_keeps_all_from_running(calls, tmp_path, outputs, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\ngrid: {seed: [0, 1, -1]}\n")
    assert main(["sweep", str(path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"ERROR {path}: seed = '-1': allowed: integer from 0") and errors.count("\n") == 1
    assert not (tmp_path / "calls").exists() and not outputs.exists()


def test_counting_runs_nothing(calls, seeds, tmp_path, outputs, capsys):
    assert main(["sweep", seeds, "--count"]) == 0
    assert capsys.readouterr().out == "4\n" and not outputs.exists() and not (tmp_path / "calls").exists()


# ---- reuse of stages


@pytest.fixture
def plain(executed, monkeypatch):
    """Stages by stand-ins, with placeholder reports and cached provenance, which would take most of the time."""

    def write(notebook, html, *, title):
        html.write_text(title)

    provenance = run_folder.provenance()
    monkeypatch.setattr(report, "write_report", write)
    monkeypatch.setattr(run_folder, "provenance", lambda: provenance)
    return executed


def content(folder):
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def run(sweep_run, grid, **more):
    """The lines of the runner about a run of a sweep."""
    lines = []
    values = sweep_run.values | more
    runner.run_stages(grid.stages, run=sweep_run.name, preset=grid.preset, overrides=values, command=["test"],
                      progress=lines.append)  # fmt: skip
    return lines


def reused(grid, place, outputs):
    one = grid.runs[place]
    return sweep.reuse_stages(outputs / one.name, one.configs, grid.stages, [outputs / other for other in names(grid)])


@pytest.mark.parametrize(
    ("parameter", "values", "shared"),
    [("masks_per_patient", "1, 2", 0), ("prediction", "noise, velocity", 3), ("device", "auto, cpu", 6)],
)
def test_identical_stages_of_two_runs_are_made_once(grid_of, plain, outputs, parameter, values, shared):
    grid = grid_of(f"name: s\npreset: smoke\ngrid: {{{parameter}: [{values}]}}\n")
    first, second = (outputs / name for name in names(grid))
    run(grid.runs[0], grid)
    stages = list(STAGES)
    assert reused(grid, 1, outputs) == dict.fromkeys(stages[:shared], first.name)
    assert [content(second / stage) for stage in stages[:shared]] == [content(first / s) for s in stages[:shared]]
    lines = run(grid.runs[1], grid)
    assert lines[:shared] == [f"{stage}: done already, skipped" for stage in stages[:shared]]
    assert plain == stages + stages[shared:]
    assert reused(grid, 1, outputs) == {}, "what is done is not copied again"


@pytest.fixture
def pair(grid_of, plain, outputs):
    """A sweep of two runs that share three stages, the first of them made, with maps and latents."""
    grid = grid_of("name: s\npreset: smoke\ngrid: {prediction: [noise, velocity]}\n")
    run(grid.runs[0], grid)
    first, second = (outputs / name for name in names(grid))
    for name in ("maps/a.nii.gz", "maps/a.json", "latents/a-0-12.safetensors", "latents/.a.part"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text(name)
    return grid, first, second


def test_maps_and_latents_are_copied_but_nothing_unfinished(pair, outputs):
    grid, first, second = pair
    reused(grid, 1, outputs)
    assert content(second / "maps") == content(first / "maps")
    assert list(content(second / "latents")) == ["a-0-12.safetensors"]
    for large, shared in (("maps/a.nii.gz", True), ("latents/a-0-12.safetensors", True), ("maps/a.json", False)):
        assert (first / large).samefile(second / large) == shared
    assert sorted(p.name for p in second.iterdir() if p.is_dir()) == [*FIRST_THREE, "latents", "maps"]


def test_changes_of_a_copy_never_reach_its_source(pair, outputs):
    grid, first, second = pair
    reused(grid, 1, outputs)
    before = content(first)
    run(grid.runs[1], grid, seed=5, overwrite=True)
    assert (second / FIRST_THREE[0] / "result.txt").read_text() == "seed 5"
    assert content(first) == before


@pytest.mark.parametrize("harm", ["damaged", "open", "other settings", "other code's record"])
def test_a_source_must_be_undamaged_and_identical(pair, outputs, harm):
    grid, first, _ = pair
    stage = first / FIRST_THREE[1]
    if harm == "damaged":
        (stage / "result.txt").write_text("tampered")
    elif harm == "open":
        (stage / "done.json").unlink()
    else:
        record = json.loads((stage / "parameters.json").read_text())
        record["parameters" if harm == "other settings" else "inputs"] |= {"seed": 1}
        write_json(stage / "parameters.json", record)
    assert list(reused(grid, 1, outputs)) == FIRST_THREE[:1]


def test_a_started_stage_is_left_to_the_runner(pair, outputs):
    grid, _, second = pair
    (second / FIRST_THREE[1]).mkdir(parents=True)
    (second / FIRST_THREE[1] / "checkpoint").write_text("half way")
    assert list(reused(grid, 1, outputs)) == FIRST_THREE[:1]
    assert list(content(second / FIRST_THREE[1])) == ["checkpoint"]


# ---- table and figure

PSNR = {  # patient -> PSNR of one sample in each of its masks; the mean of K is 1 dB better
    "P0": [10.0, 12.0, 14.0], "P1": [20.0], "P2": [16.0, 18.0],
}  # fmt: skip


def make_done(grid, place, outputs, *, psnr=PSNR, stages=None, seconds=10.0, **other):
    """What a run leaves for the table to read."""
    one = grid.runs[place]
    for stage in stages or grid.stages:
        folder = outputs / one.name / stage
        folder.mkdir(parents=True)
        record = {"parameters": tracked(one.configs[stage]) | other, "seconds": seconds, "peak_memory_mb": 1}
        write_json(folder / "done.json", record | {"outputs": {}, "checks": [], "finished": "2030-01-01"})
        write_json(folder / "summary.json", {"val_psnr_at_best": 11.5, "sha256": "abc", "optimiser_steps": 7})
    with (outputs / one.name / list(STAGES)[-1] / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["case", "patient", "method", "ssim", "psnr_01", "mse"])
        writer.writeheader()
        for patient, values in psnr.items():
            for k, value in enumerate(values):
                for method, more in (("sample", 0), (f"mean of {one.value('samples')}", 1), ("upper bound", 9)):
                    scores = {"ssim": 0.5, "psnr_01": value + more, "mse": 10 ** -(value / 10)}
                    writer.writerow({"case": f"{patient}-{k}", "patient": patient, "method": method} | scores)


@pytest.fixture
def three(grid_of, outputs):
    """A sweep of three runs: one done, one failed, one not begun."""
    grid = grid_of(
        "name: t\npreset: smoke\ngrid: {prediction: [noise, velocity], learning_rate: [1e-3]}\nruns: [{seed: 4}]\n"
    )
    make_done(grid, 0, outputs)
    sweep_table.log_path(grid, grid.runs[1]).parent.mkdir(parents=True)
    sweep_table.log_path(grid, grid.runs[1]).write_text("ERROR no\nended with status 1\n")
    return grid


def test_scores_are_means_over_patients_with_their_interval(three):
    row = results(three)[0]
    means = [12.0, 20.0, 17.0]  # a patient with three masks counts once
    assert row["sample: PSNR"] == pytest.approx(np.mean(means))
    assert row["mean of 2: PSNR"] == pytest.approx(np.mean(means) + 1)
    expected = bootstrap_by_patient(means, ["a", "b", "c"])
    assert (row["sample: PSNR low"], row["sample: PSNR high"]) == (expected["low"], expected["high"])
    assert expected["low"] < np.mean(means) < expected["high"]
    assert row["patients"] == 3 and row["masks"] == 6 and row["seconds"] == 60 and row["state"] == "done"
    assert (row["sample: SSIM low"], row["sample: SSIM"], row["sample: SSIM high"]) == (0.5, 0.5, 0.5)
    assert (row["prediction"], row["learning_rate"], row["seed"]) == ("noise", 1e-3, 0)


def test_the_table_has_every_run_in_order_with_its_state(three):
    table = write_results(three)
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert lines[0][:4] == ["run", "prediction", "learning_rate", "seed"] and lines[0][-1] == "state"
    assert [line[0] for line in lines[2:]] == names(three) and len({len(line) for line in lines[2:]}) == 1
    assert [line[-1] for line in lines[2:]] == ["done", "failed", "missing"]
    assert lines[2][lines[0].index("sample: PSNR")] == "16.33 [12, 20]"
    folder = sweep_folder("t")
    assert (folder / "table.md").read_text() == f"{table}\n"
    with (folder / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["sample: PSNR"]) == results(three)[0]["sample: PSNR"], "no digit is lost"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_made_with_other_settings_is_not_this_run(grid_of, outputs):
    grid = grid_of(GRID)
    make_done(grid, 0, outputs, seed=1)
    row = results(grid)[0]
    assert row["state"] == "missing" and row["seconds"] == 0 and "sample: PSNR" not in row


def test_one_patient_has_no_interval(grid_of, outputs):
    grid = grid_of(GRID)
    make_done(grid, 0, outputs, psnr={"P0": [10.0, 14.0]})
    row = results(grid)[0]
    assert row["sample: PSNR"] == 12 and np.isnan(row["sample: PSNR low"]) and row["patients"] == 1
    assert "| 12 | " in write_results(grid)


def test_k_is_named_where_it_does_not_vary(grid_of, outputs):
    grid = grid_of("name: t\npreset: smoke\ngrid: {samples: [2, 3]}\n")
    for place in (0, 1):
        make_done(grid, place, outputs)
    assert [row["mean of K: PSNR"] for row in results(grid)] == pytest.approx([17 + 1 / 3] * 2)


def test_without_stage_06_the_summary_of_the_last_stage_is_shown(grid_of, outputs):
    grid = grid_of(f"{GRID}stages: [01, 02, 03, 04]\n")
    make_done(grid, 0, outputs, stages=STAGES)
    row = results(grid)[0]
    assert row["val_psnr_at_best"] == 11.5 and row["optimiser_steps"] == 7 and "sha256" not in row
    assert "sample: PSNR" not in row and row["seconds"] == 40
    assert "| 11.5 | " in write_results(grid)


def test_a_sweep_without_finished_runs_has_a_table_and_no_figure(grid_of, tmp_path, capsys):
    grid_of(GRID)
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--table"]) == 0
    assert capsys.readouterr().out.count("| missing |") == 5
    assert [p.name for p in sorted(sweep_folder("objectives").iterdir())] == ["table.csv", "table.md"]


# ---- real runs

TINY = {"synthetic_patients": 3, "autoencoder_steps": 20, "max_epochs": 1, "num_inference_steps": 2, "base_width": 8,
        "fidelity_cases": 0, "counterfactual_days": "0", "guidance_scales": "1"}  # fmt: skip


@pytest.mark.slow
def test_a_stopped_sweep_continues_and_ends_with_table_and_figure(tmp_path, outputs):
    settings = ", ".join(f"{name}: '{value}'" for name, value in TINY.items())
    path = tmp_path / "grid.yaml"
    path.write_text(f"name: real\npreset: smoke\nset: {{{settings}}}\ngrid: {{prediction: [noise, velocity]}}\n")
    command = [sys.executable, "-m", "ldm_lib", "sweep", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("[2/2] real-velocity: started"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    first, second = outputs / "real-noise", outputs / "real-velocity"
    made = content(first)
    assert not (second / list(STAGES)[-1]).exists()
    ended = subprocess.run(command, capture_output=True, text=True)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    changing = {"index.html", "report.md", ".lock"}
    assert {k: v for k, v in content(first).items() if k not in changing} == {
        k: v for k, v in made.items() if k not in changing
    }, "what was done is not made again"
    for stage in FIRST_THREE:
        assert content(second / stage) == content(first / stage)
    assert ended.stdout.count("| done |") == 2
    folder = sweep_folder("real")
    assert sorted(p.name for p in folder.iterdir()) == ["figure.png", "logs", "table.csv", "table.md"]
    log = (folder / "logs" / "real-velocity.txt").read_text()
    assert all(f"{stage}: done already, skipped" in log for stage in FIRST_THREE) and "04_training: done in" in log


# ---- more laws


def test_a_run_locked_by_another_process_is_left_alone(pair, outputs):
    grid, _, second = pair
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom ldm_lib.locking import FolderLock\n"
        "FolderLock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(second)], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        with pytest.raises(RunError, match=f"locked by pid {holder.pid}"):
            reused(grid, 1, outputs)
    finally:
        holder.kill()
        holder.communicate()
    assert not (second / FIRST_THREE[0]).exists()


def test_other_file_systems_get_copies(pair, outputs, monkeypatch):
    def fail(*_):
        raise OSError(18, "Invalid cross-device link")

    grid, first, second = pair
    monkeypatch.setattr(os, "link", fail)
    reused(grid, 1, outputs)
    assert content(second / "maps") == content(first / "maps")
    assert not (first / "maps/a.nii.gz").samefile(second / "maps/a.nii.gz")


def test_counting_runs_nothing_and_loads_nothing_heavy(seeds, outputs):
    script = (
        "import sys\nfrom ldm_lib.__main__ import main\nmain(['sweep', sys.argv[1], '--count'])\n"
        "print(sorted({'torch', 'papermill', 'pandas', 'matplotlib', 'lightning', 'monai'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", script, seeds], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["4", "[]"] and not outputs.exists()
