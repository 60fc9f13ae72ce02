"""Laws of inpainting many cases: parts give the whole, interruptions cost nothing, failures are reported."""

import csv
import json
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest

from ldm_lib.__main__ import main
from ldm_lib.data.cohort import find_cases
from ldm_lib.errors import ConfigError, InputError, RunError
from ldm_lib.experiment.presets import resolve
from ldm_lib.experiment.stages import SamplingConfig
from ldm_lib.images.volume import read_volume
from ldm_lib.inpainting.folder import (
    FILLED,
    FOUND,
    REFUSED,
    Job,
    fill_cases,
    inpaint_folder,
    require_all,
    require_recorded,
)
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.single_file import inpaint
from ldm_lib.locking import FolderLock
from ldm_lib.version import __version__

QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def inpainter(tiny_model_folder):
    return Inpainter.load(tiny_model_folder, device="cpu", precision="32")


def settings(**changes):
    return resolve("smoke", {"num_inference_steps": 2, "samples": 2} | changes)["05_sampling"]


def volumes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def statuses(rows):
    return [row["status"] for row in rows]


@pytest.fixture(scope="module")
def whole(inpainter, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fill_cases(inpainter, cases[:4], settings(), folder), folder


def test_parts_of_a_cohort_give_the_bytes_of_the_whole(inpainter, cases, whole, tmp_path):
    rows, folder = whole
    parts = [fill_cases(inpainter, cases[:4][rank::3], settings(), tmp_path) for rank in range(3)]
    assert volumes(tmp_path) == volumes(folder) and len(volumes(folder)) == 4 * 5
    assert sorted(row["case"] for part in parts for row in part) == sorted(row["case"] for row in rows)


def test_results_are_found_and_damaged_or_missing_ones_are_made_again(inpainter, cases, whole, tmp_path):
    rows, folder = whole
    fill_cases(inpainter, cases[:3], settings(), tmp_path)
    again = fill_cases(inpainter, cases[:4], settings(), tmp_path)
    assert statuses(again) == [FOUND] * 3 + [FILLED]
    columns = ("case", "result", "spread", "reason")
    assert [[row[name] for name in columns] for row in again] == [[row[name] for name in columns] for row in rows]
    results = [tmp_path / case.result_name for case in cases[:4]]
    results[0].write_bytes(results[0].read_bytes()[:-1])
    results[1].unlink()
    (tmp_path / "filled" / f"{cases[2].key}.json").unlink()
    assert statuses(fill_cases(inpainter, cases[:4], settings(), tmp_path)) == [FILLED] * 3 + [FOUND]
    assert volumes(tmp_path) == volumes(folder)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"samples": 1}, {"num_inference_steps": 3}, {"sampler": "ddim"}])
def test_other_settings_are_other_results(inpainter, cases, tmp_path, changes):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    first = read_volume(tmp_path / cases[0].result_name).raw
    assert statuses(fill_cases(inpainter, cases[:1], settings(**changes), tmp_path)) == [FILLED]
    assert not np.array_equal(first, read_volume(tmp_path / cases[0].result_name).raw)


