"""Whole heads: only the brain is inpainted, from the brain alone, and the rest of the head keeps its bits."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.data.case import case_of_files, load_case
from ldm_lib.errors import InputError
from ldm_lib.images.brain_masks import completed_brain
from ldm_lib.images.options import ReadOptions

SPACING_MM = 4.0
AFFINE = np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1])
POSITION = (np.indices((50, 56, 48)).T - (25, 28, 24)).T * SPACING_MM


def ball(radius_mm, place=(0, 0, 0)):
    return sum((p - c) ** 2 for p, c in zip(POSITION, place, strict=True)) <= radius_mm**2


BRAIN, HEAD = ball(64), ball(88)
VOXELS = np.where(BRAIN, 100, np.where(HEAD, 300, 3 + np.indices((50, 56, 48))[0] % 9))
VOXELS = VOXELS.astype(np.int16)  # a bright scalp, and air that is not 0
INSIDE, ACROSS = ball(20, (20, 0, 0)), ball(20, (60, 0, 0))


def case(folder, mask, brain=BRAIN, voxels=VOXELS, affine=AFFINE):
    paths = [folder / f"{name}.nii.gz" for name in ("head", "lesion", "brain")]
    for path, array, grid in zip(paths, (voxels, mask, brain), (AFFINE, AFFINE, affine), strict=True):
        image = nib.Nifti1Image(array.astype(np.uint8 if array.dtype == bool else array.dtype), grid)
        nib.save(image, path)
    return case_of_files(*paths[:2], brain_mask=paths[2])


def test_the_rest_of_the_head_is_not_read(tmp_path):
    """Another scalp and other air give the same case, and the scan without a skull gives it, too."""
    data = load_case(case(tmp_path, INSIDE))
    np.testing.assert_array_equal(data.mask, INSIDE)
    np.testing.assert_array_equal(data.voided, np.where(BRAIN & ~INSIDE, 100, 0))
    np.testing.assert_array_equal(data.source.raw, VOXELS)
    assert data.scale == 100 and not any("skull-stripped" in text for text in data.warnings)
    other = load_case(case(tmp_path, INSIDE, voxels=np.where(BRAIN, VOXELS, 2 * VOXELS).astype(np.int16)))
    np.testing.assert_array_equal(other.voided, data.voided)


@pytest.mark.parametrize("missing", [np.zeros_like(BRAIN), INSIDE, ball(24, (20, 0, 0))])
def test_a_lesion_that_the_brain_mask_leaves_out_is_brain(tmp_path, missing):
    data = load_case(case(tmp_path, INSIDE, BRAIN & ~missing))
    np.testing.assert_array_equal(data.mask, INSIDE)
    np.testing.assert_array_equal(data.voided > 0, BRAIN & ~INSIDE)


def test_a_mask_across_the_surface_is_cut_there_whether_or_not_the_brain_mask_leaves_the_lesion_out(tmp_path):
    data = load_case(case(tmp_path, ACROSS))
    np.testing.assert_array_equal(data.mask, ACROSS & BRAIN)
    left_ml, all_ml = ((m.sum() * SPACING_MM**3 / 1000) for m in (ACROSS & ~BRAIN, ACROSS))
    text = f"{left_ml:.1f} of the mask's {all_ml:.1f} mL lie outside the brain; they stay as they are"
    assert text in data.warnings
    notched = load_case(case(tmp_path, ACROSS, BRAIN & ~ACROSS)).mask
    assert not (notched & ~BRAIN).any() and notched.sum() > 0.8 * (ACROSS & BRAIN).sum()


def test_completing_a_brain_only_adds_to_it_within_the_mask_and_depends_on_no_position():
    brain = BRAIN & ~ACROSS
    completed = completed_brain(brain, ACROSS, (SPACING_MM,) * 3)
    assert (completed >= brain).all() and not (completed & ~brain & ~ACROSS).any()
    moved = [np.roll(array, (2, -1, 1), (0, 1, 2)) for array in (brain, ACROSS, completed)]
    np.testing.assert_array_equal(completed_brain(*moved[:2], (SPACING_MM,) * 3), moved[2])


@pytest.mark.parametrize("brain", [BRAIN * np.int16(70), np.where(BRAIN, 0.6, 0.2).astype(np.float32)])
def test_a_stripped_image_and_a_map_of_probabilities_are_brain_masks(tmp_path, brain):
    np.testing.assert_array_equal(load_case(case(tmp_path, INSIDE, brain)).voided > 0, BRAIN & ~INSIDE)


def test_a_brain_mask_on_another_grid_is_resampled_on_request(tmp_path):
    head = case(tmp_path, INSIDE, BRAIN[2:], affine=AFFINE @ nib.affines.from_matvec(np.eye(3), (2, 0, 0)))
    read_options = ReadOptions(resample_mask=True)
    np.testing.assert_array_equal(load_case(replace(head, read_options=read_options)).brain, BRAIN)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"brain": np.zeros_like(BRAIN)}, r"the brain mask is empty \(0 of 134400 voxels\). Fix: mark the whole brain"),
        ({"brain": ball(40)}, r"covers 267 mL, less than any brain \(300 mL\). Fix: mark the whole brain"),
        ({"brain": BRAIN[1:]}, r"shape \(49, 56, 48\), but head.nii.gz has \(50, 56, 48\). Fix: resample it onto"),
        ({"affine": AFFINE + np.eye(4, k=3)}, r"its corners lie 1 mm \(0.25 voxels\) from those of head.nii.gz"),
        ({"mask": ball(8, (80, 0, 0))}, r"0 % of the mask's 33 voxels \(2.1 mL\) lie in this brain mask. Fix: check"),
    ],
)
def test_a_brain_mask_that_cannot_be_used_is_rejected_in_one_line(tmp_path, change, cause):
    with pytest.raises(InputError, match=cause) as error:
        load_case(case(tmp_path, **{"mask": INSIDE} | change))
    assert "brain.nii.gz: " in str(error.value) and "\n" not in str(error.value)


NOISE = np.random.default_rng(0).integers(1, 9, BRAIN.shape)
WITH_NECK = ball(88) | (POSITION[2] < 0) & (np.hypot(*POSITION[:2]) < 60)


def bare(folder, voxels):
    return replace(case(folder, INSIDE, voxels=voxels.astype(np.int16)), brain_mask=None)


@pytest.mark.parametrize("head", [np.where(WITH_NECK, 100, NOISE), np.where(WITH_NECK & (POSITION[2] > -80), 100, 0)])
def test_a_head_without_a_brain_mask_is_rejected_in_one_line(tmp_path, head):
    with pytest.raises(
        InputError, match=r"head.nii.gz: not skull-stripped: [23]\.\d litres .* --brain-mask FILE"
    ) as error:
        load_case(bare(tmp_path, head))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scan", [np.where(BRAIN, 100, NOISE), np.where(WITH_NECK, 10, 150)])
def test_noise_around_a_brain_and_bright_air_are_not_taken_for_a_head(tmp_path, scan):
    assert load_case(bare(tmp_path, scan)).brain is None
