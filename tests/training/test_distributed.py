"""Laws of several processes and of sudden ends: what they train is what one undisturbed process would have."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_lib.training import checkpoints

SCRIPT = Path(__file__).parents[1] / "support" / "forked.py"
STEPS = 8  # six cases in batches of four: two steps an epoch, four epochs


def forked(scenario, coarse, cohort_folder, folder):
    """Run a scenario of the script and return what it found."""
    command = [sys.executable, str(SCRIPT), scenario, str(coarse), str(cohort_folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pair(coarse, cohort_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return forked("pair", coarse, cohort_folder, folder), folder


def end_of(folder, name):
    """The last checkpoint of a training."""
    return checkpoints.read_verified(checkpoints.resumable(folder / name / "04_training" / "checkpoints")[0])


def rows(folder, name):
    with (folder / name / "04_training" / "metrics.csv").open(newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v and k != "samples_per_s"} for row in csv.DictReader(stream)]


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_two_are_one(folder, name):
    one, two = end_of(folder, "one"), end_of(folder, name)
    assert one["progress"]["step"] == two["progress"]["step"] == STEPS
    assert close(one["average"], two["average"]) and close(one["denoiser"], two["denoiser"])
    for mine, theirs in zip(rows(folder, "one"), rows(folder, name), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # the loss curve, and scores with every case counted once
    differing = {k for k, v in one["identity"]["settings"].items() if two["identity"]["settings"][k] != v}
    assert not differing, "a checkpoint of two belongs to one as well"


def test_two_processes_train_what_one_would_at_the_same_global_batch(pair):
    found, folder = pair
    assert found["one"] == [0] and found["two"] == [0, 0]
    assert_two_are_one(folder, "two")


def test_when_one_process_dies_all_end_with_a_message_and_the_same_command_goes_on(pair):
    found, folder = pair
    assert found["dead"] == [1, -9] and found["dead_s"] < 60
    assert found["dead_printed"][0].startswith("ERROR process 0: this process cannot continue without the others (")
    assert found["dead_resumed"] == [0, 0]
    assert same(end_of(folder, "two")["average"], end_of(folder, "dead")["average"])


def test_one_process_closes_what_two_have_trained(pair):
    found, folder = pair
    assert found["closed"] == [0]
    assert (folder / "two" / "04_training" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_sigterm_saves_the_step_in_hand_and_ends_with_143(coarse, cohort_folder, tmp_path):
    found = forked("stopped", coarse, cohort_folder, tmp_path)
    assert_two_are_one(tmp_path, "two")
    assert found["stopped"][0] == 143
    assert found["printed"][0].startswith(f"ERROR training: stopped by SIGTERM after step 4 of {STEPS}, saved")
    assert found["saved"] == ["last-00000004.ckpt"] and found["resumed"] == [0, 0]
    assert same(end_of(tmp_path, "two")["average"], end_of(tmp_path, "stopped")["average"])


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_with_the_same_weights(coarse, cohort_folder, tmp_path):
    found = forked("sweep", coarse, cohort_folder, tmp_path)
    model = Path("04_training") / "model"
    whole = [(tmp_path / "whole" / model / name).read_bytes() for name in ("model.safetensors", "config.json")]
    assert len({moment["run"] for moment in found["moments"]}) >= 18, "most were killed before they ended"
    for k in range(20):
        assert found[f"killed-{k}"] == 0
        for content, name in zip(whole, ("model.safetensors", "config.json"), strict=True):
            assert (tmp_path / f"killed-{k}" / model / name).read_bytes() == content, f"killed {k}"
        assert rows(tmp_path, f"killed-{k}") == rows(tmp_path, "whole")
