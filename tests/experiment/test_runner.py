"""Headless runs: what is skipped, rejected, killed or unfinished, with tiny notebooks in place of the real ones."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import pytest

from ldm_lib.data import cohort
from ldm_lib.errors import ConfigError, InputError, RunError
from ldm_lib.experiment import report, runner
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE
from ldm_lib.experiment.stage import open_stage
from ldm_lib.experiment.stages import STAGES, parameters_cell
from ldm_lib.locking import OWNER_VARIABLE, FolderLock

AUDIT, AUTOENCODER, *_ = STAGES
OPEN = f'from ldm_lib.experiment.stage import open_stage\nstage = open_stage("{AUDIT}", globals())'


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Write the cells of stage 01's notebook."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(runner, "NOTEBOOKS", folder)

    def write(*sources):
        first = nbf.new_code_cell(parameters_cell(STAGES[AUDIT]), metadata={"tags": ["parameters"]})
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
        cells = [first, *map(nbf.new_code_cell, sources)]
        nbformat.write(nbf.new_notebook(cells=cells, metadata=kernel), folder / f"{AUDIT}.ipynb")

    return write


def run(*stages, name="lab", preset="smoke", **overrides):
    lines = []
    runner.run_stages(stages, run=name, preset=preset, overrides=overrides, command=["test"], progress=lines.append)
    return lines


def test_stages_run_in_order_with_records_and_reports(outputs, executed):
    lines = run()
    assert executed == list(STAGES)
    assert lines[0].startswith(f"{AUDIT}: running, log in ") and lines[0].endswith("log.txt")
    assert re.fullmatch(rf"{AUDIT}: done in \d+ s, 1 of 2 checks passed \(not: liked\), \d+ MB", lines[1])
    folder = outputs / "lab"
    for stage in STAGES:
        assert (folder / stage / "done.json").exists() and not (folder / stage / "pending.json").exists()
        assert f"lab: {stage}" in (folder / stage / "report.html").read_text()
    index = (folder / "index.html").read_text()
    assert [index.count(f'href="{stage}/report.html"') for stage in STAGES] == [1] * 6
    assert index.count("<strong>FAILED</strong> liked (no)") == 6 and "6 of 12 checks passed." in index
    assert json.loads((folder / "run.json").read_text())["command"] == ["test"]


def test_what_is_done_is_skipped_and_nothing_is_touched(outputs, executed):
    run()
    changing = {"index.html", "report.md", ".lock"}
    before = {p: p.stat().st_mtime_ns for p in outputs.rglob("*") if p.is_file() and p.name not in changing}
    lines = run()
    assert lines == [f"{stage}: done already, skipped" for stage in STAGES] and len(executed) == 6
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_stage_whose_earlier_ones_are_not_done_is_rejected(executed):
    run(AUDIT)
    with pytest.raises(RunError, match=rf"lab/{AUTOENCODER}: is not done. Fix: run `ldm run 02 --run lab`"):
        run("03_conditioning")
    assert executed == [AUDIT]


def test_other_settings_are_rejected_and_the_record_stays(outputs, executed):
    run(AUDIT)
    before = {p: p.read_bytes() for p in outputs.rglob("*.json")}
    with pytest.raises(
        RunError, match=f"lab/{AUDIT}: was made with other settings: seed was 0, now 1. Fix: .*--overwrite"
    ):
        run(AUDIT, seed=1)
    assert executed == [AUDIT]
    assert before == {p: p.read_bytes() for p in outputs.rglob("*.json")}, (
        "run.json and config.json describe what was made"
    )


def test_overwrite_replaces_a_stage_and_later_ones_are_rejected_until_replaced(outputs, executed):
    run(AUDIT, AUTOENCODER)
    run(AUDIT, seed=1, overwrite="true")
    assert (outputs / "lab" / AUDIT / "result.txt").read_text() == "seed 1"
    with pytest.raises(RunError, match=f"lab/{AUTOENCODER}: .*input {AUDIT} changed"):
        run(AUTOENCODER)
    run(AUTOENCODER, overwrite=True)
    assert executed == [AUDIT, AUTOENCODER, AUDIT, AUTOENCODER]


def test_a_damaged_output_is_made_again(outputs, executed):
    run(AUDIT)
    (outputs / "lab" / AUDIT / "result.txt").write_text("tampered")
    run(AUDIT)
    assert executed == [AUDIT, AUDIT]
    assert (outputs / "lab" / AUDIT / "result.txt").read_text() == "seed 0"


def test_a_stage_that_failed_before_its_report_is_not_done_and_runs_again(outputs, executed, monkeypatch):
    def full(*paths, title):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(report, "write_report", full)
        run(AUDIT)
    assert not (outputs / "lab" / AUDIT / "done.json").exists()
    assert run(AUDIT)[-1].startswith(f"{AUDIT}: done in")


def test_parameters_are_rejected_before_a_folder_or_a_kernel_is_made(outputs, tmp_path):
    script = (
        "import sys\nfrom ldm_lib.experiment import runner\nfrom ldm_lib.errors import ConfigError\n"
        "try:\n    runner.run(preset='smoke', run='lab', max_epochs='-1')\n"
        "except ConfigError as error:\n    print(error)\n"
        "print(sorted({'papermill', 'nbclient', 'torch', 'jupyter_client'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[0].startswith("max_epochs = '-1': allowed: integer from 1 to 100,000,000. Fix:")
    assert printed.splitlines()[1] == "[]"
    assert not outputs.exists()


def test_a_locked_run_is_rejected(outputs, executed):
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom ldm_lib.locking import FolderLock\n"
        "FolderLock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(outputs / "lab")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        with pytest.raises(RunError, match=f"lab: locked by pid {holder.pid} since"):
            run(AUDIT)
    finally:
        holder.kill()
        holder.wait()
    run(AUDIT)
    assert executed == [AUDIT]


def test_the_run_is_released_at_the_end_and_after_an_error(outputs, executed):
    run(AUDIT)
    with pytest.raises(RunError, match="other settings"):
        run(AUDIT, seed=1)
    assert not FolderLock._held and OWNER_VARIABLE not in os.environ


def test_paths_are_relative_to_the_working_directory_of_the_command(outputs, tmp_path, monkeypatch):
    received = {}
    monkeypatch.setattr(cohort, "source_digests", lambda *folders: dict.fromkeys(folders, "digest"))
    monkeypatch.setattr(runner, "_make", lambda stage, config, *_: received.update(config.model_dump()) or "made")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(AUDIT, data_dir="cases/", conditioning_dir="~/maps")
    assert received["data_dir"] == str(tmp_path / "cases")
    assert received["conditioning_dir"] == str(tmp_path / "home" / "maps")
    run(AUDIT, name="other", data_dir="")
    assert received["data_dir"] == ""


def test_a_failed_cell_is_reported_in_one_line_and_its_notebook_is_kept(outputs, notebook):
    notebook(OPEN, "print('before')", "raise ValueError('first line\\nsecond line')")
    with pytest.raises(
        RunError, match=rf"^{AUDIT}, cell \d: ValueError: first line. Fix: see .*partial.ipynb.$"
    ) as failure:
        run(AUDIT)
    folder = outputs / "lab" / AUDIT
    assert str(failure.value).count("\n") == 0
    assert not (folder / "done.json").exists() and not (folder / "notebook.ipynb").exists()
    kept = nbformat.read(folder / "notebook.partial.ipynb", 4)
    outputs_kept = [output for cell in kept.cells for output in cell.get("outputs", ())]
    assert any("before" in output.get("text", "") for output in outputs_kept)
    assert any(output.get("ename") == "ValueError" for output in outputs_kept)


def test_a_killed_kernel_is_reported_and_its_stage_never_done(outputs, notebook):
    notebook(OPEN, "stage.close({})", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match=rf"^{AUDIT}: the kernel was killed \(signal 9; likely out of memory\). Fix: "):
        run(AUDIT)
    folder = outputs / "lab" / AUDIT
    assert not (folder / "done.json").exists() and not (folder / "notebook.ipynb").exists()


def test_stages_run_from_python_as_from_the_command_line(outputs, executed):
    import ldm_lib

    folder = ldm_lib.run("01", preset="smoke", run="lab", seed=4)
    assert folder == outputs / "lab" and executed == [AUDIT]
    assert json.loads((folder / AUDIT / "done.json").read_text())["parameters"]["seed"] == 4
    assert json.loads((folder / "run.json").read_text())["command"] == ["ldm_lib.run"]
    assert ldm_lib.run(["1", "02"], preset="smoke", run="lab", seed=4) == folder and executed == [AUDIT, AUTOENCODER]
    with pytest.raises(ConfigError, match="no stage '7'"):
        ldm_lib.run("7")


def test_a_stage_runs_in_outputs_of_the_working_directory_without_a_temporary_folder(tmp_path, notebook, monkeypatch):
    monkeypatch.delenv(OUTPUTS_VARIABLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", None)
    notebook(OPEN, "stage.close({})")
    assert "done in" in run(AUDIT)[1] and (tmp_path / "outputs" / "lab" / AUDIT / "done.json").exists()
    assert OUTPUTS_VARIABLE not in os.environ, "it is set for the kernels alone"


class CellError(Exception):
    """What papermill raises for a cell that failed."""

    def __init__(self, ename, evalue):
        super().__init__(ename)
        self.ename, self.evalue, self.exec_count = ename, evalue, 3


@pytest.mark.parametrize(
    ("ename", "evalue", "line"),
    [
        ("InputError", "a.nii: empty. Fix: get it again.", "04_training, cell 3: a.nii: empty. Fix: get it again."),
        ("TrainingError", "loss is nan.", "04_training, cell 3: loss is nan."),
        ("ValueError", "", "04_training, cell 3: ValueError: . Fix: see nb.ipynb."),
        ("KeyError", "'x'\ny", "04_training, cell 3: KeyError: 'x'. Fix: see nb.ipynb."),
    ],
)  # fmt: skip
def test_errors_of_this_library_stay_as_they_are(ename, evalue, line):
    assert str(runner._failure(CellError(ename, evalue), "04_training", Path("nb.ipynb"))) == line


def without_kernel(monkeypatch, then):
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", then)


def test_a_notebook_that_does_not_finish_its_stage_is_rejected(outputs, monkeypatch):
    without_kernel(monkeypatch, lambda source, partial, **_: partial.write_text("{}"))
    with pytest.raises(RunError, match=f"^{AUDIT}: the notebook ended without finishing its stage. Fix: see"):
        run(AUDIT)
    assert not (outputs / "lab" / AUDIT / "done.json").exists()


def test_a_kernel_that_does_not_start_is_reported(monkeypatch):
    from ldm_lib.experiment import kernel

    def silent(*_, **__):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    without_kernel(monkeypatch, silent)
    ended = types.SimpleNamespace(poll=lambda: -15)  # the kernel of the stage before
    monkeypatch.setattr(kernel.RunnerKernelManager, "process", ended)
    with pytest.raises(RunError, match=rf"^{AUDIT}: the kernel failed .*60 seconds.*ldm doctor"):
        run(AUDIT)


def test_describe_lists_each_parameter_with_value_and_description():
    lines = [line for line in runner.describe("04_training", "smoke").splitlines() if line.startswith("  ")]
    fields = STAGES["04_training"].model_fields
    assert sorted(line.split()[0] for line in lines) == sorted(fields)
    assert all(f" {fields[line.split()[0]].description} [" in line for line in lines)
    ends = {line.split()[0]: line.rpartition(" [")[2] for line in lines}
    allowed = {
        "prediction": "noise, x0, velocity, flow]",
        "dropout": "number from 0, below 1]",
        "compile": "true, false]",
    }
    assert {name: ends[name] for name in allowed} == allowed
    assert any(line.split()[:2] == ["max_epochs", "2"] for line in lines), "the preset's value"


WRITE_PID = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))"
SLEEPY = f"{WRITE_PID}\ntime.sleep(120)"


def started(tmp_path):
    """The runner as a process of its own, once the kernel is at work, and the kernel's process id."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from ldm_lib.experiment import runner\nfrom ldm_lib.__main__ import main\n"
        "runner.NOTEBOOKS = Path(sys.argv[1])\nsys.exit(main(['run', '01', '--run', 'lab', '--preset', 'smoke']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "notebooks")], stderr=subprocess.PIPE)
    pid_file = tmp_path / "outputs" / "lab" / "pid"
    until(lambda: pid_file.exists() and pid_file.read_text(), 60)
    return process, int(pid_file.read_text())


