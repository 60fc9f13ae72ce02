"""A whole head is inpainted in its brain as the stripped scan is, and its other voxels keep their bits."""

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.__main__ import main


@pytest.fixture
def head(cases, tmp_path):
    """Files of a scan with a noisy scalp around the brain, of its brain mask, and its case."""
    case = cases[0]
    scan, mask = nib.load(case.t1n_voided), np.asarray(nib.load(case.mask).dataobj) > 0
    voxels = np.asarray(scan.dataobj)
    brain, noise = (voxels != 0) | mask, np.random.default_rng(0).integers(1, 900, voxels.shape)
    paths = tmp_path / "head.nii.gz", tmp_path / "brain.nii.gz"
    for path, array in zip(paths, (np.where(brain, voxels, noise), brain), strict=True):
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
