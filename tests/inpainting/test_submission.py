"""Laws of a submission: each fault is reported with its case, and the archive is complete."""

import gzip
import re
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.__main__ import main
from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.images.volume import read_volume, write_like, write_map
from ldm_lib.inpainting.submission import check, pack


@pytest.fixture
def data(cohort_folder, tmp_path):
    """Two patients with one mask each, in the challenge's layout."""
    folder = tmp_path / "data"
    for k, case in enumerate(find_cases(cohort_folder)[::2][:2]):
        name = f"BraTS-GLI-0000{k}-000"
        (folder / name).mkdir(parents=True)
        for path, role in ((case.t1n_voided, "t1n-voided"), (case.mask, "mask"), (case.t1n, "t1n")):
            shutil.copy(path, folder / name / f"{name}-{role}.nii.gz")
    return folder


@pytest.fixture
def results(data, tmp_path):
    """The results of a perfect model, with the other files next to them."""
    folder = tmp_path / "results"
    folder.mkdir()
    for case in find_cases(data):
        loaded = load_case(case)
        for name in (case.result_name, case.result_name.replace(".nii.gz", "-nearest.nii.gz")):
            write_like(folder / name, loaded.source, loaded.target, loaded.mask)
        for name in ("std", "dseg"):
            path = folder / case.result_name.replace(".nii.gz", f"-{name}.nii.gz")
            write_map(path, loaded.voided, loaded.source.affine)
        shutil.copy(folder / case.result_name, folder / case.result_name.replace(".nii.gz", "-sample-0000.nii.gz"))
    return folder


def problems(data, results):
    return [str(finding) for finding in check(data, results) if finding.problem]


def test_correct_results_are_packed_and_nothing_else(data, results, tmp_path, capsys):
    assert main(["submission", "--data", str(data), "--results", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "BraTS-GLI-00000-000: ok" and lines[-1].endswith("submission.zip: 2 results")
    with zipfile.ZipFile(results / "submission.zip") as archive:
        names = [f"BraTS-GLI-0000{k}-000-t1n-inference.nii.gz" for k in range(2)]
        assert archive.namelist() == names
        assert all(archive.read(name) == (results / name).read_bytes() for name in names)
    assert pack(data, results, tmp_path / "again.zip") == 2
    assert (tmp_path / "again.zip").read_bytes() == (results / "submission.zip").read_bytes()


def _changed(path, change):
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    write_map(path, *change(voxels, image.affine.copy()))


def _moved(voxels, affine):
    affine[0, 3] += 1
    return voxels, affine


def _outside(voxels, affine):
    voxels[0, 0, 0] += 1
    return voxels, affine


FAULTS = {
    "missing": (lambda path: path.unlink(), r"no BraTS-GLI-00001-000-t1n-inference\.nii\.gz\. Fix: inpaint it"),
    "shape": (lambda path: _changed(path, lambda v, a: (v[:-1], a)), "has shape 29x30x20, must have 30x30x20"),
    "affine": (lambda path: _changed(path, _moved), "has another affine, 1 off"),
    "dtype": (lambda path: _changed(path, lambda v, a: (v.astype(np.float32), a)), "holds float32, must hold"),
    "outside": (lambda path: _changed(path, _outside), "differs from its source in 1 voxels outside the mask"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "gzip ends early"),
    "no image": (lambda path: path.write_bytes(gzip.compress(b"x" * 400)), "no NIfTI header"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported_with_its_case_and_nothing_is_packed(data, results, fault, capsys):
    spoil, line = FAULTS[fault]
    spoil(results / "BraTS-GLI-00001-000-t1n-inference.nii.gz")
    (found,) = problems(data, results)
    assert found.startswith("BraTS-GLI-00001-000: ")
    assert re.search(line, found)
    assert main(["submission", "--data", str(data), "--results", str(results)]) == 1
    assert capsys.readouterr().err.startswith(f"ERROR {results}: 1 of 2 are not valid results. Fix: see above")
    assert not (results / "submission.zip").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("results/BraTS-GLI-00000-000-t1n-inference.nii.gz", r"must end in \.zip"),
    ("data/x.zip", "lies inside the folder of cases"),
    ("nowhere/x.zip", "its folder does not exist"),
])  # fmt: skip
def test_the_archive_replaces_no_other_file(data, results, tmp_path, capsys, name, message):
    before = {path: path.read_bytes() for path in (*results.iterdir(), *data.rglob("*.gz"))}
    words = ["submission", "--data", str(data), "--results", str(results), "--output", str(tmp_path / name)]
    assert main(words) == 1
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in (*results.iterdir(), *data.rglob("*.gz"))} == before


def test_a_mask_that_was_left_void_is_reported(data, results):
    case = find_cases(data)[0]
    shutil.copy(case.t1n_voided, results / case.result_name)
    voxels = int((read_volume(case.mask).voxels > 0).sum())
    assert problems(data, results) == [
        f"{case.key}: {case.result_name} is void under the mask: 0 of its {voxels} voxels are not 0"
    ]  # fmt: skip


def test_a_scaled_result_is_reported(data, results):
    path = results / "BraTS-GLI-00000-000-t1n-inference.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = np.array([2.0, 0.0], "<f4").tobytes()
    path.write_bytes(gzip.compress(content))
    assert "is scaled by 2, 0; must be by 1, 0" in problems(data, results)[0]


def test_a_result_and_a_folder_of_no_case_are_reported(data, results):
    shutil.copy(results / "BraTS-GLI-00000-000-t1n-inference.nii.gz", results / "Other-t1n-inference.nii.gz")
    (data / "empty").mkdir()
    assert [line.split(": ")[0] for line in problems(data, results)] == ["empty", "Other-t1n-inference.nii.gz"]


def test_several_masks_of_a_patient_cause_a_warning(cohort_folder, cases, tmp_path, capsys):
    for case in cases:
        data = load_case(case)
        write_like(tmp_path / case.result_name, data.source, data.target, data.mask)
    output = tmp_path / "all.zip"
    arguments = ["submission", "--data", str(cohort_folder), "--results", str(tmp_path), "--output", str(output)]
    assert main(arguments) == 0
    assert "names carry the number of a" in capsys.readouterr().err
    assert len(zipfile.ZipFile(output).namelist()) == 6