def test_sigterm_ends_the_kernel_too(outputs, notebook, tmp_path):
    notebook(OPEN, SLEEPY)
    process, kernel = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors.decode()
    assert b"Traceback" not in errors and errors.count(b"ERROR") == 1, errors.decode()
    until(lambda: not Path(f"/proc/{kernel}").exists(), 5)
    assert not (outputs / "lab" / AUDIT / "done.json").exists()
    FolderLock(outputs / "lab").release()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG of Linux")
def test_a_kernel_does_not_outlive_a_killed_runner_even_if_a_cell_holds_the_interpreter(outputs, notebook, tmp_path):
    """The same command, given at once, must have the run's folder to itself."""
    notebook(OPEN, WRITE_PID, "import re; re.match('(a+)+b', 'a' * 60)")
    process, kernel = started(tmp_path)
    time.sleep(0.5)  # the next cell begins, and never lets another thread run
    process.kill()
    process.communicate()
    until(lambda: not Path(f"/proc/{kernel}").exists(), 5)
    FolderLock(outputs / "lab").release()


def until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_other_weights_at_the_same_path_are_noticed(outputs, executed, tmp_path):
    weights = tmp_path / "net" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    given = {"autoencoder_dir": str(weights.parent)}
    run(AUDIT, AUTOENCODER, **given)
    assert run(AUTOENCODER, **given)[0] == f"{AUTOENCODER}: done already, skipped"
    weights.write_bytes(b"two")
    with pytest.raises(RunError, match=r"input net/model.safetensors changed"):
        run(AUTOENCODER, **given)


