"""The doctor finds what is wrong with an installation, and says what to do."""

import os
import sys
from collections import namedtuple
from importlib import metadata

import pytest

from ldm_lib.__main__ import main
from ldm_lib.cli import doctor
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def finding(what):
    return next(found for found in doctor.examine() if found.what == what)


def test_it_looks_at_everything_once_and_finds_this_installation_good():
    found = doctor.examine()
    assert [f.what for f in found] == ["Python", "packages", "Jupyter kernel", "device", "outputs folder", "memory"]
    assert [f.good for f in found[:4]] == [True] * 4


def test_it_leaves_nothing_in_the_outputs_folder(outputs):
    assert finding("outputs folder").found.startswith("writable, ")
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "told"),
    [({"monai": "1.3.0"}, "monai<1.7,>=1.6.1 (found 1.3.0)"), ({"dipy": ""}, "dipy<2,>=1.11 (found none)")],
)
def test_a_missing_or_unfit_package_is_named(installed, told, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, real(name)))
    found = finding("packages")
    assert not found.good and found.found == f"{told}: run `make setup`"


def test_a_project_that_is_not_installed_is_told(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert finding("packages") == doctor.Finding("packages", False, "this project is not installed: run `make setup`")


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(sys, "version", "3.10.1 (main)")
    assert doctor._python() == doctor.Finding("Python", False, "3.10.1 (3.11 or newer)")


def test_a_missing_kernel_is_told(monkeypatch):
    monkeypatch.setattr(doctor.KernelSpecManager, "find_kernel_specs", lambda self: {})
    assert finding("Jupyter kernel") == doctor.Finding("Jupyter kernel", False, "none: run `make setup`")


def test_an_outputs_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "file" / "outputs"))
    assert finding("outputs folder") == doctor.Finding("outputs folder", False, "cannot be written (Not a directory)")


def test_too_little_room_is_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(9e9, 8e9, 1e9))
    found = finding("outputs folder")
    assert not found.good and found.found == "writable, 1 GB free (at least 5)"


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}.get)
    assert doctor._memory() == doctor.Finding("memory", False, "4 GB (at least 8)")


def test_the_command_fails_when_one_finding_is_bad(monkeypatch, capsys):
    good, bad = doctor.Finding("memory", True, "25 GB"), doctor.Finding("Python", False, "3.8")
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "BAD Python: 3.8"
