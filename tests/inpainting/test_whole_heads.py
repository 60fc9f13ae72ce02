"""A whole head is inpainted in its brain as the stripped scan is, and its other voxels keep their bits."""

import nibabel as nib
import numpy as np
import pytest
from packages import deepbet_stand_in

import ldm_lib as ldm
from ldm_lib.__main__ import main
from ldm_lib.errors import InputError


@pytest.fixture
def head(cases, tmp_path):
    """Files of a scan with a noisy scalp around the brain, of its brain mask, and its case."""
    case = cases[0]
    scan, mask = nib.load(case.t1n_voided), np.asarray(nib.load(case.mask).dataobj) > 0
    voxels = np.asarray(scan.dataobj)
    brain, noise = (voxels != 0) | mask, np.random.default_rng(0).integers(1, 900, voxels.shape)
    paths = tmp_path / "head.nii.gz", tmp_path / "brain.nii.gz"
    for path, array in zip(paths, (np.where(brain, voxels, noise + 0.5), brain), strict=True):
        nib.save(nib.Nifti1Image(array.astype(np.float32), scan.affine), path)
    return *paths, case


def inpaint(image, case, output, model, *more):
    words = ["inpaint", "--t1n-voided", image, "--mask", case.mask, "--output", output, "--model", model,
             "--steps", "2", "--device", "cpu", *more]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return np.asarray(nib.load(output).dataobj)


def test_the_brain_of_a_head_is_inpainted_like_the_stripped_scan(head, tmp_path, tiny_model_folder):
    image, brain, case = head
    whole = inpaint(image, case, tmp_path / "whole.nii.gz", tiny_model_folder, "--brain-mask", brain)
    stripped = inpaint(case.t1n_voided, case, tmp_path / "stripped.nii.gz", tiny_model_folder)
    given, mask = np.asarray(nib.load(image).dataobj), np.asarray(nib.load(case.mask).dataobj) > 0
    np.testing.assert_array_equal(whole[~mask], given[~mask])
    np.testing.assert_allclose(whole[mask], stripped[mask], atol=0.5001)  # the stripped file holds whole numbers
    assert whole[mask].any()


def test_a_brain_mask_that_is_made_is_written_and_gives_the_result_of_that_file(
    head, tmp_path, tiny_model_folder, capsys
):
    image, _, case = head
    made, brain, again = (tmp_path / f"{name}.nii.gz" for name in ("made", "made-brain-mask", "again"))
    with deepbet_stand_in(tmp_path / "packages"):
        inpaint(image, case, made, tiny_model_folder, "--skull-strip")
        with pytest.raises(InputError, match=r"made-brain-mask.nii.gz: is one of the inputs"):
            ldm.inpaint(brain, case.mask, made, read_options=ldm.ReadOptions(skull_strip=True))
    assert capsys.readouterr().out.split() == [str(made), str(brain)]
    assert np.array_equal(nib.load(brain).affine, nib.load(image).affine)
    inpaint(image, case, again, tiny_model_folder, "--brain-mask", brain)
    assert made.read_bytes() == again.read_bytes()
