"""Laws of the evaluation: every method is scored on the same voxels as the challenge scores them."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError
from ldm_lib.evaluation.case_scores import (
    MEDOID,
    SAMPLE,
    UPPER_BOUND,
    candidates,
    mean_of,
    result_path,
    score_rows,
)
from ldm_lib.evaluation.metrics import brats_scores, mask_size_class
from ldm_lib.images.volume import write_like
from ldm_lib.inpainting.baselines import BASELINES


@pytest.fixture
def data(cases):
    return load_case(cases[0])


@pytest.fixture
def results(data, tmp_path):
    """A folder as of stage 05: the masked region is 100 in the sample, 200 in the mean, 300 in the upper bound."""
    (tmp_path / "upper_bound").mkdir()
    name = data.case.result_name
    for path, value in (
        (tmp_path / name.replace(".nii.gz", "-sample-0000.nii.gz"), 100),
        (tmp_path / name, 200),
        (tmp_path / name.replace(".nii.gz", "-nearest.nii.gz"), 150),
        (tmp_path / "upper_bound" / name, 300),
    ):
        write_like(path, data.source, np.full(data.mask.shape, float(value)), data.mask)
    return tmp_path


def test_each_method_is_read_from_its_own_file(data, results):
    found = candidates(data, results, 4, baselines=False)
    assert {name: set(volume[data.mask]) for name, volume in found.items()} == {
        SAMPLE: {100.0}, mean_of(4): {200.0}, UPPER_BOUND: {300.0}, MEDOID: {150.0},
    }  # fmt: skip
    for volume in found.values():
        assert np.array_equal(volume[~data.mask], data.voided[~data.mask])


def test_a_sample_is_where_the_inpainter_writes_it(data, tmp_path):
    from ldm_lib.inpainting.result import Inpainting

    written = Inpainting(data, np.zeros((2, data.mask.sum()), np.float32)).save(tmp_path, samples=True)
    assert [result_path(tmp_path, data, f"sample-000{k}") for k in range(2)] == written[3:]


def test_baselines_do_not_see_under_the_mask(data, results):
    found = candidates(data, results, 1)
    assert set(BASELINES) < set(found)
    lied = replace(data, target=data.target + 7)
    for name in BASELINES:
        assert np.array_equal(found[name], candidates(lied, results, 1)[name])
    without = candidates(replace(data, tissue=None), results, 1)
    assert set(found) - set(without) == {"tissue paint", "initial estimate"}


def test_rows_are_the_challenges_scores_on_the_healthy_mask(data):
    volumes = {"truth": data.target, "nothing": data.voided}
    rows, by_tissue = score_rows(data, volumes)
    assert [row["method"] for row in rows] == ["truth", "nothing"]
    for row, volume in zip(rows, volumes.values(), strict=True):
        oracle = brats_scores(volume, data.target, data.voided, data.healthy)
        assert {name: row[name] for name in oracle} == oracle
        assert (row["case"], row["patient"]) == (data.case.key, data.case.patient)
        assert row["mask_size"] == mask_size_class(data.mask.sum() * 8.0**3) and row["tissue_map"] == "given"
    assert rows[0]["ssim"] == 1 and rows[0]["psnr_01"] == np.inf and rows[1]["psnr_01"] < 20
    assert {row["tissue"] for row in by_tissue} <= {"CSF", "GM", "WM"} and {"truth", "nothing"} == {
        row["method"] for row in by_tissue
    }


def test_without_maps_and_parts_the_whole_mask_is_scored(data):
    bare = replace(data, tissue=None, healthy=None)
    rows, by_tissue = score_rows(bare, {"nothing": data.voided})
    oracle = brats_scores(data.voided, data.target, data.voided, data.mask)
    assert {name: rows[0][name] for name in oracle} == oracle
    assert by_tissue == [] and rows[0]["tissue_map"] == "none"


def test_a_missing_result_is_named(data, tmp_path):
    with pytest.raises(InputError, match=r"inference-0000-sample-0000\.nii\.gz: no such file"):
        candidates(data, tmp_path, 1)
