"""Laws of the cohort to train on: drawn from wider ranges, with maps as a registration leaves them, made by many."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from ldm_lib.anatomy.mri_simulation import RANDOMISATIONS, DomainRandomisation, simulate_scan
from ldm_lib.anatomy.synthetic_brain import Brain, brats_grid
from ldm_lib.anatomy.synthetic_tumour import GROWTH_MM
from ldm_lib.data import synthetic_cohort as module
from ldm_lib.data.synthetic_cohort import make_patient, make_synthetic_cohort, write_patient
from ldm_lib.errors import ConfigError

COARSE = {"spacing_mm": 8.0, "masks": 1}
CLEAN = {"texture": (0.0, 0.0), "bias": (0.0, 0.0), "noise": (0.0, 0.0)}


@pytest.fixture(scope="module")
def true():
    return [make_patient(0, patient, **COARSE) for patient in range(2)]


@pytest.fixture(scope="module")
def registered():
    """The first patient, its map as a registration leaves it."""
    return make_patient(0, 0, **COARSE, tissue_map="registered")


# ---- ranges


def contrast(domain_randomisation, patient=0):
    """Intensity of CSF and GM over WM's in a brain of three thick slabs, without a tumour and what blurs the view."""
    grid = brats_grid(8.0)
    tissue = np.indices(grid.shape)[0] // 10
    shares = np.eye(3)[:, tissue.ravel()]
    brain = Brain(np.ones(grid.shape, bool), shares, np.zeros(shares.shape[1]))
    streams = [np.random.default_rng([patient, k]) for k in range(2)]
    image = simulate_scan(brain, np.zeros(grid.shape), grid, replace(domain_randomisation, **CLEAN), *streams)
    csf, gm, white = (np.median(image[10 * k + 3 : 10 * k + 7]) for k in range(3))
    return csf / white, gm / white


def test_the_last_change_of_contrast_is_a_power():
    for gamma in (1.0, 0.8, 1.3):
        found = contrast(DomainRandomisation(csf=(0.2, 0.2), gm=(0.7, 0.7), gamma=(gamma, gamma)))
        assert found == pytest.approx((0.2**gamma, 0.7**gamma), abs=0.003)


def test_wide_contrasts_lie_on_both_sides_of_the_narrow_ones():
    narrow, wide = (np.array([contrast(RANDOMISATIONS[name], k) for k in range(20)]) for name in ("narrow", "wide"))
    low, high = (0.12, 0.60), (0.30, 0.74)
    assert (narrow > np.array(low) - 0.002).all() and (narrow < np.array(high) + 0.002).all()
    assert (wide.min(axis=0) < low).all() and (wide.max(axis=0) > high).all()


def test_every_wide_range_reaches_beyond_the_narrow_one_and_none_is_empty():
    for narrow, wide in zip(*map(astuple, (RANDOMISATIONS["narrow"], RANDOMISATIONS["wide"])), strict=True):
        assert wide[0] < wide[1] and wide[1] > narrow[1] and wide[0] <= narrow[1]


def drawn(monkeypatch, domain_randomisation):
    """How far 20 brains are deformed, and the range of their masks' scale factors."""
    deformations, scales = [], set()

    def stop(brain, unhealthy, donor, rng, *, spacing_mm, scale):
        scales.add(scale)
        raise StopIteration

    def deform(rng, grid, deformation):
        deformations.append(deformation)
        return Brain(np.ones(grid.shape, bool), np.ones((3, 1)), np.ones(1))

    monkeypatch.setattr(module, "make_brain", deform)
    monkeypatch.setattr(module, "synthetic_tumour", lambda *_: np.zeros(brats_grid(GROWTH_MM).shape, np.float32))
    monkeypatch.setattr(module, "healthy_mask", stop)
    for patient in range(20):
        with pytest.raises(StopIteration):
            make_patient(0, patient, **COARSE, deformation=0.5, domain_randomisation=domain_randomisation)
    return 2 * np.array(deformations), scales


