"""What names the noise, and intensities whose background is not 0."""

import nibabel as nib
import numpy as np
import pytest

from ldm_lib.data.case import case_of_files, load_case
from ldm_lib.images.volume import read_volume, write_like

SHAPE, RADIUS, SPACING_MM = (40, 44, 36), 14.0, 2.0
INDICES = np.indices(SHAPE) - np.array([20, 22, 18]).reshape(3, 1, 1, 1)
BRAIN = np.linalg.norm(INDICES, axis=0) <= RADIUS
HUNDRED = BRAIN * np.float32(100)
LESION = np.linalg.norm(INDICES - np.array([-11, 0, 0]).reshape(3, 1, 1, 1), axis=0) <= 7  # beyond the surface


def written(folder, image, mask, name="A"):
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}-t1n-voided.nii.gz", folder / f"{name}-mask.nii.gz"
    for path, voxels in zip(paths, (image, mask.astype(np.uint8)), strict=True):
        nib.save(nib.Nifti1Image(voxels, np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1])), path)
    return load_case(case_of_files(*paths))


def brain(folder, mask, image=HUNDRED):
    return written(folder, np.where(mask, 0, image).astype(np.float32), mask)


def test_a_loaded_case_has_the_names_of_its_case_and_one_line_in_a_session(tmp_path):
    data = brain(tmp_path, LESION & BRAIN)
    assert (data.key, data.id, data.patient) == (data.case.key, data.case.id, data.case.patient) == ("A", "A", "A")
    volume_ml = (LESION & BRAIN).sum() * SPACING_MM**3 / 1000
    assert repr(data) == f"CaseData('A', 40x44x36, 2x2x2 mm, mask {volume_ml:.1f} mL, growth no, tissue no)"
    assert repr(data.with_maps(tissue=np.zeros(SHAPE))).endswith("growth no, tissue yes)")
    assert repr(data.source) == "Volume('A-t1n-voided.nii.gz', 40x44x36, 2x2x2 mm, LPS, float32)"


def test_loading_a_loaded_case_returns_it(tmp_path):
    data = brain(tmp_path, LESION & BRAIN)
    assert load_case(data) is data


def test_the_noise_is_named_by_the_mask_whatever_file_holds_it_and_in_which_order(tmp_path):
    mask = LESION & BRAIN
    data = brain(tmp_path / "a", mask)
    assert written(tmp_path / "b", 3 * data.voided, mask, name="another name").mask_digest == data.mask_digest
    assert brain(tmp_path / "c", mask & (INDICES[0] < -9)).mask_digest != data.mask_digest
    turned = []
    for role in ("t1n_voided", "mask"):
        image = nib.load(data.case.files()[role])
        turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("LPS", "SRA")))
        turned.append(tmp_path / f"turned-{role}.nii.gz")
        nib.save(image.as_reoriented(turn), turned[-1])
    assert load_case(case_of_files(*turned)).mask_digest == data.mask_digest


@pytest.mark.parametrize(
    ("background", "dtype"), [(-1.0, "float32"), (-0.62, "float32"), (0.25, "float32"), (-1, "int16"), (1000, "int16")]
)
def test_intensities_count_from_the_background_and_are_written_in_the_files_own_range(tmp_path, background, dtype):
    mask, rng = LESION & BRAIN, np.random.default_rng(0)
    image = np.where(BRAIN, rng.integers(20, 100, SHAPE), 0)
    shifted = np.where(mask, 0, (image / (100 if dtype == "float32" else 1) + background)).astype(dtype)
    data = written(tmp_path, shifted, mask)
    unit = 0.01 if dtype == "float32" else 1
    np.testing.assert_allclose(data.voided, np.where(mask, 0, image) * unit, atol=1e-4)
    assert (data.voided[~BRAIN] == 0).all() and any("the background is" in text for text in data.warnings)
    write_like(tmp_path / "out.nii.gz", data.source, np.where(mask, 50 * unit, data.voided), mask)
    result = read_volume(tmp_path / "out.nii.gz").raw
    np.testing.assert_array_equal(result[~mask], shifted[~mask])
    stored = float(shifted[0, 0, 0]) + 50 * unit
    np.testing.assert_allclose(result[mask], stored, atol=1e-4)


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz"])
@pytest.mark.parametrize("hidden", [0.0, -9.0, 9.0])
def test_z_scores_of_the_brain_count_from_its_dark_end_while_air_is_0(tmp_path, ending, hidden):
    """The same brain in other units, whatever lies under the mask: equal up to the 0.1 % that are darker."""
    mask, rng = LESION & BRAIN, np.random.default_rng(0)
    image = rng.integers(20, 100, SHAPE)
    z = np.where(BRAIN, (image - 60) / 25, 0).astype(np.float32)
    shown = np.where(mask, hidden, z).astype(np.float32)
    data = written(tmp_path, shown, mask)
    assert any("air is 0, the brain begins at -1.6" in text for text in data.warnings)
    assert (data.voided[~BRAIN] == 0).all() and not data.voided[mask].any()
    seen = BRAIN & ~mask & (image != 60)  # a z-score of exactly 0 counts as air
    np.testing.assert_allclose(data.voided[seen] * 25, image[seen] - 20, atol=1e-3)
    path = write_like(tmp_path / f"out{ending}", data.source, np.where(mask, 1.0, data.voided), mask)
    result = read_volume(path).raw
    np.testing.assert_array_equal(result[~mask], shown[~mask])
    np.testing.assert_allclose(result[mask], -0.6, atol=1e-6)


def test_a_few_negative_voxels_of_an_interpolation_shift_nothing(tmp_path):
    mask = LESION & BRAIN
    image = np.where(BRAIN & (INDICES[0] % 20 == 0), -30, HUNDRED)
    data = brain(tmp_path, mask, image)
    assert data.source.background == 0 and any("negative voxels" in text for text in data.warnings)


def test_a_border_of_many_values_is_no_background(tmp_path):
    noise = np.random.default_rng(0).integers(1, 9, SHAPE).astype(np.float32)
    data = written(tmp_path, np.where(LESION, 0, noise + 100 * BRAIN), LESION)
    assert data.source.intercept == 0 and not any("background" in text for text in data.warnings)