def test_a_changed_source_is_inpainted_again(inpainter, cases, cohort_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(cohort_folder / cases[0].id, folder / cases[0].id)
    case = find_cases(folder)[0].to_inpaint()
    fill_cases(inpainter, [case], settings(), tmp_path)
    shutil.copy(folder / case.id / f"{case.id}-t1n.nii.gz", case.t1n_voided)
    assert statuses(fill_cases(inpainter, [case], settings(), tmp_path)) == [FILLED]


# ---- a bad case


@pytest.fixture
def cohort(cohort_folder, tmp_path):
    """A copy of the six cases, free to be spoiled."""
    return shutil.copytree(cohort_folder, tmp_path / "cohort" / "data")


def spoil(folder, case):
    path = folder / case.id / case.mask.name
    path.write_bytes(path.read_bytes()[:50])


def test_what_is_not_a_file_is_rejected_without_waiting(inpainter, cohort, tmp_path):
    cases = [case.to_inpaint() for case in find_cases(cohort)[:4]]
    spoilt = {
        "not a regular file": os.mkfifo,
        "broken link to m.nii.gz": lambda path: path.symlink_to("/data/JOHN_DOE/m.nii.gz"),
        "is a directory, not an image file": lambda path: path.mkdir(),
    }
    for case, spoil_mask in zip(cases, spoilt.values(), strict=False):
        case.mask.unlink()
        spoil_mask(case.mask)
    rows = fill_cases(inpainter, cases, settings(samples=1), tmp_path / "out", **QUIET)
    assert statuses(rows) == [REFUSED] * 3 + [FILLED]
    for case, row, message in zip(cases, rows, spoilt, strict=False):  # named from the data folder on
        assert row["reason"].startswith(f"{case.id}/{case.mask.name}: {message}")


@pytest.mark.parametrize("outputs", [{"../victim.nii.gz": "00"}, ["a"]])
def test_a_record_never_has_another_file_removed(inpainter, cases, tmp_path, outputs):
    victims = [tmp_path / "victim.nii.gz", tmp_path / "out" / "victim.nii.gz"]
    record = tmp_path / "out" / "filled" / f"{cases[0].key}.json"
    record.parent.mkdir(parents=True)
    for victim in victims:
        victim.write_text("precious")
    record.write_text(json.dumps({"made_from": "x", "outputs": outputs, "row": {}}))
    rows = fill_cases(inpainter, cases[:1], settings(samples=1), tmp_path / "out", **QUIET)
    assert statuses(rows) == [FILLED] and all(victim.read_text() == "precious" for victim in victims)


def test_a_case_that_fails_is_reported_and_the_others_continue(cohort, cases, tiny_model_folder, tmp_path, capsys):
    spoil(cohort, cases[1])
    (cohort / "empty").mkdir()
    arguments = ["inpaint", "--data", str(cohort), "--output", str(tmp_path / "out"), "--steps", "2", "--model",
                 str(tiny_model_folder), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0].startswith("empty: rejected: empty: no mask file; present: nothing")
    assert lines[1].startswith(f"{cases[1].key}: rejected: ") and "gzip ends early" in lines[1]
    assert lines[2:] == ["7 cases: 2 refused, 5 filled"], "no line for a case within 30 s"
    assert printed.out == f"{tmp_path / 'out' / 'results.csv'}\n"
    results = {case.result_name for case in cases if case is not cases[1]}
    assert set(volumes(tmp_path / "out")) == results
    with (tmp_path / "out" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == ["empty", *(case.key for case in cases)]
    assert [row["status"] for row in rows] == [REFUSED, FILLED, REFUSED, *[FILLED] * 4]
    shutil.copy(cases[1].mask, cohort / cases[1].id)
    (cohort / "empty").rmdir()
    assert main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "6 cases: 5 found, 1 filled"


def test_a_result_that_cannot_be_written_is_reported_with_its_case(inpainter, cases, tmp_path):
    (tmp_path / cases[0].result_name).mkdir()
    rows = fill_cases(inpainter, cases[:2], settings(), tmp_path)
    assert statuses(rows) == [REFUSED, FILLED] and rows[0]["reason"].startswith(
        f"{cases[0].result_name}: is a directory"
    )
    with pytest.raises(InputError, match=r"1 of 2 cases failed; .*is a directory"):
        require_all(rows)
    require_all(rows[1:])


def test_a_folder_gives_the_results_of_its_files_one_by_one(cohort_folder, cases, tiny_model_folder, tmp_path):
    config = SamplingConfig(num_inference_steps=2, samples=1, device="cpu")
    maps = cohort_folder.parent / "conditioning_data"
    rows = inpaint_folder(cohort_folder, tmp_path / "out", config, model=tiny_model_folder, **QUIET)
    assert statuses(rows) == [FILLED] * 6
    for case in cases[::3]:
        given = {"growth": maps / "growth_model" / f"{case.id}.nii.gz",
                 "tissue": maps / "tissue_segmentation" / f"{case.id}.nii.gz"}  # fmt: skip
        how = {"num_inference_steps": 2, "model": tiny_model_folder, "device": "cpu"}
        inpaint(case.t1n_voided, case.mask, tmp_path / "one.nii.gz", **given, **how)
        assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "out" / case.result_name).read_bytes()


# ---- interruptions


def test_a_killed_command_continues_and_ends_with_the_same_bytes(cohort_folder, tiny_model_folder, tmp_path):
    config = SamplingConfig(num_inference_steps=2, samples=2, device="cpu")

    def work(output):
        os.environ["OMP_NUM_THREADS"] = "1"
        inpaint_folder(cohort_folder, output, config, model=tiny_model_folder, **QUIET)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    started = time.monotonic()
    work(undisturbed)
    seconds, rng, kills = time.monotonic() - started, np.random.default_rng(0), 0
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=work, args=(killed,))
        process.start()
        process.join(rng.uniform(0.1, 0.8) * seconds)
        kills += process.is_alive()
        process.kill()
        process.join()
    work(killed)
    assert volumes(killed) == volumes(undisturbed) and kills
    records = [json.loads(path.read_text()) for path in sorted((killed / "filled").glob("*.json"))]
    assert len(records) == 6 and not list(killed.glob(".*.part"))