def test_wide_randomisation_varies_the_deformation_and_enlarges_the_masks(monkeypatch):
    deformations, scales = drawn(monkeypatch, "narrow")
    assert (deformations == 1).all() and scales == {(0.6, 1.1)}
    deformations, scales = drawn(monkeypatch, "wide")
    assert (
        deformations.min() < 1 < 1.5 < deformations.max() <= 1.7
        and len(set(deformations)) == 20
        and scales == {(0.7, 1.9)}
    )


def test_a_narrow_patient_is_what_it_was_before_there_were_others(true):
    """Figures of the cohort before there were varieties."""
    for patient, figures in zip(true, [(1462.55, 3086, 10.0964, 30), (308.976, 3152, 31.7726, 13)], strict=True):
        brain = patient.t1n > 0
        found = (patient.t1n[brain].mean(), brain.sum(), patient.growth.sum(), patient.masks[0][0].sum())
        assert found == pytest.approx(figures, rel=1e-3)


# ---- maps as a registration leaves them


def test_a_registered_map_is_all_that_changes(true, registered):
    for name in ("t1n", "growth", "segmentation", "affine"):
        np.testing.assert_array_equal(getattr(true[0], name), getattr(registered, name))
    np.testing.assert_array_equal(true[0].masks, registered.masks)
    assert registered.tissue.dtype == true[0].tissue.dtype and set(np.unique(registered.tissue)) == {0, 1, 2, 3}


def agreeing(one, other):
    """Fraction of voxels in either brain that both maps call the same."""
    brain = (one > 0) | (other > 0)
    return (one == other)[brain].mean()


def test_a_registered_map_is_off_and_still_the_patients_own(true, registered):
    own, of_another = (agreeing(registered.tissue, patient.tissue) for patient in true)
    assert 0.6 < own < 0.9 and of_another < own - 0.15


def test_what_a_registration_misses_is_a_function_of_seed_and_patient(registered):
    again = make_patient(0, 0, **COARSE, tissue_map="registered")
    np.testing.assert_array_equal(again.tissue, registered.tissue)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"domain_randomisation": "wild"}, "domain_randomisation 'wild', tissue_map 'exact' given; allowed are"),
    ({"tissue_map": "drawn"}, "domain_randomisation 'narrow', tissue_map 'drawn' given; allowed are"),
])  # fmt: skip
def test_unknown_words_are_rejected_in_one_line(wrong, message):
    with pytest.raises(ConfigError) as error:
        make_patient(0, 0, **COARSE, **wrong)
    assert str(error.value).startswith(f"make_patient: {message}") and "\n" not in str(error.value)


# ---- patients that are whole, and those that are not


@pytest.fixture
def quick(monkeypatch, true):
    """Patients that are made at once, and the numbers of those that were."""
    made = []

    def make(seed, patient, **how):
        made.append(patient)
        return true[patient]

    monkeypatch.setattr(module, "make_patient", make)
    return made


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_patient_that_is_whole_is_not_made_again(quick, tmp_path):
    assert write_patient(tmp_path, 0, 1) == "Synthetic_00001" and quick == [1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_synthetic_cohort(tmp_path, 1, first=1) == ["Synthetic_00001"] and quick == [1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "data" / "Synthetic_00001" / "Synthetic_00001-t1n.nii.gz").unlink()
    write_patient(tmp_path, 0, 1)
    assert quick == [1, 1]


@pytest.mark.parametrize("files", [0, 3, 6])
def test_a_patient_cut_off_after_any_file_is_made_again_and_comes_out_the_same(quick, tmp_path, monkeypatch, files):
    write_patient(tmp_path / "whole", 0, 1)
    write, left = module.write_map, iter(range(files))

    def cut_off(*given):
        next(left)
        return write(*given)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(module, "write_map", cut_off)
        write_patient(tmp_path / "cut", 0, 1)
    assert len(contents(tmp_path / "cut")) == files
    write_patient(tmp_path / "cut", 0, 1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 7


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    """20 seconds, for the most part until two processes have loaded what they need."""
    kwargs = {"first": 0, **COARSE, "domain_randomisation": "wide", "tissue_map": "registered"}
    written = make_synthetic_cohort(tmp_path / "two", 2, workers=2, **kwargs)
    assert written == ["Synthetic_00000", "Synthetic_00001"]
    assert make_synthetic_cohort(tmp_path / "one", 2, **kwargs) == written
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
