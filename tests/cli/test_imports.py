"""What the commands load that use a model: they start as fast as torch does."""

from heavy import heavy_imports

from ldm_lib.data.cohort import find_cases


def test_inpaint_and_prior_load_torch_alone(cohort_folder, tmp_path):
    """Registration, sampling and writing need nothing else that is heavy."""
    case = find_cases(cohort_folder)[0]
    files = ["--t1n-voided", str(case.t1n_voided), "--mask", str(case.mask)]
    _, loaded = heavy_imports([
        ["prior", *files, "--tissue", str(tmp_path / "t.nii.gz")],
        ["inpaint", *files, "--estimate", "mean", "--summary", "--output", str(tmp_path / "o.nii.gz")],
    ])  # fmt: skip
    assert loaded == [["torch"]] * 2
    assert (tmp_path / "o.nii.gz").exists()