def test_two_processes_do_not_write_into_one_folder(cohort_folder, tiny_model_folder, tmp_path):
    def hold(folder, ready, done):
        FolderLock(folder)
        ready.set()
        done.wait(60)

    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match="locked by pid"):
        inpaint_folder(cohort_folder, tmp_path / "out", SamplingConfig(), model=tiny_model_folder, **QUIET)
    done.set()
    other.join()


def test_results_among_the_cases_are_rejected(cohort_folder, tiny_model_folder):
    with pytest.raises(InputError, match=r"lies inside the folder of cases\. Fix: name one outside it"):
        inpaint_folder(cohort_folder, cohort_folder / "results", SamplingConfig(), model=tiny_model_folder, **QUIET)


def test_at_most_two_cases_are_in_memory_at_once(inpainter, cases, tmp_path, monkeypatch):
    """One is read ahead while another is inpainted and written."""
    held, most = set(), []
    read, fill = Job.read, Job.fill

    def counted_read(self, case):
        held.add(case.key)
        most.append(len(held))
        return read(self, case)

    def counted_fill(self, data, *rest):
        row = fill(self, data, *rest)
        held.discard(data.case.key)
        return row

    monkeypatch.setattr(Job, "read", counted_read)
    monkeypatch.setattr(Job, "fill", counted_fill)
    fill_cases(inpainter, cases, settings(), tmp_path)
    assert max(most) == 2


@pytest.mark.parametrize("content", ["garbage", '{"outputs": 1}'])
def test_a_damaged_record_is_ignored(inpainter, cases, tmp_path, content):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    (tmp_path / "filled" / f"{cases[0].key}.json").write_text(content)
    assert statuses(fill_cases(inpainter, cases[:1], settings(), tmp_path)) == [FILLED]
    assert statuses(fill_cases(inpainter, cases[:1], settings(), tmp_path)) == [FOUND]


def test_a_pipe_in_place_of_a_record_or_a_result_is_not_waited_for(inpainter, cases, tmp_path):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    record, result = tmp_path / "filled" / f"{cases[0].key}.json", tmp_path / cases[0].result_name
    result.unlink()
    os.mkfifo(result)
    assert statuses(fill_cases(inpainter, cases[:1], settings(), tmp_path)) == [FILLED] and result.is_file()
    record.unlink()
    os.mkfifo(record)
    (row,) = fill_cases(inpainter, cases[:1], settings(), tmp_path)
    assert row["status"] == REFUSED and "is a device, a pipe or a socket" in row["reason"]


def test_files_of_other_settings_do_not_stay_next_to_a_new_result(inpainter, cases, tmp_path):
    fill_cases(inpainter, cases[:1], settings(samples=3), tmp_path)
    fill_cases(inpainter, cases[:1], settings(samples=1), tmp_path)
    sample = cases[0].result_name.replace(".nii.gz", "-sample-0000.nii.gz")
    assert set(volumes(tmp_path)) == {cases[0].result_name, sample}


