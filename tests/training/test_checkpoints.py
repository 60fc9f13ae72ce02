"""Checkpoints are whole or absent, verified by their digest, and the newest step comes first by any clock."""

import os
import resource
import subprocess
from functools import partial

import pytest
import torch

from ldm_lib.errors import TrainingError, WeightsError
from ldm_lib.training import checkpoints

CONTENT = {"format": checkpoints.FORMAT, "average": {"w": torch.arange(6.0).view(2, 3)}, "progress": {"step": 3}}


def wrote(folder, step, content=CONTENT):
    path = checkpoints.step_path(folder, step)
    checkpoints.write(path, content)
    return path


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read_and_sha256sum_agrees(tmp_path):
    path = wrote(tmp_path / "new" / "folder", 7)
    found = checkpoints.read_verified(path)
    assert torch.equal(found["average"]["w"], CONTENT["average"]["w"]) and found["progress"] == {"step": 3}
    checked = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, capture_output=True)
    assert checked.returncode == 0
    assert sorted(p.name for p in path.parent.iterdir()) == ["last-00000007.ckpt", "last-00000007.ckpt.sha256"]


def test_the_newest_is_the_one_of_the_largest_step_not_of_the_latest_hour(tmp_path):
    paths = [wrote(tmp_path, step) for step in (1200, 90, 1000)]
    os.utime(paths[0], (0, 0))
    assert [path.name for path in checkpoints.resumable(tmp_path)] == [
        "last-00001200.ckpt", "last-00001000.ckpt", "last-00000090.ckpt"]  # fmt: skip
    assert checkpoints.read_newest(tmp_path)[0] == paths[0]
    checkpoints.keep_newest(tmp_path)
    assert [path.name for path in checkpoints.resumable(tmp_path)] == ["last-00001200.ckpt", "last-00001000.ckpt"]
    assert len(list(tmp_path.iterdir())) == 4, "their digests go with them"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def digest_of(path):
    return path.with_name(f"{path.name}.sha256")


@pytest.mark.parametrize("harm", [
    *(partial(flip, where=where) for where in (0.0, 0.3, 0.7, 0.999)),
    truncate,
    lambda path: path.write_bytes(b""),
    lambda path: digest_of(path).unlink(),
    lambda path: digest_of(path).write_text(""),
    lambda path: digest_of(path).write_bytes(b"\xff\xfe of no text"),
    lambda path: digest_of(path).write_text(digest_of(checkpoints.step_path(path.parent, 1)).read_text()),
])  # fmt: skip
def test_a_changed_bit_or_digest_is_noticed_and_the_checkpoint_before_is_used(tmp_path, harm, caplog):
    older, newer = wrote(tmp_path, 1), wrote(tmp_path, 2, CONTENT | {"average": {"w": torch.zeros(5)}})
    harm(newer)
    with pytest.raises(WeightsError, match=r"last-00000002\.ckpt: does not match its sha256"):
        checkpoints.read_verified(newer)
    assert checkpoints.read_newest(tmp_path)[0] == older and "last-00000002.ckpt" in caplog.text


def test_damaged_ones_of_later_steps_do_not_outlive_what_is_written_after_them(tmp_path):
    good, *bad = (wrote(tmp_path, step) for step in (1, 20, 30))
    for path in bad:
        flip(path)
    assert checkpoints.read_newest(tmp_path)[0] == good
    checkpoints.remove_newer(good)
    wrote(tmp_path, 2)
    checkpoints.keep_newest(tmp_path)
    assert [path.name for path in checkpoints.resumable(tmp_path)] == ["last-00000002.ckpt", "last-00000001.ckpt"]
    assert len(list(tmp_path.iterdir())) == 4


def test_the_only_checkpoint_survives_being_written_again(tmp_path, monkeypatch):
    """A step is saved before and after its validation; killed between digest and file, the file is good."""
    path, replacing = wrote(tmp_path, 1), checkpoints.replacing

    class Cut:
        """The file's own replacement never comes; the digests' do."""

        def __init__(self, target):
            self.inner, self.last = replacing(target), target == path

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            if self.last:
                self.inner.__exit__(SystemExit, SystemExit(9), None)
                raise SystemExit(9)
            return self.inner.__exit__(*error)

    monkeypatch.setattr(checkpoints, "replacing", Cut)
    with pytest.raises(SystemExit):
        wrote(tmp_path, 1, {"average": {"w": torch.zeros(5)}})
    assert torch.equal(checkpoints.read_newest(tmp_path)[1]["average"]["w"], CONTENT["average"]["w"])
    monkeypatch.undo()
    wrote(tmp_path, 1, {"average": {"w": torch.zeros(5)}})
    assert len((tmp_path / "last-00000001.ckpt.sha256").read_text().splitlines()) == 1


def test_without_a_checkpoint_nothing_is_resumed(tmp_path):
    assert checkpoints.read_newest(tmp_path) is None and checkpoints.resumable(tmp_path / "absent") == []
    flip(wrote(tmp_path, 1))
    with pytest.raises(WeightsError, match="none of 1 checkpoints matches its sha256"):
        checkpoints.read_newest(tmp_path)


def test_a_checkpoint_of_an_older_version_is_rejected_in_one_line(tmp_path):
    wrote(tmp_path / "checkpoints", 1, {"identity": {"cells": {}}, "average": {}})
    with pytest.raises(TrainingError) as rejected:
        checkpoints.read_newest(tmp_path / "checkpoints")
    assert str(rejected.value).endswith(
        "last-00000001.ckpt: was written by another version (format 1, need 2). Fix: remove checkpoints/ to train from "
        "the start."
    )


class Spiteful:
    """Runs code when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_that_holds_code_is_rejected_even_with_its_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = wrote(tmp_path, 1, {"x": Spiteful()})
    with pytest.raises(WeightsError, match="unsafe checkpoint"):
        checkpoints.read_verified(path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def full_disk():
    """Let the system reject what a file holds beyond a limit, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_the_checkpoint_before_stays(tmp_path, full_disk):
    """Torch wraps the error of the system."""
    older = wrote(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"last-00000002\.ckpt: not written \(.*\)\. Fix: make room"):
        wrote(tmp_path, 2, {"w": torch.zeros(1_000_000)})
    assert checkpoints.read_newest(tmp_path)[0] == older
    assert sorted(p.name for p in tmp_path.iterdir()) == [older.name, f"{older.name}.sha256"]


def test_a_folder_in_the_way_is_reported(tmp_path):
    checkpoints.step_path(tmp_path, 1).mkdir()
    with pytest.raises(TrainingError, match=r"last-00000001\.ckpt: not written \(Is a directory\)"):
        wrote(tmp_path, 1)


def test_differences_are_named_and_allowed_by_name():
    was = {"architecture": {"base_width": 8, "multipliers": [1, 2]}, "autoencoder": "abc", "settings": {"seed": 0}}
    now = {
        "architecture": {"base_width": 12, "multipliers": [1, 2]},
        "autoencoder": "xyz",
        "settings": {"seed": 0, "new": 1},
    }
    assert checkpoints.differences(was, was) == []
    assert checkpoints.differences(was, now) == [
        "base_width was 8, now 12", "autoencoder was 'abc', now 'xyz'", "new was None, now 1"]  # fmt: skip
    assert checkpoints.differences(was, now, ["autoencoder", "new"]) == ["base_width was 8, now 12"]


def test_room_is_counted_in_the_first_folder_that_exists(tmp_path):
    checkpoints.require_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(TrainingError, match=r"disk full: need 1000000000000\.0 MB, have .* MB"):
        checkpoints.require_room(tmp_path / "not" / "yet", 10**18)
