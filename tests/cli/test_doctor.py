"""The doctor reports what is wrong with an installation or a machine, and how to fix it."""

import os
import shutil
import sys
from collections import namedtuple
from importlib import metadata

import pytest

from ldm_lib.__main__ import main
from ldm_lib.cli import doctor
from ldm_lib.cli.doctor import FIX, Finding
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def test_this_installation_is_good_and_nothing_is_left_behind(outputs):
    found = doctor.examine()
    assert [f.what for f in found] == ["Python", "packages", "Jupyter kernel", "device", "outputs folder", "memory"]
    assert [f.good for f in found[:4]] == [True] * 4
    assert str(outputs) in found[4].found and list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "reported"),
    [({"monai": "1.3.0"}, "monai<1.7,>=1.6.1 (found 1.3.0)"), ({"dipy": ""}, "dipy<2,>=1.11 (found none)")],
)
def test_a_missing_or_outdated_package_is_named(installed, reported, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, real(name)))
    assert doctor._packages() == (False, f"{reported}: {FIX}")


def test_a_project_that_is_not_installed_is_reported(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert doctor._packages() == (False, f"this project is not installed: {FIX}")


def test_an_old_python_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(sys, "version", "3.10.1 (main)")
    assert doctor._python() == (False, "3.10.1 (3.11 or newer)")


def test_a_missing_kernel_is_reported(monkeypatch):
    monkeypatch.setattr(doctor.KernelSpecManager, "find_kernel_specs", lambda self: {})
    assert doctor._kernel() == (False, f"none: {FIX}")


def test_an_outputs_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "outputs"
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(folder))
    fix = "set LDM_OUTPUTS to another folder"
    assert doctor._outputs() == (False, f"{folder} cannot be written (Not a directory): {fix}")


def test_too_little_disk_space_is_reported(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9e9, 8e9, 1e9))
    good, found = doctor._outputs()
    assert not good and found.endswith("1 GB free (at least 5)")


def test_too_little_memory_is_reported(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    assert doctor._memory() == (False, "4 GB (at least 8)")


def test_the_command_fails_if_one_finding_is_bad(monkeypatch, capsys):
    good, bad = Finding("memory", True, "25 GB"), Finding("Python", False, "3.8")
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "BAD Python: 3.8"
