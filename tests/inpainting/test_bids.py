"""Laws of BIDS data sets: scans find their masks, results are valid derivatives equal to those of single files."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packages import deepbet_stand_in
from scipy import ndimage

from ldm_lib.__main__ import main
from ldm_lib.data.bids import list_cases
from ldm_lib.data.case import case_of_files, load_case
from ldm_lib.data.cohort import audit, find_cases, source_digests
from ldm_lib.errors import ConfigError
from ldm_lib.images.masks import dilated
from ldm_lib.images.options import ReadOptions
from ldm_lib.images.volume import read_volume, write_map
from ldm_lib.inpainting.single_file import inpaint

MASKS = {  # subject -> scan and mask, where they are in data sets that people have
    "01": ("anat/sub-01_T1w.nii.gz", "anat/sub-01_T1w_label-lesion_roi.nii.gz"),
    "02": ("ses-1/anat/sub-02_ses-1_run-2_T1w.nii.gz",
           "../derivatives/manual/sub-02/ses-1/anat/sub-02_ses-1_run-2_space-orig_label-lesion_mask.nii.gz"),
    "03": ("anat/sub-03_T1w.nii.gz", "anat/sub-03_label-L_desc-T1lesion_mask.nii.gz"),
}  # fmt: skip

BRAIN = "derivatives/fmriprep/sub-01/anat/sub-01_desc-brain_mask.nii.gz"


def put(source, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, path)


def whole_head(case):
    """The scan with a noisy scalp around its brain, and the brain."""
    voxels, mask = (read_volume(path).voxels for path in (case.t1n_voided, case.mask))
    brain = (voxels > 0) | (mask > 0)
    noise = np.random.default_rng(0).integers(1, 900, brain.shape) + np.float32(0.5)
    return np.where(brain, voxels, noise), brain


@pytest.fixture(scope="module")
def case(cases):
    return cases[0].to_inpaint()


@pytest.fixture
def data_set(case, tmp_path):
    root = tmp_path / "raw"
    for subject, (scan, mask) in MASKS.items():
        folder = root / f"sub-{subject}"
        put(case.t1n_voided, folder / scan)
        put(case.mask, root / mask[3:] if mask.startswith("..") else folder / mask)
    put(case.t1n_voided, root / "sub-04/anat/sub-04_T1w.nii.gz")  # a healthy control
    _, brain = whole_head(case)
    (root / BRAIN).parent.mkdir(parents=True)
    write_map(root / BRAIN, brain.astype(np.uint8), read_volume(case.mask).affine)
    put(case.mask, root / "derivatives/manual/sub-01/anat/sub-01_space-MNI152_label-lesion_mask.nii.gz")
    description = {"Name": "raw", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root


def run(data_set, output, tiny_model_folder, *more):
    words = ["inpaint", "--data", data_set, "--output", output, "--model", tiny_model_folder]
    return main([*map(str, words), "--steps", "2", "--device", "cpu", *more])


def test_each_scan_has_its_own_lesion_mask_and_controls_are_counted(data_set, caplog):
    with caplog.at_level(logging.WARNING):
        found, exclusions = list_cases(data_set)
    assert not exclusions and [case.id for case in found] == ["sub-01", "sub-02_ses-1_run-2", "sub-03"]
    assert [case.mask.name for case in found] == [Path(mask).name for _, mask in MASKS.values()]
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 4 T1w have no lesion mask and are left out: sub-04_T1w.nii.gz"
    ]


def test_the_audit_and_the_digest_of_sources_are_of_the_same_cases(data_set):
    """They found none, as their search left BIDS out."""
    found = find_cases(data_set)
    assert [row.key for row in audit(data_set)] == [case.key for case in found]
    before = source_digests(data_set)
    found[0].mask.write_bytes(found[0].mask.read_bytes() + b"\0")
    assert source_digests(data_set) != before


def test_labels_of_the_mask_are_known_to_every_case(data_set):
    assert {case.read_options.labels for case in find_cases(data_set, "", ReadOptions(mask_labels="2"))} == {(2,)}


def test_two_lesion_masks_of_one_scan_are_excluded(data_set, case):
    put(case.mask, data_set / "sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    found, exclusions = list_cases(data_set)
    assert len(found) == 2 and "sub-01: ambiguous: " in exclusions[0].reason


def test_a_data_set_without_lesion_masks_is_one_error_with_its_fix(data_set, tmp_path, tiny_model_folder, capsys):
    for path in [*data_set.rglob("*lesion*")]:
        path.unlink()
    assert run(data_set, tmp_path / "out", tiny_model_folder) == 1
    error = capsys.readouterr().err.strip()
    assert (
        "4 T1w of a BIDS data set, 4 of them without a lesion mask. Fix: put sub-01_label-lesion_mask.nii.gz" in error
    )
    assert error.count("\n") == 0 and not (tmp_path / "out").exists()


def test_results_are_those_of_single_files_and_are_found_again(data_set, case, tmp_path, tiny_model_folder, capsys):
    output = tmp_path / "out"
    assert run(data_set, output, tiny_model_folder, "--samples", "2", "--dilate", "1") == 0
    single = tmp_path / "single.nii.gz"
    options = {"model": tiny_model_folder, "num_inference_steps": 2, "device": "cpu", "n_samples": 2, "dilate": 1}
    inpaint(case.t1n_voided, case.mask, single, **options)
    anat = output / "sub-02/ses-1/anat"
    names = {"": single, "Std": tmp_path / "single-std.nii.gz", "Nearest": tmp_path / "single-nearest.nii.gz"}
    for label, oracle in names.items():
        name = f"sub-02_ses-1_run-2_desc-inpainted{label}_T1w"
        assert (anat / f"{name}.nii.gz").read_bytes() == oracle.read_bytes()
        sidecar = json.loads((anat / f"{name}.json").read_text())
    assert sidecar["Synthetic"] is True and sidecar["SyntheticRegion"]["Dilation"] == 1 and sidecar["Samples"] == 2
    assert sidecar["Model"]["Name"] == tiny_model_folder.name and sidecar["Seed"] == 0
    assert all((data_set / uri.removeprefix("bids:raw:")).is_file() for uri in sidecar["Sources"])
    description = json.loads((output / "dataset_description.json").read_text())
    assert (output / description["DatasetLinks"]["raw"]).resolve() == data_set
    capsys.readouterr()
    assert run(data_set, output, tiny_model_folder, "--samples", "2", "--dilate", "1") == 0
    assert "3 cases: 3 found" in capsys.readouterr().err
    assert run(data_set, output, tiny_model_folder) == 0  # of other settings: no file of two samples may stay
    assert len([*anat.iterdir()]) == 2
    assert run(data_set, output, tiny_model_folder, "--estimate", "mean") == 0
    assert "Seed" not in json.loads((anat / "sub-02_ses-1_run-2_desc-inpainted_T1w.json").read_text())


def test_heads_take_the_brain_masks_of_the_data_set_and_those_that_are_made(
    data_set, case, tmp_path, tiny_model_folder, capsys
):
    head, brain = whole_head(case)
    scans = {subject: data_set / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz" for subject in ("01", "03")}
    for scan in scans.values():
        write_map(scan, head, read_volume(case.mask).affine)
    with deepbet_stand_in(tmp_path / "packages"):
        assert run(data_set, tmp_path / "out", tiny_model_folder, "--skull-strip") == 0
        assert run(data_set, tmp_path / "out", tiny_model_folder, "--skull-strip") == 0
    assert "3 cases: 3 found" in capsys.readouterr().err
    anat = {subject: tmp_path / f"out/sub-{subject}/anat" for subject in scans}
    assert not (anat["01"] / "sub-01_desc-brain_mask.nii.gz").exists()
    made, outside = anat["03"] / "sub-03_desc-brain_mask.nii.gz", read_volume(case.mask).voxels == 0
    assert np.array_equal((read_volume(made).voxels > 0)[outside], brain[outside])
    sidecars, options = {}, {"model": tiny_model_folder, "num_inference_steps": 2, "device": "cpu"}
    for (subject, folder), mask in zip(anat.items(), (data_set / BRAIN, made), strict=True):
        single = inpaint(scans[subject], case.mask, tmp_path / "single.nii.gz", brain_mask=mask, **options)[0]
        name = f"sub-{subject}_desc-inpainted_T1w"
        assert (folder / f"{name}.nii.gz").read_bytes() == single.read_bytes()
        sidecars[subject] = json.loads((folder / f"{name}.json").read_text())
    assert [sidecar["SkullStripped"] for sidecar in sidecars.values()] == [False, False]
    assert [sidecar["BrainMask"] for sidecar in sidecars.values()] == ["given", "made with deepbet 9.0"]
    assert sidecars["01"]["Sources"][2] == f"bids:raw:{BRAIN}" and len(sidecars["03"]["Sources"]) == 2
    other = json.loads((tmp_path / "out/sub-02/ses-1/anat/sub-02_ses-1_run-2_desc-inpainted_T1w.json").read_text())
    assert other["SkullStripped"] is True


def test_derivatives_are_valid_bids(data_set, case, tmp_path, tiny_model_folder):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.exists():
        pytest.skip("bids-validator-deno is not installed")
    output = tmp_path / "out"
    for subject in ("01", "02_ses-1_run-2", "03"):
        put(case.tissue, tmp_path / f"maps/tissue_segmentation/sub-{subject}.nii.gz")
    more = ["--samples", "2", "--summary", "--skull-strip", "--conditioning-dir", str(tmp_path / "maps")]
    with deepbet_stand_in(tmp_path / "packages"):
        assert run(data_set, output, tiny_model_folder, *more) == 0
    brain = json.loads((output / "sub-03/anat/sub-03_desc-brain_mask.json").read_text())
    assert brain["Type"] == "Brain" and brain["Sources"] == ["bids:raw:sub-03/anat/sub-03_T1w.nii.gz"]
    labels = output / "sub-01/anat/sub-01_desc-inpainted_dseg.nii.gz"
    assert "labels" in json.loads(labels.with_name("sub-01_desc-inpainted_dseg.json").read_text())["Description"]
    assert np.array_equal(np.unique(read_volume(labels).voxels), [0, 1, 2, 3])
    done = subprocess.run([validator, "--json", output], capture_output=True, text=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


# ---- dilation


@pytest.mark.parametrize("voxels", [1, 3])
def test_a_mask_grows_by_a_ball_also_at_the_border(voxels):
    mask = np.random.default_rng(0).random((20, 18, 16)) < 0.003
    mask[0, 0, 0] = True
    ball = np.sum(np.square(np.indices((2 * voxels + 1,) * 3) - voxels), axis=0) <= voxels**2
    assert np.array_equal(dilated(mask, voxels), ndimage.binary_dilation(mask, ball))


def test_a_dilated_mask_is_as_good_as_its_file(case, tmp_path):
    from nibabel import Nifti1Image, load, save

    grown = case_of_files(case.t1n_voided, case.mask, dilate=2)
    image = load(case.mask)
    save(Nifti1Image(dilated(image.get_fdata() > 0, 2).astype(np.uint8), image.affine), tmp_path / "m.nii.gz")
    one, other = load_case(grown), load_case(case_of_files(case.t1n_voided, tmp_path / "m.nii.gz"))
    assert np.array_equal(one.mask, other.mask) and np.array_equal(one.voided, other.voided)
    assert one.scale == other.scale and one.mask.sum() > load_case(case).mask.sum()


def test_the_other_name_of_the_mask_gives_the_same_file(case, tmp_path, tiny_model_folder):
    for name in ("--mask", "--lesion-mask"):
        words = ["inpaint", "--t1n-voided", case.t1n_voided, name, case.mask, "--model", tiny_model_folder]
        assert main([*map(str, words), "--output", str(tmp_path / f"{name}.nii.gz"), "--steps", "2"]) == 0
    one, other = (read_volume(tmp_path / f"{name}.nii.gz") for name in ("--mask", "--lesion-mask"))
    assert np.array_equal(one.raw, other.raw)


def test_a_dilation_out_of_range_is_rejected(case, tmp_path):
    with pytest.raises(ConfigError, match="dilate = -1"):
        inpaint(case.t1n_voided, case.mask, tmp_path / "o.nii.gz", dilate=-1)


def test_a_training_layout_is_not_taken_for_bids(cohort_folder):
    assert not any(case.derivative for case in find_cases(cohort_folder))
