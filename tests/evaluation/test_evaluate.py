"""Laws of the evaluation: tables worked out by hand, and cases that are inpainted once from their scans alone."""

import csv
import re
import shutil

import pandas as pd
import pytest

from ldm_lib.data.case import load_case
from ldm_lib.data.cohort import find_cases
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.evaluation import evaluate as module
from ldm_lib.evaluation.case_scores import ESTIMATE, MEDOID, SAMPLE, UPPER_BOUND, mean_of
from ldm_lib.evaluation.evaluate import evaluate, evaluate_folder
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.evaluation.summary import as_table, cases_table, interval_table, methods_table, summarise
from ldm_lib.experiment.stages import SamplingConfig
from ldm_lib.files import markdown
from ldm_lib.images.volume import read_volume
from ldm_lib.inpainting.baselines import BASELINES, harmonic_fill
from ldm_lib.inpainting.folder import fill_cases
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.locking import FolderLock
from ldm_lib.plots import case_plots

HOW = {"device": "cpu", "precision": "32", "blend_mm": 8.0, "temperature": 0.5}
CONFIG = SamplingConfig(num_inference_steps=2, samples=2, **HOW)
QUICK = CONFIG.model_copy(update={"num_inference_steps": 1, "samples": 1})


# ---- tables by hand


def rows_of(method, scores):
    """Rows of one method: case -> (PSNR, SSIM); the patient is the case's first letter."""
    return [{"method": method, "case": case, "patient": case[0], "psnr": psnr, "ssim": ssim}
            for case, (psnr, ssim) in scores.items()]  # fmt: skip


HARMONIC = rows_of("harmonic", {"a0": (20, 0.5), "a1": (22, 0.7), "b0": (30, 0.8)})
PROPOSED = rows_of("proposed", {"a0": (24, 0.7), "a1": (22, 0.7), "b0": (31, 0.9)})


def test_masks_of_a_patient_are_averaged_first_and_differences_are_by_case():
    """Of two patients, the bounds of the interval are one patient's figures and the other's."""
    assert methods_table(pd.DataFrame([*HARMONIC, *PROPOSED])) == [
        ["method", "PSNR, dB", "SSIM", "PSNR, dB, over harmonic", "SSIM, over harmonic"],
        ["proposed", "27.00 [23.00, 31.00]", "0.800 [0.700, 0.900]", "+1.50 [+1.00, +2.00]", "+0.100 [+0.100, +0.100]"],
        ["harmonic", "25.50 [21.00, 30.00]", "0.700 [0.600, 0.800]", "", ""],
    ]  # fmt: skip


def test_one_patient_has_no_interval_and_worse_scores_are_negative():
    worse = rows_of("worse", {"a0": (19, 0.4), "a1": (20, 0.4)})
    assert methods_table(pd.DataFrame([*worse, *HARMONIC[:2]]))[1:] == [
        ["harmonic", "21.00", "0.600", "", ""], ["worse", "19.50", "0.400", "-1.50", "-0.200"]
    ]  # fmt: skip


def test_a_method_that_some_cases_lack_is_compared_in_the_same_cases():
    """Those that need a tissue map have no row where there is none."""
    rows = pd.DataFrame([*HARMONIC, *PROPOSED[1:]])
    expected = ["26.50 [22.00, 31.00]", "0.800 [0.700, 0.900]", "+0.50 [+0.00, +1.00]", "+0.050 [+0.000, +0.100]"]
    assert methods_table(rows)[1] == ["proposed", *expected]
    assert cases_table(rows)[2] == ["proposed", "", "22.00, 0.700", "31.00, 0.900"]


def test_a_summary_holds_means_and_intervals_of_scores_and_of_their_differences():
    table = pd.DataFrame([*HARMONIC, *PROPOSED])
    found = summarise(table)
    assert found.loc["proposed", "psnr"].to_dict() == {"mean": 27.0, "low": 23.0, "high": 31.0}
    assert list(found.columns.levels[0]) == ["psnr", "ssim"] and list(found.index) == ["harmonic", "proposed"]
    gain = summarise(table, ["psnr"], reference="harmonic")
    assert gain.loc["proposed", "psnr"].to_dict() == {"mean": 1.5, "low": 1.0, "high": 2.0}


@pytest.mark.parametrize(("wrong", "missing"), [
    ({"by": "arm"}, "arm"), ({"by": ["method", "arm"]}, "arm"), ({"scores": ["dice"]}, "dice"),
])  # fmt: skip
def test_a_column_that_a_table_lacks_is_named(wrong, missing):
    table = pd.DataFrame([*HARMONIC, *PROPOSED])
    with pytest.raises(InputError, match=rf"^summarise: .* no column '{missing}', but method, case, .*Fix: "):
        summarise(table, **wrong)
    with pytest.raises(InputError, match="no column 'case', but"):
        summarise(table.drop(columns="case"), reference="harmonic")


# ---- two cases from end to end