# ---- comparison of finished runs


def test_runs_are_compared_by_differing_parameters_and_results(outputs, executed):
    for name, seed in (("one", 1), ("two", 2)):
        run(AUDIT, name=name, seed=seed)
        (outputs / name / AUDIT / "summary.json").write_text(json.dumps({"psnr": seed / 3, "note": "x" * 40}))
    rows = [line.strip("| ").split(" | ") for line in runner.compare(AUDIT, ["one", "two"]).splitlines()]
    table = {name: values for name, *values in rows}
    assert list(table) == ["run", "---", "seed", "psnr", "note", "stage_s", "peak_memory_mb"]
    assert table["run"] == ["one", "two"] and table["seed"] == ["1", "2"] and table["psnr"] == ["0.3333", "0.6667"]
    assert table["note"] == ["x" * 24] * 2
    with pytest.raises(RunError, match=f"one/{AUTOENCODER}: is not done"):
        runner.compare(AUTOENCODER, ["one"])
    with pytest.raises(ConfigError, match=r"run = '../x'"):
        runner.compare(AUDIT, ["../x"])


# ---- more laws


@pytest.mark.parametrize("overrides", [{"steps": 1}, {'x=1\nimport os;os.system("touch PWNED")\ny': 1}])
def test_unknown_names_never_reach_a_notebook(executed, overrides):
    with pytest.raises(ConfigError, match="unknown parameter"):
        run(**overrides)
    assert executed == []