@pytest.mark.parametrize(("changes", "message"), [
    ({"sampler": "euler"}, "'euler' given, the model was trained on a variance-preserving"),
    ({"num_inference_steps": 5000}, "5000 sampling steps given, 1 to 1000 allowed"),
])  # fmt: skip
def test_parameters_that_suit_no_case_are_rejected_before_any_is_read(
    inpainter, cases, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(Job, "read", lambda *_: pytest.fail("a case was read"))
    with pytest.raises(ConfigError, match=message):
        fill_cases(inpainter, cases[:2], SamplingConfig(**changes), tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError("too large"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_case_that_does_not_fit_into_memory_does_not_stop_the_others(inpainter, cases, tmp_path, monkeypatch, error):
    call = Inpainter.__call__

    def fails_once(self, data, **how):
        if data.case.key == cases[0].key:
            raise error
        return call(self, data, **how)

    monkeypatch.setattr(Inpainter, "__call__", fails_once)
    rows = fill_cases(inpainter, cases[:2], settings(), tmp_path)
    assert statuses(rows) == [REFUSED, FILLED]
    with pytest.raises(InputError, match="1 of 2 cases have no result, the first"):
        require_recorded(cases[:2], tmp_path)


def test_a_closed_output_pipe_does_not_stop_the_work(cohort_folder, tiny_model_folder, tmp_path, monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    arguments = ["inpaint", "--data", str(cohort_folder), "--output", str(tmp_path), "--steps", "1", "--model",
                 str(tiny_model_folder), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0 and len(volumes(tmp_path)) == 6


# ---- more laws


@pytest.mark.parametrize(
    "row",
    [
        {},
        {
            "case": "x\x1b[31m",
            "result": "/etc/passwd",
        },
    ],
)
def test_a_row_of_a_found_result_takes_no_text_from_its_record(inpainter, cases, tmp_path, row):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    record = tmp_path / "filled" / f"{cases[0].key}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"row": row}))
    (found,) = fill_cases(inpainter, cases[:1], settings(), tmp_path)
    assert found == {"case": cases[0].key, "status": FOUND, "result": cases[0].result_name, "spread": None,
                     "seconds": None, "reason": ""}  # fmt: skip


def test_a_record_names_the_version_and_a_result_of_another_version_is_found(inpainter, cases, tmp_path):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    path = tmp_path / "filled" / f"{cases[0].key}.json"
    record = json.loads(path.read_text())
    assert record.pop("version") == __version__
    for earlier in (record, record | {"version": "0.8.0.dev"}):
        path.write_text(json.dumps(earlier))
        assert statuses(fill_cases(inpainter, cases[:1], settings(), tmp_path)) == [FOUND]


def test_a_record_without_its_result_is_ignored(inpainter, cases, tmp_path):
    fill_cases(inpainter, cases[:1], settings(), tmp_path)
    record = tmp_path / "filled" / f"{cases[0].key}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"outputs": {}}))
    (tmp_path / cases[0].result_name).unlink()
    assert statuses(fill_cases(inpainter, cases[:1], settings(), tmp_path)) == [FILLED]
    assert (tmp_path / cases[0].result_name).exists()


def test_the_lock_is_released_after_an_error(cohort_folder, tiny_model_folder, tmp_path):
    config = SamplingConfig(sampler="euler", device="cpu")
    for _ in range(2):
        with pytest.raises(ConfigError, match="'euler' given"):
            inpaint_folder(cohort_folder, tmp_path, config, model=tiny_model_folder, **QUIET)
    assert not FolderLock._held


@pytest.mark.parametrize("plant", [lambda path: path.symlink_to("/nowhere"), lambda path: path.touch()])
def test_a_record_folder_that_is_a_link_or_a_file_is_rejected(inpainter, cases, tmp_path, plant):
    plant(tmp_path / "filled")
    with pytest.raises(InputError, match=r"filled: is not a folder of its own\. Fix: remove it"):
        fill_cases(inpainter, cases[:1], settings(), tmp_path)