@pytest.fixture(scope="module")
def folder(cohort_folder, tmp_path_factory):
    """The first mask of two patients, with the maps that came with them."""
    root = tmp_path_factory.mktemp("appraised")
    for patient in sorted(path.name for path in cohort_folder.iterdir())[:2]:
        shutil.copytree(cohort_folder / patient, root / "data" / patient, ignore=lambda _, names: [
            name for name in names if "-0001" in name])  # fmt: skip
    shutil.copytree(cohort_folder.parent / "conditioning_data", root / "conditioning_data")
    return root / "data"


@pytest.fixture(scope="module")
def two(folder):
    """The cases as they are inpainted: without growth maps."""
    return [case.with_maps(growth=None) for case in find_cases(folder)]


@pytest.fixture(scope="module")
def done(folder, tiny_initial_estimate_folder, tmp_path_factory):
    """A folder of results, the table, and what was said."""
    output, said = tmp_path_factory.mktemp("done"), []
    how = {"model": tiny_initial_estimate_folder, "tissue": "given", "pictures": 1, "say": said.append}
    return output, evaluate_folder(folder, output, CONFIG, **how), said


def read(output):
    with (output / "metrics.csv").open(newline="") as stream:
        return {(row["case"], row["method"]): row for row in csv.DictReader(stream)}


def test_means_by_mask_size_average_the_masks_of_a_patient_first():
    """Closed form: patient a has small masks of 10 and 20 dB, b one of 30: (15 + 30) / 2, from 15 to 30."""
    sizes = [("a", "small", 10.0), ("a", "small", 20.0), ("b", "small", 30.0), ("b", "large", 8.0)]
    rows = [{"method": "estimate", "patient": p, "mask_size": size, "psnr": psnr} for p, size, psnr in sizes]
    found = interval_table(pd.DataFrame(rows), ["psnr"], by=["method", "mask_size"], digits=1)["psnr"]
    assert found.to_dict() == {("estimate", "small"): "22.5 [15.0, 30.0]", ("estimate", "large"): "8.0"}


def test_every_method_is_scored_in_every_case(done, two):
    methods = {SAMPLE, mean_of(2), MEDOID, ESTIMATE, UPPER_BOUND, *BASELINES}
    assert set(read(done[0])) == {(case.key, method) for case in two for method in methods}
    data = load_case(two[0])
    for method, volume in (
        ("harmonic", harmonic_fill(data.voided, data.mask)),
        (mean_of(2), read_volume(done[0] / "results" / two[0].result_name).voxels),
    ):
        row = read(done[0])[data.case.key, method]
        oracle = brats_scores(volume, data.target, data.voided, data.healthy)
        assert {name: float(row[name]) for name in oracle} == pytest.approx(oracle, rel=1e-4)


def test_results_depend_neither_on_the_target_nor_on_a_growth_map(done, two, tiny_initial_estimate_folder, tmp_path):
    inpainter = Inpainter.load(tiny_initial_estimate_folder, **HOW)
    fill_cases(inpainter, [case.to_inpaint() for case in two], CONFIG, tmp_path, say=lambda line: None)
    written = {path.name: path.read_bytes() for path in (done[0] / "results").glob("*.nii.gz")}
    assert written == {path.name: path.read_bytes() for path in tmp_path.glob("*.nii.gz")} and len(written) == 2 * 5
    seen = inpainter.encode(load_case(two[0]))["conditioning"]
    assert not seen[0].any() and seen[1:].any()


