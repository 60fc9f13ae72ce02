"""Laws of the synthetic cohort, on coarse grids so that they run in seconds."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ldm_lib.anatomy.synthetic_tumour import GROWTH_MM
from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD
from ldm_lib.data import synthetic_cohort as module
from ldm_lib.data.cohort import load_case, survey_cases
from ldm_lib.data.synthetic_cohort import (
    DEMO_PATIENTS,
    TEST_PATIENTS,
    TRAINING_PATIENTS,
    brats_grid,
    make_patient,
    make_synthetic_cohort,
    write_patient,
)
from ldm_lib.errors import ConfigError

SPACING_MM = 4.0


@pytest.fixture(scope="module")
def patients():
    return [make_patient(0, patient, spacing_mm=SPACING_MM) for patient in range(2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    assert make_synthetic_cohort(folder, 1, first=0, spacing_mm=SPACING_MM) == ["Synthetic_00000"]
    return folder


def _halved(volume):
    x, y, z = (n // 2 for n in volume.shape)
    return volume.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))


def _dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_seed_and_patient_decide(patients):
    again, other = (make_patient(seed, 1, spacing_mm=SPACING_MM, masks=1) for seed in (0, 1))
    np.testing.assert_array_equal(again.t1n, patients[1].t1n)
    np.testing.assert_array_equal(again.growth, patients[1].growth)
    np.testing.assert_array_equal(again.masks[0][0], patients[1].masks[0][0])
    assert _dice(other.segmentation, again.segmentation) < 0.9


def test_patients_differ_in_shape_contrast_and_tumour(patients):
    one, two = patients
    assert 0.5 < _dice(one.t1n > 0, two.t1n > 0) < 0.97
    assert _dice(one.tissue == 3, two.tissue == 3) < 0.85
    assert _dice(one.segmentation, two.segmentation) < 0.5
    assert one.t1n.max() != two.t1n.max()


@pytest.mark.slow
def test_a_patient_is_the_same_at_any_voxel_size():
    fine, coarse = (make_patient(0, 4, spacing_mm=s, masks=1) for s in (3, 6))
    assert np.corrcoef(_halved(fine.t1n.astype(float)).ravel(), coarse.t1n.ravel())[0, 1] > 0.98
    assert np.corrcoef(_halved(fine.growth).ravel(), coarse.growth.ravel())[0, 1] > 0.99
    assert _dice(_halved(fine.tissue > 0) >= 0.5, coarse.tissue > 0) > 0.97
    centre = np.array([10, 10, 10, 1.0])
    np.testing.assert_allclose(coarse.affine @ centre, fine.affine @ np.array([20.5, 20.5, 20.5, 1]))


@pytest.mark.slow
def test_a_patient_at_one_millimetre_is_the_one_at_four(patients):
    fine = make_patient(0, 1, masks=1)
    assert fine.t1n.shape == (240, 240, 155)
    padded = np.pad(fine.t1n.astype(float), ((0, 0), (0, 0), (0, 1)))
    assert np.corrcoef(_halved(_halved(padded)).ravel(), patients[1].t1n.ravel())[0, 1] > 0.97
    margin = ndimage.distance_transform_edt(~fine.segmentation)
    assert (margin[fine.masks[0][1]] <= 5).all()


def test_one_millimetre_is_the_brats_grid():
    grid = brats_grid(1.0)
    assert grid.shape == (240, 240, 155)
    np.testing.assert_array_equal(grid.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_tissues_are_ordered_and_all_there(patients):
    for patient in patients:
        healthy = ~patient.segmentation
        csf, gm, wm = (patient.t1n[(patient.tissue == label) & healthy].mean() for label in (1, 2, 3))
        assert csf < 0.8 * gm < 0.8 * 0.9 * wm
        shares = np.bincount(patient.tissue[patient.tissue > 0], minlength=4)[1:] / (patient.tissue > 0).sum()
        assert shares.min() > 0.05
        assert 1000 < (patient.tissue > 0).sum() * SPACING_MM**3 / 1000 < 2000  # ml
        np.testing.assert_array_equal(patient.t1n > 0, patient.tissue > 0)


def test_tumour_is_drawn_only_where_it_has_grown(patients, monkeypatch):
    monkeypatch.setattr(module, "synthetic_tumour", lambda *_: np.zeros(brats_grid(GROWTH_MM).shape, np.float32))
    for k, patient in enumerate(patients):
        healthy = make_patient(0, k, spacing_mm=SPACING_MM, masks=0)
        np.testing.assert_array_equal(patient.segmentation, patient.growth >= GROWTH_THRESHOLD)
        np.testing.assert_array_equal(patient.t1n[~patient.segmentation], healthy.t1n[~patient.segmentation])
        np.testing.assert_array_equal(patient.tissue, healthy.tissue)
        deep = (patient.growth > 0.7) & (patient.tissue == 3)
        assert patient.t1n[deep].mean() < 0.85 * healthy.t1n[deep].mean()


def test_growth_is_a_concentration_inside_the_brain(patients):
    for patient in patients:
        assert patient.growth.min() == 0
        assert 0.5 < patient.growth.max() <= 1
        assert not patient.growth[patient.tissue == 0].any()
        assert 2 < patient.segmentation.sum() * SPACING_MM**3 / 1000 < 120  # ml


def test_masks_follow_the_rules_of_the_challenge(patients):
    for patient in patients:
        brain = patient.t1n > 0
        for healthy, unhealthy in patient.masks:
            distance = ndimage.distance_transform_edt(~unhealthy, sampling=SPACING_MM)
            assert healthy.any()
            assert distance[healthy].min() >= 5
            assert brain[healthy].mean() >= 0.75
            assert unhealthy[patient.segmentation].all()
        assert len({healthy.tobytes() for healthy, _ in patient.masks}) == 3


def test_written_files_are_brats_files(written):
    files = sorted(written.rglob("*.nii.gz"))
    assert len(files) == 1 + 3 * 4 + 2
    for path in files:
        image = nib.load(path)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        np.testing.assert_allclose(image.header.get_zooms(), SPACING_MM)
        assert image.shape == (60, 60, 39)
        assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
        expected = np.float32 if "growth" in str(path) else np.int16 if "t1n" in path.name else np.uint8
        assert image.get_data_dtype() == expected
    assert not list(written.rglob("*.part"))


def test_voided_is_zero_under_the_mask_and_equal_outside(written):
    def voxels(role):
        return np.asarray(nib.load(written / "data" / "Synthetic_00000" / f"Synthetic_00000-{role}.nii.gz").dataobj)

    for k in range(3):
        mask, t1n, voided = voxels(f"mask-{k:04d}"), voxels("t1n"), voxels(f"t1n-voided-{k:04d}")
        np.testing.assert_array_equal(mask, voxels(f"mask-healthy-{k:04d}") | voxels(f"mask-unhealthy-{k:04d}"))
        np.testing.assert_array_equal(np.unique(mask), [0, 1])
        np.testing.assert_array_equal(voided, np.where(mask, 0, t1n))
        assert t1n[mask > 0].any()


def test_the_cohort_finds_its_patients(written, patients):
    cases, exclusions = survey_cases(written / "data", written / "conditioning_data")
    assert [case.key for case in cases][:2] == ["Synthetic_00000-0000", "Synthetic_00000-0001"]
    assert (len(cases), exclusions) == (3, [])
    loaded, made = load_case(cases[0]), patients[0]
    assert loaded.warnings == ()
    np.testing.assert_array_equal(loaded.growth, made.growth)
    np.testing.assert_array_equal(loaded.tissue, made.tissue)


def test_equal_numbers_give_equal_bytes(written, patients, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_patient", lambda *_, **__: patients[0])  # made a second time
    write_patient(tmp_path, 0, 0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 15
    for path in files:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes()


def test_ranges_of_patients_never_meet():
    ranges = [set(r) for r in (TRAINING_PATIENTS, DEMO_PATIENTS, TEST_PATIENTS)]
    assert sum(map(len, ranges)) == len(set.union(*ranges))


@pytest.mark.parametrize(
    "numbers", [{"seed": -1}, {"patient": -2}, {"masks": -1}, {"spacing_mm": 0.1}, {"spacing_mm": 20}]
)
def test_numbers_out_of_range_are_rejected(numbers):
    given = {"seed": 0, "patient": 0, "spacing_mm": 4.0, "masks": 1, **numbers}
    with pytest.raises(ConfigError, match=r"make_patient: seed .* given; allowed are 0 or more, and 0.5 to 12 mm"):
        make_patient(given.pop("seed"), given.pop("patient"), **given)


@pytest.mark.parametrize("numbers", [{"n_patients": -1}, {"n_patients": 2, "workers": 0}])
def test_a_cohort_has_at_least_one_patient_and_one_worker(tmp_path, numbers):
    with pytest.raises(ConfigError, match=r"make_synthetic_cohort: n_patients .* given; allowed are 1 or more"):
        make_synthetic_cohort(tmp_path, **numbers)


@pytest.mark.parametrize(("name", "fix"), [
    ("mask", "did you mean 'masks'"), ("variety", "it is called 'domain_randomisation'"),
    ("x", "allowed are masks, deformation, domain_randomisation, tissue_map"),
])  # fmt: skip
def test_an_unknown_parameter_of_a_cohort_is_rejected_with_the_allowed_ones(tmp_path, name, fix):
    with pytest.raises(ConfigError, match=rf"^make_synthetic_cohort: unknown parameter '{name}'\. Fix: {fix}"):
        make_synthetic_cohort(tmp_path, 1, **{name: 2})
