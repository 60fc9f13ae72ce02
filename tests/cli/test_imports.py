"""What the commands load that use a model: they start as fast as torch does."""

from heavy import heavy_imports

from ldm_lib.data.cohort import find_cases


def test_inpaint_and_prior_load_torch_alone(cohort_folder, tiny_initial_estimate_folder, tmp_path):
    """Registration, sampling and writing need nothing else that is heavy."""
    case = find_cases(cohort_folder)[0]
    files = ["--t1n-voided", str(case.t1n_voided), "--mask", str(case.mask)]
    model = ["--model", str(tiny_initial_estimate_folder), "--steps", "2", "--summary"]
    _, loaded = heavy_imports([
        ["prior", *files, "--tissue", str(tmp_path / "t.nii.gz")],
        ["inpaint", *files, *model, "--output", str(tmp_path / "o.nii.gz")],
        ["inpaint", "--data", str(cohort_folder), *model, "--output", str(tmp_path / "all")],
    ])  # fmt: skip
    assert loaded == [["torch"]] * 3
    assert (tmp_path / "o.nii.gz").exists() and (tmp_path / "all" / "results.csv").exists()