def test_the_table_is_written_as_it_is_returned(done):
    output, table, _ = done
    text, _, links = (output / "table.md").read_text().rpartition("\n\n")
    assert text == table
    assert [(output / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", links)] == [True, True]
    assert "ground truth" in next(output.glob("*.html")).read_text()
    scores = as_table(pd.read_csv(output / "metrics.csv").to_dict("records"))
    methods, cases, gain = table.split("\n\n")
    assert (methods, cases) == (markdown(methods_table(scores)), markdown(cases_table(scores)))
    assert gain.startswith("mean of 2 over sample: ") and gain.endswith("] dB")
    assert len(list(output.glob("*.png"))) == 1 and not (output / "maps").exists(), "the given maps are requested"


def test_the_same_call_again_inpaints_nothing_and_returns_the_same(done, folder, tiny_initial_estimate_folder):
    output, table, said = done
    before = {path: path.stat().st_mtime_ns for path in (output / "results").glob("*.nii.gz")}
    again = []
    how = {"model": tiny_initial_estimate_folder, "tissue": "given", "say": again.append}
    assert evaluate_folder(folder, output, CONFIG, **how) == table
    assert [re.split("[ ;]", line.split(": ")[2])[0] for line in said] == ["filled"] * 2 + ["scored"] * 2
    assert [re.split("[ ;]", line.split(": ")[2])[0] for line in again] == ["found"] * 2 + ["scored"] * 2
    assert {path: path.stat().st_mtime_ns for path in before} == before and not FolderLock._held


# ---- maps, and what is rejected


def test_maps_are_made_of_scans_alone_even_where_some_were_given(
    two, folder, tiny_initial_estimate_folder, tiny_model_folder, tmp_path, monkeypatch
):
    """A stand-in whose atlas fits one case of the two: baselines that need a map are scored in that one only."""
    requested = []

    def add_conditioning_maps(case, maps, **how):
        requested.append((case.key, maps, how))
        return (case if case.key == two[0].key else case.with_maps(tissue=None)), []

    monkeypatch.setattr(module, "add_conditioning_maps", add_conditioning_maps)
    for model, refine in ((tiny_model_folder, "mixture"), (tiny_initial_estimate_folder, "none")):
        inpainter = Inpainter.load(model, device="cpu")
        for case in two:
            module._with_map(case, tmp_path / "maps", inpainter, lambda line: None, atlas=True)
        how = {"tissue": True, "growth": False, "refine": refine}
        assert requested == [(case.key, tmp_path / "maps", how) for case in two]
        requested.clear()
    table = evaluate_folder(folder, tmp_path / "out", QUICK, model=tiny_model_folder, say=lambda line: None)
    with_map = {case for case, method in read(tmp_path / "out") if method in ("initial estimate", "tissue paint")}
    assert with_map == {two[0].key}
    row = next(line for line in table.split("\n\n")[1].splitlines() if line.startswith("| initial estimate |"))
    assert row.endswith("|  |") and row.count(", 0.") == 1


def test_one_sample_has_no_mean(folder, tiny_initial_estimate_folder, tmp_path, monkeypatch):
    drawn = []
    plot = case_plots.plot
    monkeypatch.setattr(
        case_plots, "plot", lambda data, views, **how: drawn.append(list(views)) or plot(data, views, **how)
    )
    how = {"model": tiny_initial_estimate_folder, "tissue": "given", "pictures": 1, "say": lambda line: None}
    table = evaluate_folder(folder, tmp_path, QUICK, **how)
    assert "mean of" not in table and table.count("| sample |") == 2
    assert drawn == [["voided", "sample 1", "estimate", "ground truth"]] and len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize(("config", "pictures", "message"), [
    (QUICK, -1, "pictures = -1: 0 or more are allowed"),
    (QUICK.model_copy(update={"num_inference_steps": 5000}), 0, "5000"),
    (QUICK.model_copy(update={"sampler": "euler"}), 0, "'euler' given"),
])  # fmt: skip
def test_wrong_parameters_are_rejected_before_any_map_is_made(
    folder, tiny_initial_estimate_folder, tmp_path, config, pictures, message
):
    with pytest.raises(ConfigError, match=message):
        evaluate_folder(folder, tmp_path / "out", config, model=tiny_initial_estimate_folder, pictures=pictures)
    assert not (tmp_path / "out").exists()


def test_what_is_no_case_is_not_evaluated(tiny_initial_estimate_folder):
    inpainter = Inpainter.load(tiny_initial_estimate_folder, device="cpu")
    with pytest.raises(InputError, match="needs cases, not str"):
        evaluate(inpainter, "x")


def test_results_among_the_cases_are_rejected(folder, tiny_model_folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=r"lies inside the folder of cases\. Fix: name one outside it"):
        evaluate_folder(folder, folder / "results", CONFIG, model=tiny_model_folder)
    assert sorted(folder.rglob("*")) == before


def test_a_case_that_fails_is_reported_and_the_lock_released(two, folder, tiny_model_folder, tmp_path):
    (tmp_path / "results" / two[0].result_name).mkdir(parents=True)
    how = {"model": tiny_model_folder, "tissue": "given", "say": lambda line: None}
    with pytest.raises(InputError, match=r"1 of 2 cases failed; .*is a directory"):
        evaluate_folder(folder, tmp_path, QUICK, **how)
    assert not FolderLock._held and not (tmp_path / "table.md").exists()


# ---- more laws


def test_methods_stand_in_the_order_of_their_scores_whatever_that_of_the_rows():
    many = [rows_of(f"of {psnr}", {"a0": (psnr, 0.5)}) for psnr in (9, 100, -3, 31)]
    lines = methods_table(pd.DataFrame([*HARMONIC[:1], *(row for rows in many for row in rows)]))
    assert [line[0] for line in lines] == ["method", "of 100", "of 31", "harmonic", "of 9", "of -3"]


def test_each_case_has_its_own_column():
    assert cases_table(pd.DataFrame([*HARMONIC, *PROPOSED])) == [
        ["method", "a0", "a1", "b0"],
        ["harmonic", "20.00, 0.500", "22.00, 0.700", "30.00, 0.800"],
        ["proposed", "24.00, 0.700", "22.00, 0.700", "31.00, 0.900"],
    ]


def test_a_folder_without_the_truth_has_nothing_to_score(folder, tiny_model_folder, tmp_path):
    blind = shutil.copytree(folder, tmp_path / "blind", ignore=shutil.ignore_patterns("*-t1n.nii.gz"))
    with pytest.raises(InputError, match="t1n"):
        evaluate_folder(blind, tmp_path / "out", CONFIG, model=tiny_model_folder)
