"""Laws of a result's summary: volumes add up to the mask, labels are the map's outside, the intensities' inside."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ldm_lib.__main__ import main
from ldm_lib.anatomy.tissue_segmentation import nearest_tissue
from ldm_lib.data.case import load_case
from ldm_lib.images.image_files import stem
from ldm_lib.images.volume import read_volume


@pytest.fixture(scope="module")
def case(cases):
    return cases[0].to_inpaint()


def run(case, output, tiny_model_folder, *more):
    words = ["inpaint", "--t1n-voided", case.t1n_voided, "--mask", case.mask, "--output", output]
    return main([*map(str, [*words, "--model", tiny_model_folder, "--steps", 2, "--summary", *more])])


def test_volumes_add_up_to_the_mask_and_labels_outside_are_the_maps(case, tmp_path, tiny_model_folder):
    output = tmp_path / "o.nii.gz"
    assert run(case, output, tiny_model_folder, "--tissue", case.tissue, "--seed", "3", "--dilate", "1") == 0
    data = load_case(replace(case, dilate=1))
    labels, summary = read_volume(tmp_path / "o-dseg.nii.gz"), json.loads((tmp_path / "o-summary.json").read_text())
    assert np.array_equal(labels.voxels[~data.mask], data.tissue[~data.mask])
    volumes = summary["VolumesML"]
    assert volumes["Mask"] == pytest.approx(data.mask.sum() * np.prod(data.source.spacing_mm) / 1000)
    assert sum(volumes[name] for name in ("None", "CSF", "GM", "WM")) == pytest.approx(volumes["Mask"])
    wm_ml = np.count_nonzero(labels.voxels[data.mask] == 3) * volumes["Mask"] / data.mask.sum()
    assert volumes["WM"] == pytest.approx(wm_ml)
    assert (summary["TissueMap"], summary["Seed"], summary["Dilation"]) == ("given", 3, 1)
    assert summary["Model"]["Name"] == tiny_model_folder.name and summary["Warnings"] == list(data.warnings)


def test_without_a_map_the_summary_says_so_and_no_labels_stay(case, tmp_path, tiny_model_folder):
    (tmp_path / "o-dseg.nii.gz").write_bytes(b"of an earlier call")
    assert run(case, tmp_path / "o.nii.gz", tiny_model_folder, "--no-make-missing", "--estimate", "mean") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-summary.json", "o.nii.gz"]
    summary = json.loads((tmp_path / "o-summary.json").read_text())
    assert summary["TissueMap"] == "none" and list(summary["VolumesML"]) == ["Mask"] and "Seed" not in summary
    assert any("no tissue map" in text for text in summary["Warnings"])


def test_a_summary_that_cannot_be_written_is_an_error_before_anything_is_done(
    case, tmp_path, tiny_model_folder, capsys
):
    (tmp_path / "o-summary.json").mkdir()
    assert run(case, tmp_path / "o.nii.gz", tiny_model_folder) == 1
    assert "o-summary.json" in capsys.readouterr().err and not (tmp_path / "o.nii.gz").exists()


def test_a_folder_has_the_summaries_of_its_cases_and_makes_missing_ones(
    cohort_folder, cases, tmp_path, tiny_model_folder, capsys
):
    words = ["inpaint", "--data", cohort_folder, "--output", tmp_path, "--model", tiny_model_folder, "--steps", 2]
    words = [*map(str, words)]
    assert main(words) == 0 and not list(tmp_path.glob("*-summary.json"))
    before = {case.key: (tmp_path / case.result_name).read_bytes() for case in cases}
    for status in ("filled", "found"):
        assert main([*words, "--summary"]) == 0
        assert f"{len(cases)} cases: {len(cases)} {status}" in capsys.readouterr().err
    for case in cases:
        output = tmp_path / case.result_name
        summary = json.loads((tmp_path / f"{stem(output)}-summary.json").read_text())
        assert summary["Result"] == case.result_name and output.read_bytes() == before[case.key]
    assert main([*words, "--seed", "1"]) == 0 and not list(tmp_path.glob("*-summary.json"))  # none of other settings


@pytest.mark.parametrize("scale", [1, 40])
def test_labels_of_a_piecewise_constant_image_are_found_again(scale):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (14, 13, 12)).astype(np.uint8)
    image = scale * np.array([0, 1.0, 2.5, 4.0])[labels] + (labels > 0) * rng.normal(0, 0.05 * scale, labels.shape)
    mask = np.zeros(labels.shape, bool)
    mask[4:9, 0:5, 3:9] = True
    hidden = np.where(mask, 1, labels).astype(np.uint8)  # what a map says under the mask does not count
    assert np.array_equal(nearest_tissue(image, hidden, mask, (1, 1, 2)), labels)
