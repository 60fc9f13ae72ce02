"""Files are written atomically; a folder belongs to one process; digests depend on content only."""

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_lib.errors import ConfigError, InputError, RunError
from ldm_lib.files import (
    digests,
    expand_path,
    fingerprint,
    replacing,
    require_writable,
    sha256,
    write_csv,
    write_json,
)
from ldm_lib.locking import OWNER_VARIABLE, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from ldm_lib.locking import FolderLock
FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
TRY = """
import sys
from pathlib import Path
from ldm_lib.errors import RunError
from ldm_lib.locking import FolderLock
try:
    FolderLock(Path(sys.argv[1]))
    print("taken")
except RunError as error:
    print(error)
"""


@pytest.fixture
def folder(tmp_path):
    """A run folder to lock, released at the end."""
    yield tmp_path / "run"
    FolderLock(tmp_path / "run").release()


@pytest.fixture
def holder(folder):
    """Another process that holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def another_process_tries(folder, **environment):
    command = [sys.executable, "-c", TRY, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True).stdout


def test_replacing_leaves_only_the_new_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with path.open() as reader:
        with replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
        assert partial.parent == path.parent, "renaming works within a folder only"
        assert reader.read() == "old", "an open reader of the old file reads it to its end"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path, failure):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(failure), match=r"No space|143|^$"), replacing(path) as partial:
        partial.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_write_json_is_sorted_and_indented(tmp_path):
    content = {"b": np.float32(0.5), "a": {"d": Path("x/y"), "c": np.int64(3)}}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert text == '{\n  "a": {\n    "c": 3,\n    "d": "x/y"\n  },\n  "b": 0.5\n}\n'
    assert names(tmp_path) == ["a.json"]


def test_fingerprint_depends_on_the_content_and_not_on_the_order_of_keys():
    one = fingerprint({"a": [1, 2], "b": {"c": 1, "d": 2}})
    assert one == fingerprint({"b": {"d": 2, "c": 1}, "a": [1, 2]})
    for other in ([2, 1], [1, 2, 3], ["1", "2"], [1.5, 2]):
        assert fingerprint({"a": other, "b": {"c": 1, "d": 2}}) != one


def test_a_second_process_is_rejected_with_the_owner_named(folder, holder):
    with pytest.raises(RunError, match=rf"run: locked by pid {holder.pid} since 20\d\d-.*\+00:00. Fix: wait"):
        FolderLock(folder)


def test_a_lock_is_free_again_when_its_owner_was_killed(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    FolderLock(folder)
    assert f"locked by pid {os.getpid()} since" in another_process_tries(folder)


def test_a_kernel_works_under_the_lock_of_its_own_runner_only(folder):
    FolderLock(folder)
    assert another_process_tries(folder, **{OWNER_VARIABLE: str(os.getpid())}) == "taken\n"
    assert "locked by" in another_process_tries(folder, **{OWNER_VARIABLE: str(os.getpid() + 1)})
    assert "locked by" in another_process_tries(folder, **{OWNER_VARIABLE: str(os.getpid())[:-1]})
    assert "locked by" in another_process_tries(folder), "the kernel must not have released it"


def test_the_owner_may_lock_again_and_releases_once(folder):
    first = FolderLock(folder)
    second = FolderLock(folder)
    del first
    assert "locked by" in another_process_tries(folder)
    second.release()
    assert another_process_tries(folder) == "taken\n"
    second.release()


def test_release_works_while_a_forked_child_lives(folder):
    """Loader processes inherit the open file, but must not keep the lock."""
    lock = FolderLock(folder)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[FolderLock._held[lock.path].fileno()])
    try:
        lock.release()
        assert another_process_tries(folder) == "taken\n"
    finally:
        child.kill()
        child.wait()


def test_a_symlink_in_place_of_the_lock_is_rejected_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(RunError, match=r"\.lock: is a link, and its target would be overwritten\. Fix: remove it"):
        FolderLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("write", [write_json, lambda path, _: write_csv(path, [{"a": 1}])])
def test_a_symlink_in_place_of_a_partial_file_is_not_followed(tmp_path, write):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.json.{os.getpid()}.part").symlink_to("precious")
    write(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "a.json").is_symlink()


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    held = []
    monkeypatch.setattr(os, "fsync", lambda stream: held.append((tmp_path / "a.json").read_text()))
    write_json(tmp_path / "a.json", {"new": 1})
    assert len(held) == 1 and "old" in held[0] and "new" in (tmp_path / "a.json").read_text()


def test_a_pipe_is_never_replaced_by_a_file(tmp_path):
    """As root, a rename would replace /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: write_json(path, {}), require_writable):
        with pytest.raises(InputError, match=r"pipe: is a device, a pipe or a socket\. Fix: name a file"):
            write(tmp_path / "pipe")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_an_invalid_path_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="holds a zero byte"):
        require_writable(expand_path("a\0b"))
    with pytest.raises(ConfigError, match=r"nobody-here/a: no such user: ~name cannot be expanded"):
        require_writable(expand_path("~nobody-here/a"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run: cannot be written \(Not a directory\)\. Fix: choose another"):
        FolderLock(tmp_path / "file" / "run")


def test_digests_of_files_and_folders(tmp_path):
    (tmp_path / "model" / "deeper").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "net.pth").write_bytes(b"net")
    (tmp_path / "net.json").write_text("{}")
    found = digests(str(tmp_path / "model"), "", str(tmp_path / "net.pth"), str(tmp_path / "absent"))
    json_digest, net_digest = (hashlib.sha256(content).hexdigest() for content in (b"{}", b"net"))
    here = tmp_path.name
    assert found == {"model/config.json": json_digest, f"{here}/net.pth": net_digest, f"{here}/net.json": json_digest}


def test_a_csv_file_has_the_columns_of_all_rows_in_order_of_appearance(tmp_path):
    rows = [{"b": "1", "a": "x, y"}, {"a": 'say "z"', "c": "3"}]
    assert write_csv(tmp_path / "t.csv", rows) == ["b", "a", "c"]
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)] == rows


def test_write_json_keeps_the_old_file_when_the_content_cannot_be_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    loop = {}
    loop["itself"] = loop
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, loop)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, 2**18 - 1, 2**18, 2**20 + 7])
def test_sha256_is_that_of_the_bytes(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_replacing_without_writing_fails_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError, match=r"a\.json"), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_part_of_a_path_that_exists_as_it_is_written_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/people/anna")
    monkeypatch.setenv("WHO", "anna")
    assert str(expand_path("$HOME/x.nii")) == str(expand_path("~/x.nii")) == "/people/anna/x.nii"
    assert str(expand_path("/scratch/$WHO/x.nii")) == "/scratch/anna/x.nii"
    (tmp_path / "$HOME").mkdir()
    (tmp_path / "~odd").touch()
    monkeypatch.chdir(tmp_path)
    assert str(expand_path(f"{tmp_path}/$HOME/x.nii")) == f"{tmp_path}/$HOME/x.nii"
    assert str(expand_path("$HOME/x.nii")) == "$HOME/x.nii" and str(expand_path("~odd")) == "~odd"
    assert str(expand_path("/data/$HOME/x.nii")) == "/data/$HOME/x.nii"  # a path has no place within one


def test_the_advice_to_make_a_folder_can_be_pasted_into_a_shell(tmp_path):
    folder = tmp_path / "it's $HOME"
    with pytest.raises(InputError, match="its folder does not exist") as caught:
        require_writable(folder / "x.nii")
    subprocess.run(["sh", "-c", caught.value.fix], check=True)
    assert folder.is_dir()
