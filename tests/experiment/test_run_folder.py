"""Run folders: what is done, from which inputs, and that nothing unfinished passes for done."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ldm_lib import __version__
from ldm_lib.errors import ConfigError, RunError
from ldm_lib.experiment import path_aliases, run_folder
from ldm_lib.experiment import stage as stage_module
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.run_folder import changes, damaged, is_done, outputs_folder, tracked, upstream_digests
from ldm_lib.experiment.stage import open_stage
from ldm_lib.experiment.stages import STAGES
from ldm_lib.locking import OWNER_VARIABLE, FolderLock

AUDIT, AUTOENCODER, CONDITIONING, *_ = STAGES


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """Runs are made in a folder of the test, and every lock is released."""
    monkeypatch.setenv(run_folder.OUTPUTS_VARIABLE, str(tmp_path))
    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    yield tmp_path
    FolderLock(tmp_path / "lab").release()


def done(name, content="result", inputs=None, **parameters):
    """Start a stage, write one file, finish it; return its folder."""
    stage = open_stage(name, parameters, inputs=inputs)
    (stage.folder / "result.txt").write_text(content)
    stage.check("made", True, content)
    stage.close({"content": content})
    return stage.folder


def config(name, **parameters):
    return resolve("coarse", overrides={"run": "lab", **parameters})[name]


def read(path):
    return json.loads(path.read_text())


def test_the_outputs_folder_is_given_by_the_variable_or_in_the_working_directory(outputs, tmp_path, monkeypatch):
    assert outputs_folder() == outputs.resolve()
    monkeypatch.setenv(run_folder.OUTPUTS_VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    assert outputs_folder() == tmp_path.resolve() / "outputs"
    monkeypatch.chdir(run_folder.NOTEBOOKS)
    assert outputs_folder() == run_folder.NOTEBOOKS.parent / "outputs", "as a notebook opened by hand finds its run"


def test_a_finished_stage_is_done_and_records_its_outputs(outputs):
    folder = done(AUDIT, inputs={"data": "abc"}, seed=3)
    record = read(folder / "done.json")
    assert folder == outputs / "lab" / AUDIT
    assert sorted(record["outputs"]) == ["result.txt", "summary.json"]
    assert record["parameters"]["seed"] == 3 and record["inputs"] == {"data": "abc"} and record["stage"] == AUDIT
    assert record["checks"] == [{"check": "made", "found": "result", "passed": True, "required": True}]
    assert record["made_with"]["versions"]["numpy"] == metadata.version("numpy")
    assert is_done(folder, config(AUDIT, seed=3), {"data": "abc"})


def test_links_are_relative_escaped_and_to_files_that_exist(outputs):
    stage = open_stage(AUDIT, {})
    page = stage.run_folder / "05_sampling" / "a b.html"
    page.parent.mkdir()
    page.touch()
    links = stage.links({"<a>": page, "absent": stage.folder / "absent.html"})
    assert links._repr_html_() == '<p>In a browser: <a href="../05_sampling/a%20b.html">&lt;a&gt;</a></p>'
    assert stage.links({})._repr_html_() == ""


def test_a_started_stage_is_not_done(outputs):
    folder = done(AUDIT)
    open_stage(AUDIT, {})
    assert not (folder / "done.json").exists() and not is_done(folder, config(AUDIT), {})


@pytest.mark.parametrize(
    ("parameters", "inputs", "expected"),
    [
        ({"seed": 1}, {}, ["seed was 0, now 1"]),
        ({"spacing_mm": 2, "seed": 3}, {}, ["seed was 0, now 3", "spacing_mm was 4.0, now 2.0"]),
        ({}, {"data": "abc"}, ["input data changed"]),
    ],
)  # fmt: skip
def test_other_settings_are_rejected_listing_every_difference(outputs, parameters, inputs, expected):
    folder = done(AUDIT)
    assert changes(folder, config(AUDIT, **parameters), inputs) == expected
    with pytest.raises(RunError, match=f"lab/{AUDIT}: was made with other settings: {'; '.join(expected)}. Fix: name"):
        open_stage(AUDIT, parameters, inputs=inputs)
    assert is_done(folder, config(AUDIT), {}), "a rejection must leave the stage unchanged"


@pytest.mark.parametrize(("old", "value"), [("variety", "wide"), ("strategy", "ddp")])
def test_a_stage_of_a_version_before_08_is_rejected_in_one_line(outputs, old, value):
    folder = done(AUDIT)
    record = read(folder / "parameters.json")
    record["parameters"][old] = value
    (folder / "parameters.json").write_text(json.dumps(record))
    with pytest.raises(
        RunError, match=rf"lab/{AUDIT}: was made by version 0.7 or before.*{old}.* Fix: name another run"
    ):
        open_stage(AUDIT, {})
    assert not is_done(folder, config(AUDIT), {})
    open_stage(AUDIT, {"overwrite": True}).close({})
    assert is_done(folder, config(AUDIT), {})


def test_memory_is_in_megabytes_on_every_system(monkeypatch):
    here = run_folder.peak_memory_mb()
    assert 10 < here < 100_000
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run_folder.peak_memory_mb() == pytest.approx(here / 1024, abs=2)


def test_overwrite_replaces_the_whole_stage(outputs):
    folder = done(AUDIT)
    stage = open_stage(AUDIT, {"seed": 1, "overwrite": True})
    assert [path.name for path in folder.iterdir()] == ["parameters.json"]
    stage.close({})
    assert is_done(folder, config(AUDIT, seed=1), {}) and not is_done(folder, config(AUDIT), {})


def test_partial_files_of_a_killed_process_are_removed(outputs):
    folder = done(AUDIT)
    (folder / "synthetic" / "data").mkdir(parents=True)
    (folder / "synthetic" / "data" / ".a.nii.gz.4711.part").write_bytes(b"half")
    (folder / "synthetic" / "data" / "a.nii.gz").write_bytes(b"whole")
    open_stage(AUDIT, {})
    assert [path.name for path in (folder / "synthetic" / "data").iterdir()] == ["a.nii.gz"]


def test_the_same_settings_are_accepted_again_and_keep_what_is_there(outputs):
    folder = done(AUDIT)
    for overwrite in (False, True):
        open_stage(AUDIT, {"overwrite": overwrite})
        assert (folder / "result.txt").read_text() == "result"


@pytest.mark.parametrize("untracked", [{"device": "cpu"}, {"overwrite": True}])
def test_the_device_does_not_change_what_is_done(outputs, untracked):
    done(AUDIT)
    folder = done(AUTOENCODER)
    assert is_done(folder, config(AUTOENCODER, **untracked), upstream_digests(outputs / "lab", AUTOENCODER))


def test_tracked_parameters_are_all_that_decide_the_result():
    everything = {name for model in STAGES.values() for name in model.model_fields}
    known = {name for stage in STAGES for name in tracked(config(stage))}
    requirements = {"min_reconstruction_psnr", "min_gain_over_pca", "accept_anyway"}
    storing = {"checkpoint_every", "log_every", "allow_change", "wandb_mode", "use_mlflow", "use_trackio"}
    assert everything - known == requirements | storing | {"run", "overwrite", "device", "num_workers", "workers"}
    assert "devices" in tracked(config("04_training")) and "devices" not in tracked(config("05_sampling"))


def test_only_changes_allowed_by_name_start_the_stage(outputs):
    folder = outputs / "lab" / "04_training"
    folder.mkdir(parents=True)
    started = {"parameters": tracked(config("04_training")), "inputs": {}}
    (folder / "parameters.json").write_text(json.dumps(started))
    (folder / "metrics.csv").write_text("")
    longer = resolve("coarse", {"max_epochs": 90, "allow_change": "max_epochs, patience"})["04_training"]
    run_folder.require_unchanged(folder, longer, {}, fix="")
    assert run_folder.changes(folder, longer, {}) == ["max_epochs was 40, now 90"], "so it is not done"
    other = resolve("coarse", {"max_epochs": 90, "seed": 3, "allow_change": "max_epochs"})["04_training"]
    with pytest.raises(RunError, match="seed was 0, now 3"):
        run_folder.require_unchanged(folder, other, {}, fix="")


def test_parameters_come_from_a_namespace_by_name(outputs):
    stage = open_stage(AUDIT, {"seed": 5, "stage": object(), "_private": 1, "pandas": pd})
    assert stage.config.seed == 5 and stage.config.spacing_mm == config(AUDIT).spacing_mm


def test_wrong_parameters_are_rejected_before_anything_is_made(outputs):
    with pytest.raises(ConfigError, match="spacing_mm = -1"):
        open_stage(AUDIT, {"spacing_mm": -1})
    assert list(outputs.iterdir()) == []


def test_an_earlier_stage_must_be_done(outputs):
    with pytest.raises(RunError, match=rf"lab/{AUDIT}: is not done. Fix: run `ldm run 01 --run lab`"):
        open_stage(AUTOENCODER, {})
    done(AUDIT)
    done(AUTOENCODER)
    open_stage(AUDIT, {})
    with pytest.raises(RunError, match=rf"lab/{AUDIT}: is not done"):
        open_stage(CONDITIONING, {})


def test_a_changed_earlier_stage_is_noticed_later(outputs):
    done(AUDIT)
    folder = done(AUTOENCODER)
    done(AUDIT, content="another result", seed=1, overwrite=True)
    inputs = upstream_digests(outputs / "lab", AUTOENCODER)
    assert changes(folder, config(AUTOENCODER), inputs) == [f"input {AUDIT} changed"]
    with pytest.raises(RunError, match=f"lab/{AUTOENCODER}: .*input {AUDIT} changed"):
        open_stage(AUTOENCODER, {})


def test_an_identical_earlier_stage_changes_nothing(outputs):
    done(AUDIT)
    folder = done(AUTOENCODER)
    done(AUDIT)
    assert is_done(folder, config(AUTOENCODER), upstream_digests(outputs / "lab", AUTOENCODER))


@pytest.mark.parametrize("name", ["result.txt", "summary.json"])
def test_a_missing_or_changed_output_makes_a_stage_not_done(outputs, name):
    folder = done(AUDIT)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"!")
    assert damaged(folder) == [name] and not is_done(folder, config(AUDIT), {})
    (folder / name).unlink()
    assert damaged(folder) == [name] and not is_done(folder, config(AUDIT), {})
    (folder / name).write_bytes(content)
    assert damaged(folder) == [] and is_done(folder, config(AUDIT), {})


def test_notebook_and_report_may_change_without_undoing_a_stage(outputs):
    folder = done(AUDIT)
    for name in ("notebook.ipynb", "report.html", ".hidden"):
        (folder / name).write_text("new")
    assert is_done(folder, config(AUDIT), {})


@pytest.mark.parametrize("name", ["done.json", "parameters.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"parameters": [], "outputs": []}'])
def test_a_record_of_another_form_is_rejected_by_name(outputs, name, content):
    folder = done(AUDIT)
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=rf"{name}: is damaged .* Fix: remove its folder"):
        is_done(folder, config(AUDIT), {})


@pytest.mark.parametrize("content", ["[]", "[" * 100_000])
def test_damaged_path_aliases_are_ignored(tmp_path, content):
    (tmp_path / path_aliases.FILE).write_text(content)
    assert path_aliases.known_paths(tmp_path) == {}


def test_only_a_failed_required_check_keeps_the_stage_from_finishing(outputs):
    stage = open_stage(AUDIT, {})
    stage.check("nice to have", False, 1, required=False)
    table = stage.close({})
    assert (stage.folder / "done.json").exists()
    assert table.to_dict("records") == [{"check": "nice to have", "passed": False, "found": "1", "required": False}]
    stage = open_stage(AUDIT, {})
    stage.check("cases found", False, 0)
    with pytest.raises(RunError, match=f"{AUDIT}: not accepted: cases found .0.. Fix: see"):
        stage.close({"cases": 0})
    assert not (stage.folder / "done.json").exists()
    assert read(stage.folder / "summary.json") == {"cases": 0}


def test_done_is_written_last(outputs, monkeypatch):
    """Killed while the outputs are read, a stage is not done; the record follows the summary."""
    written = []
    original = stage_module.write_json
    monkeypatch.setattr(
        stage_module, "write_json", lambda path, content: (written.append(path.name), original(path, content))
    )
    done(AUDIT)
    assert written == ["parameters.json", "summary.json", "done.json"]
    stage = open_stage(AUDIT, {})
    monkeypatch.setattr(stage_module, "sha256", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        stage.close({})
    assert not (stage.folder / "done.json").exists()


def test_under_a_runner_a_finished_stage_is_pending(outputs, monkeypatch):
    monkeypatch.setenv(OWNER_VARIABLE, str(os.getpid()))
    lock = FolderLock(outputs / "lab")
    folder = done(AUDIT)
    assert (folder / "pending.json").exists() and not (folder / "done.json").exists()
    assert not is_done(folder, config(AUDIT), {})
    assert lock.path in FolderLock._held, "the runner releases the lock"


def test_run_json_records_code_versions_machine_and_command(outputs):
    folder = outputs / "lab"
    folder.mkdir()
    configs = resolve("smoke", {"seed": 9})
    run_folder.write_provenance(folder, preset="smoke", configs=configs, command=["python", "-m", "ldm_lib", "run"])
    record = read(folder / "run.json")
    root = Path(run_folder.__file__).parents[2]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert record["version"] == __version__ and record["git"]["commit"] == (commit or "unknown")
    assert record["command"] == ["python", "-m", "ldm_lib", "run"]
    assert record["versions"] == {name: metadata.version(name) for name in run_folder.PACKAGES}
    assert record["machine"]["cores"] == os.cpu_count() and record["python"] == sys.version.split()[0]
    kept = read(folder / "config.json")
    assert kept.pop("preset") == "smoke"
    assert kept == {stage: model.model_dump() for stage, model in configs.items()}


def test_a_figure_is_saved_and_displayed_from_disk(outputs):
    stage = open_stage(AUDIT, {})
    figure = plt.figure(figsize=(1, 1))
    picture = stage.figure(figure, "empty")
    plt.close(figure)
    content = (stage.folder / "figures" / "empty.png").read_bytes()
    assert content.startswith(b"\x89PNG") and picture._repr_png_() == content


def test_the_log_of_a_run_is_its_own(outputs):
    done(AUDIT)
    first = run_folder.log.handlers[0]
    done(AUDIT, run="other")
    assert first.stream is None, "the first log is closed"
    for name in ("lab", "other"):
        lines = (outputs / name / "log.txt").read_text().splitlines()
        assert [line.split(" INFO ")[1].split(" after")[0] for line in lines] == [
            f"{AUDIT} started",
            f"{AUDIT} finished",
        ]


def test_an_input_that_is_gone_is_a_difference(outputs):
    folder = done(AUDIT, inputs={"data": "abc"})
    assert changes(folder, config(AUDIT), {}) == ["input data changed"]


def test_a_rejected_stage_releases_the_run(outputs):
    done(AUDIT)
    with pytest.raises(RunError, match="other settings"):
        open_stage(AUDIT, {"seed": 1})
    script = (
        "import sys; from pathlib import Path; from ldm_lib.locking import FolderLock; FolderLock(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", script, str(outputs / "lab")], check=True)


def test_previous_is_the_folder_of_a_done_stage(outputs):
    folder = done(AUDIT)
    stage = open_stage(AUTOENCODER, {})
    assert stage.previous(AUDIT) == folder
    with pytest.raises(RunError, match=f"lab/{CONDITIONING}: is not done"):
        stage.previous(CONDITIONING)


@pytest.mark.parametrize("name", ["done.json", "parameters.json"])
def test_a_damaged_record_is_rejected_by_name(outputs, name):
    folder = done(AUDIT)
    (folder / name).write_text((folder / name).read_text()[:20])
    with pytest.raises(RunError, match=rf"{name}: is damaged .* Fix: remove its folder"):
        is_done(folder, config(AUDIT), {})


def test_no_partial_file_is_left(outputs):
    done(AUDIT)
    run_folder.write_provenance(outputs / "lab", preset="smoke", configs=resolve(), command=[])
    names = {path.name for path in (outputs / "lab").rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "log.txt",
        "parameters.json",
        "result.txt",
        "summary.json",
        "done.json",
        "run.json",
        "config.json",
    }


def test_finishing_releases_the_run(outputs):
    stage = open_stage(AUDIT, {})
    assert (outputs / "lab" / ".lock") in FolderLock._held
    stage.close({})
    assert (outputs / "lab" / ".lock") not in FolderLock._held
