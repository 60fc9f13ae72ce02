"""The patient of a case, by the naming schemes of public data sets or by a table."""

import pytest

from ldm_lib.data.cohort import audit, find_cases
from ldm_lib.data.patients import patient_of, read_patients
from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
from ldm_lib.errors import InputError


@pytest.mark.parametrize(
    ("patient", "identities"),
    [
        ("BraTS-GLI-00005", ["BraTS-GLI-00005-000", "BraTS-GLI-00005-100"]),
        ("sub-01", ["sub-01", "sub-01_ses-01", "sub-01_ses-02_T1w", "sub-01_acq-mprage_run-2"]),
        ("UCSF-PDGM-0004", ["UCSF-PDGM-0004", "UCSF-PDGM-0004_FU001d", "UCSF-PDGM-0004_nifti"]),
        ("UPENN-GBM-00001", ["UPENN-GBM-00001_11", "UPENN-GBM-00001_21"]),
        ("TCGA-02-0006", ["TCGA-02-0006", "TCGA-02-0006_1996.08.23"]),
        ("ReMIND-001", ["ReMIND-001", "ReMIND-001-Preop", "ReMIND-001_intraop"]),
        ("Patient-001", ["Patient-001", "Patient-001_week-000", "Patient-001__week-000-2", "Patient-001_week-044"]),
        ("PatientID_0003", ["PatientID_0003_Timepoint_1", "PatientID_0003_Timepoint_5"]),
        ("100101", ["100101_time1", "100101_time2"]),
        ("OAS2_0001", ["OAS2_0001_MR1", "OAS2_0001_MR2"]),
        ("P07", ["P07_20190102", "P07-2019-03-04", "P07_baseline", "P07_followup2", "P07_visit_3", "P07-tp1"]),
    ],
)
def test_time_points_are_of_one_patient(patient, identities):
    assert {patient_of(identity) for identity in identities} == {patient}


@pytest.mark.parametrize(
    "identity",
    ["P0", "case_MR_001", "BraTS2021_00495", "BraTS20_Training_001", "Synthetic_08000", "scan-12", "IXI002-Guys-0828",
     "UCSF-PDGM-0004", "GBM-pre", "a_b_c"],
)  # fmt: skip
def test_names_without_a_time_point_are_patients_of_their_own(identity):
    assert patient_of(identity) == identity


def test_a_table_names_the_patients_of_other_names(tmp_path):
    ids = make_synthetic_cohort(tmp_path, 2, spacing_mm=8, masks=1)
    table = tmp_path / "patients.csv"
    table.write_text(f"case,patient\n{ids[0]},anna\n{ids[1]},anna\n")
    assert {case.patient for case in find_cases(tmp_path / "data", patients_file=table)} == {"anna"}
    assert {row.facts["patient"] for row in audit(tmp_path / "data", patients_file=table)} == {"anna"}
    table.write_text(f"case\tpatient\n{ids[0]}\totto\n")
    assert {case.patient for case in find_cases(tmp_path / "data", patients_file=table)} == {"otto", ids[1]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("id,who\na,b\n", r"no column case, patient; its first line is: id, who\. Fix: give a CSV file"),
        ("", r"no column case, patient; its first line is: nothing"),
        ("case,patient\na,\n", r"line 2 has no patient"),
        ("case,patient\na,b\na,c\n", r"line 3: a is of c, but of b above"),
    ],
)
def test_an_unusable_table_is_one_line(tmp_path, content, match):
    table = tmp_path / "patients.csv"
    table.write_text(content)
    with pytest.raises(InputError, match=rf"patients\.csv: {match}"):
        read_patients(table)
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_patients(tmp_path / "none.csv")