def test_an_absent_data_folder_is_rejected_before_a_kernel_starts(executed, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        run(AUDIT, data_dir=str(tmp_path / "nowhere"))
    assert executed == []


@pytest.mark.slow
def test_a_kernel_that_is_killed_before_it_answers_is_reported(outputs, notebook, monkeypatch):
    from ldm_lib.experiment import kernel

    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    spec = kernel.KernelSpec(argv=killed, display_name="Python 3", language="python")
    monkeypatch.setattr(kernel.RunnerKernelManager, "kernel_spec", spec)
    notebook(OPEN, "stage.close({})")
    with pytest.raises(RunError, match=rf"^{AUDIT}: the kernel was killed \(signal 9; likely out of memory\)"):
        run(AUDIT)


def test_a_bar_in_a_value_is_escaped_in_tables():
    assert runner.markdown([["run", "x"], ["a|b", "1"]]).splitlines() == [
        "| run | x |",
        "| --- | --- |",
        "| a\\|b | 1 |",
    ]


def test_only_the_stages_named_run(executed):
    run(AUDIT)
    run(AUTOENCODER)
    assert executed == [AUDIT, AUTOENCODER]


# ---- what was rejected at its start leaves no trace


def kept(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_rejected_data_are_not_those_of_the_run(outputs, executed, tmp_path):
    for name in ("first", "second"):
        folder = tmp_path / name / "A1"
        folder.mkdir(parents=True)
        for role in ("mask", "t1n-voided", "t1n"):
            (folder / f"A1-{role}.nii.gz").write_text(name)
    run(AUDIT, data_dir=str(tmp_path / "first"))
    before = kept(outputs / "lab")
    with pytest.raises(RunError, match="other settings"):
        run(AUDIT, data_dir=str(tmp_path / "second"))
    assert kept(outputs / "lab") == before and str(tmp_path / "first").encode() in before[".places.json"]


def test_a_stage_that_ended_before_it_was_opened_is_not_recorded(outputs, executed, monkeypatch):
    run(AUDIT)
    before = kept(outputs / "lab")

    def reject(stage, config, folder):
        raise ConfigError("precision = '16' on a CPU", where=stage, fix="set precision to auto, bf16 or 32")

    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="on a CPU"):
        patched.setattr(runner, "_execute", reject)
        run(AUTOENCODER, precision="16")
    assert kept(outputs / "lab") == before
    run(AUTOENCODER)
    assert executed == [AUDIT, AUTOENCODER]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_device_that_is_not_there_is_rejected_before_anything_is_removed(outputs, executed, overwrite):
    run(AUDIT, AUTOENCODER)
    before = kept(outputs / "lab" / AUTOENCODER)
    parameters = STAGES[AUTOENCODER](run="lab", precision="16", device="cpu", overwrite=overwrite).model_dump()
    with pytest.raises(ConfigError, match="precision = '16' on a CPU"):
        open_stage(AUTOENCODER, parameters)
    assert kept(outputs / "lab" / AUTOENCODER) == before


def test_a_stage_that_has_made_nothing_takes_other_settings(outputs):
    open_stage(AUDIT, {"run": "lab", "seed": 1})._lock.release()
    stage = open_stage(AUDIT, {"run": "lab", "seed": 2})
    stage._lock.release()
    (stage.folder / "cases.csv").write_text("one")
    with pytest.raises(RunError, match="seed was 2, now 3"):
        open_stage(AUDIT, {"run": "lab", "seed": 3})


# ---- a training of several processes


def test_a_training_takes_its_settings_and_rejects_those_that_earlier_stages_lack(outputs, executed, monkeypatch):
    from ldm_lib.experiment import launch

    run(*list(STAGES)[:3])
    opened = []
    monkeypatch.setattr(launch, "open_stage", lambda stage, values: opened.append(values) or sys.exit())
    with pytest.raises(SystemExit):
        launch.train_run("lab", preset="smoke", settings=["max_epochs=6", "mask_dilation=1"])
    wanted = resolve("smoke", {"run": "lab", "max_epochs": 6})["04_training"]
    assert opened == [wanted.model_dump()]
    with pytest.raises(RunError, match="lab/03_conditioning: was made with other settings: mask_dilation was 1, now 2"):
        launch.train_run("lab", preset="smoke", settings=["mask_dilation=2"])
    with pytest.raises(ConfigError, match="unknown parameter 'max_epoch'"):
        launch.train_run("lab", preset="smoke", settings=["max_epoch=2"])
    with pytest.raises(SystemExit):
        launch.train_run("lab")
    assert opened[1:] == [resolve("smoke", {"run": "lab"})["04_training"].model_dump()]
