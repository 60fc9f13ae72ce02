"""The doctor reports what is wrong with an installation or a machine, and how to fix it."""

import os
import shutil
from collections import namedtuple
from importlib import metadata
from types import SimpleNamespace

import pytest

from ldm_lib.__main__ import main
from ldm_lib.cli import doctor
from ldm_lib.cli.doctor import FIX

pytestmark = pytest.mark.usefixtures("outputs")


def finding(what):
    (found,) = (check for check in doctor.examine() if check.what == what)
    return found.good, found.found


def test_this_installation_is_good_and_nothing_is_left_behind(outputs, capsys):
    assert all(f.good for f in doctor.examine()[:4])
    good, found = finding("outputs folder")
    assert good and str(outputs) in found and list(outputs.iterdir()) == []
    main(["doctor"])
    names = ["packages", "Jupyter kernel", "device", "bf16", "outputs folder", "memory"]
    assert [line[4:].split(":")[0] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize(
    ("version", "reported"), [("1.3.0", "monai<1.7,>=1.6.1 (found 1.3.0)"), ("", "monai<1.7,>=1.6.1 (found none)")]
)
def test_a_missing_or_outdated_package_is_named(version, reported, monkeypatch):
    others = [package for package in metadata.distributions() if package.name != "monai"]
    monkeypatch.setattr(metadata, "distributions", lambda: [*others, SimpleNamespace(name="monai", version=version)])
    assert finding("packages") == (False, f"{reported}: {FIX}")


def test_a_missing_kernel_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor.KernelSpecManager, "find_kernel_specs", lambda self: {})
    assert main(["doctor"]) == 1
    assert f"BAD Jupyter kernel: none: {FIX}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "default", "good", "says"),
    [
        (0.01, False, True, "1.5 times as fast as float32, gradients right, used where it is asked for"),
        (0.01, True, True, "1.5 times as fast as float32, gradients right, the default"),
        (float("inf"), False, True, "gradients wrong on this processor: train in float32 (precision=32)"),
        (float("inf"), True, False, "gradients wrong on this processor: train in float32 (precision=32)"),
    ],
)
def test_wrong_gradients_in_bf16_are_bad_where_it_is_the_default(error, default, good, says):
    found = doctor._bf16(error, 1.5, default=default)
    assert found[0] == good and found[1].endswith(says)


def test_an_outputs_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDM_OUTPUTS", str(tmp_path / "file" / "outputs"))
    good, found = finding("outputs folder")
    assert not good and "cannot be written" in found and found.endswith("set LDM_OUTPUTS to another folder")


def test_too_little_disk_space_and_memory_are_reported(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9e9, 8e9, 1e9))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    for what, found in (("outputs folder", "1 GB free (at least 5)"), ("memory", "4 GB (at least 8)")):
        assert not finding(what)[0] and finding(what)[1].endswith(found)
