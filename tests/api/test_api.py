"""The public interface: visible names, types, time to import, examples that run, maps that are made and kept."""

import ast
import doctest
import inspect
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import ldm_lib as ldm
from ldm_lib import errors as ldm_errors
from ldm_lib.errors import InputError
from ldm_lib.files import sha256

REAL = Path(os.environ.get("LDM_REAL_DATA", "no real patients"))
NAMES = [name for name in ldm.__all__ if not name.endswith("Options")]
SLOW = {"train_denoiser"}


def test_names_are_seen_and_unknown_ones_are_not():
    assert set(dir(ldm)) == {*ldm.__all__, "__version__"} and len(ldm.__all__) == len(set(ldm.__all__))
    for name in ("metrics", "Inpaint", "_nothing"):
        with pytest.raises(AttributeError, match=f"module 'ldm_lib' has no attribute '{name}'"):
            getattr(ldm, name)
    assert import_module("ldm_lib.evaluation.metrics").brats_scores


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(ldm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert shown == {name: (f"ldm_lib.{module}", name) for name, module in ldm._MODULES.items()}


def test_importing_loads_nothing_and_a_name_only_its_own():
    code = """import sys, time
started = time.process_time()  # a busy machine changes the wall clock
import ldm_lib
assert time.process_time() - started < 0.1
assert {name for name in sys.modules if name.startswith("ldm_lib.")} == {"ldm_lib.version"}
ldm_lib.find_cases, ldm_lib.brats_metrics, ldm_lib.ReadOptions
assert not {"torch", "monai", "dipy", "pandas", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["TrainingOptions", "AutoencoderTrainingOptions", "ReadOptions"])
def test_help_of_options_lists_every_parameter(name):
    options = getattr(ldm, name)
    first, _, listed = inspect.getdoc(options).partition("\n\nAttributes:\n")
    assert first and "Attributes" not in first
    lines = dict(line.strip().split(": ", 1) for line in listed.splitlines())
    assert list(lines) == list(options.model_fields)
    for field, text in lines.items():
        assert text.endswith(f"default {getattr(options(), field)!r})")
    if name == "TrainingOptions":
        assert lines["keep_weights"] == "EMA weights to keep: last, or best val_loss ('last', 'best'; default 'last')"


# ---- examples


@pytest.fixture(scope="module")
def example_names(cohort_folder, tiny_model_folder, tmp_path_factory, cases):
    """What the examples may use without importing it: a cohort, a model folder, a folder, a loaded case, numpy."""
    return {"cohort": cohort_folder, "model": tiny_model_folder, "case": ldm.load_case(cases[0]), "np": np}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_every_public_name_has_an_example_that_runs(name, example_names, tmp_path, outputs, fast_registration, capsys):
    thing = getattr(ldm, name)
    names = vars(inspect.getmodule(thing)) | example_names | {"folder": tmp_path}
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    assert examples and examples[0].examples, f"{name} has no example"
    with fast_registration():
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples[0])
    assert not failed, capsys.readouterr().out


# ---- a session, as the documentation shows it

SESSION = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("```python\n")[2].partition("```")[0]


def session_holds(names: dict, folder: Path) -> None:
    case, result = names["case"], names["result"]
    files = sorted((folder / "filled").glob("*.nii.gz"))
    assert len(result.samples) == len(result.values) and len(files) == 3
    for volume in (result.mean, result.medoid, *result.samples, names["tumour"].mean):
        assert np.array_equal(volume[~case.mask], case.voided[~case.mask]) and np.isfinite(volume).all()
    assert not result.std[~case.mask].any() and result.std[case.mask].any()
    methods = set(names["table"]["method"])
    assert {"sample", "medoid sample", "upper bound", "harmonic", "mean intensity", "initial estimate"} <= methods
    assert len(names["table"]) == names["table"].groupby(["case", "method"]).ngroups


def test_the_example_works_on_a_synthetic_case(
    cohort_folder, tiny_initial_estimate_folder, tmp_path, monkeypatch, fast_registration
):
    """A case without maps, fewer steps and an untrained model."""
    data = shutil.copytree(cohort_folder, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with fast_registration():
        names = _session(data, tiny_initial_estimate_folder)
    session_holds(names, tmp_path)


def _session(data: Path, model: Path) -> dict:
    code = SESSION.replace("~/brats/data", str(data)).replace("Inpainter.load()", f"Inpainter.load({str(model)!r})")
    code = code.replace("cases[:20]", "cases[:2], num_inference_steps=1").replace(
        "n_samples=8", "n_samples=2, num_inference_steps=2"
    )
    names: dict = {}
    exec(compile(code, "docs/api.md", "exec"), names)  # noqa: S102
    return names


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real patients: name their folder in LDM_REAL_DATA")
def test_the_example_works_as_it_stands_on_a_real_case(tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(REAL / "TCGA-DU-7294", data / "TCGA-DU-7294", ignore=shutil.ignore_patterns("*000[02]*"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(SESSION.replace("~/brats/data", str(data)), "docs/api.md", "exec"), names)  # noqa: S102
    session_holds(names, tmp_path)


# ---- maps are made, kept and reported, whichever way a model is called


@pytest.fixture
def bare(cohort_folder, tmp_path):
    """A case that came without maps."""
    shutil.copytree(cohort_folder / "Synthetic_00000", tmp_path / "data" / "Synthetic_00000")
    return ldm.find_cases(tmp_path / "data")[0]


@pytest.fixture(scope="module")
def inpainter(tiny_initial_estimate_folder):
    return ldm.Inpainter.load(tiny_initial_estimate_folder, device="cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tissue_maps"


def registrations(monkeypatch, fast_registration):
    """Count registrations, each a short one."""
    from ldm_lib.anatomy import tissue_segmentation

    made, original = [], tissue_segmentation.tissue_from_scan
    monkeypatch.setattr(tissue_segmentation, "tissue_from_scan", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


def test_a_map_is_made_once_and_found_by_every_other_way(
    bare, cache, inpainter, tiny_initial_estimate_folder, tmp_path, monkeypatch, fast_registration, caplog
):
    made = registrations(monkeypatch, fast_registration)
    with fast_registration():
        first = inpainter(bare, num_inference_steps=1).mean
        assert len(made) == 1 and caplog.text.count("no tissue map given, made from the scan") == 1
        case = ldm.load_case(bare)
        assert case.tissue is None and np.array_equal(inpainter(case, num_inference_steps=1).mean, first)
        assert case.tissue.any() and "no tissue map" not in case.warnings
        output = ldm.inpaint(
            bare.t1n_voided,
            bare.mask,
            tmp_path / "one.nii.gz",
            model=tiny_initial_estimate_folder,
            num_inference_steps=1,
        )
        from ldm_lib.inpainting.folder import inpaint_folder
        from ldm_lib.inpainting.options import InpaintOptions

        options = InpaintOptions(samples=1, num_inference_steps=1)
        inpaint_folder(
            tmp_path / "data", tmp_path / "out", options, model=tiny_initial_estimate_folder, say=lambda line: None
        )
    assert sha256(output[0]) == sha256(tmp_path / "out" / bare.result_name) and len(made) == 2  # two masks
    assert cache.stat().st_mode & 0o77 == 0 and len(list(cache.glob("*.nii.gz"))) == 2
    with_map = case.with_maps(tissue=case.tissue)
    assert np.array_equal(inpainter(with_map, num_inference_steps=1).mean, first)


@pytest.mark.parametrize("where", ["file", "no home"])
def test_without_a_cache_the_result_is_the_same_and_one_line_says_so(
    where, bare, inpainter, tmp_path, monkeypatch, fast_registration, caplog
):
    with fast_registration():
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
        expected = inpainter(bare, num_inference_steps=1).mean
        if where == "file":
            (tmp_path / "file").touch()
            monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file"))
        else:
            monkeypatch.delenv("LDM_CACHE")
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home folder")))
        caplog.clear()
        assert np.array_equal(inpainter(bare, num_inference_steps=1).mean, expected)
    assert caplog.text.count("tissue maps are not kept") == 1


def test_a_damaged_map_is_made_again(bare, cache, inpainter, monkeypatch, fast_registration):
    made = registrations(monkeypatch, fast_registration)
    with fast_registration():
        first = inpainter(bare, num_inference_steps=1).mean
        (kept,) = cache.glob("*.nii.gz")
        kept.write_bytes(kept.read_bytes()[:-9])
        assert np.array_equal(inpainter(bare, num_inference_steps=1).mean, first) and len(made) == 2


def test_a_model_that_needs_no_map_makes_none(bare, cache, tiny_model_folder):
    ldm.Inpainter.load(tiny_model_folder, device="cpu")(bare, num_inference_steps=1)
    assert not cache.exists()


# ---- results


def test_a_result_is_saved_to_a_file_or_a_folder_and_never_over_an_input(bare, tiny_model_folder, tmp_path):
    result = ldm.Inpainter.load(tiny_model_folder, device="cpu")(bare, n_samples=2, num_inference_steps=1)
    written = result.save(tmp_path / "new" / "folder", samples=True)
    assert written[0] == tmp_path / "new" / "folder" / bare.result_name and len(written) == 5
    assert [path.name for path in result.save(tmp_path / "x.nii")] == ["x.nii", "x-std.nii", "x-nearest.nii"]
    with pytest.raises(InputError, match="is one of the inputs"):
        result.save(bare.t1n_voided)
    (tmp_path / "notes").write_text("kept")
    for name in ("x.txt", "x.nii.zip", "notes"):
        with pytest.raises(InputError, match=rf"{name}: is neither a folder nor named .*mgz or .mgh\. Fix: name a"):
            result.save(tmp_path / name)
    assert not (tmp_path / "x.txt").exists() and (tmp_path / "notes").read_text() == "kept"
    assert result.save(f"{tmp_path}/filled.2/")[0] == result.save(tmp_path / "filled.2")[0]


@pytest.mark.parametrize("supported", [True, False])
def test_one_seed_is_one_result_on_every_processor(supported, cases, tiny_model_folder, monkeypatch):
    """With the processor's bf16 probes forced on and off; inference on a CPU is float32 unless bf16 is named."""
    import torch

    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: supported, raising=False)
    inpainter = ldm.Inpainter.load(tiny_model_folder, device="cpu")
    exact = ldm.Inpainter.load(tiny_model_folder, device="cpu", precision="32")
    assert inpainter.model.precision == "32"
    assert np.array_equal(
        inpainter(cases[0], seed=3, num_inference_steps=2).mean, exact(cases[0], seed=3, num_inference_steps=2).mean
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ldm.load_case("folder"), "needs a case, not str. Fix: take one of find_cases"),
        (lambda: ldm.TrainingOptions(batch_sise=4), "unknown parameter 'batch_sise'. Fix: did you mean 'batch_size'"),
        (lambda: ldm.TrainingOptions(shipped_weights=True), "it is called 'pretrained' since version 0.8"),
        (
            lambda: ldm.TrainingOptions(batch_size=0),
            r"batch_size = 0: allowed: integer from 1 to 100,000,000. Fix: see `help\(ldm.TrainingOptions\)`",
        ),
        (lambda: ldm.TrainingOptions(wandb_mode="x"), r"'wandb_mode'. Fix: see `help\(ldm.TrainingOptions\)`"),
        (lambda: ldm.AutoencoderTrainingOptions(xyz=1), r"'xyz'. Fix: see `help\(ldm.AutoencoderTrainingOptions\)`"),
        (lambda: ldm.ReadOptions(mask_labels="a"), r"mask_labels = 'a': .* Fix: see `help\(ldm.ReadOptions\)`"),
    ],
)
def test_mistakes_in_python_are_explained_in_one_line(call, message):
    with pytest.raises(ldm_errors.LdmError, match=message):
        call()


def test_a_case_that_is_not_loaded_or_has_no_target_is_rejected(cases):
    with pytest.raises(InputError, match=r"is not loaded\. Fix: call load_case"):
        ldm.plot(cases[0])
    data = ldm.load_case(cases[0].to_inpaint())
    with pytest.raises(InputError, match=r"has no t1n to compare with\. Fix: give a case with its full image"):
        ldm.brats_metrics(data.voided, data)
    with pytest.raises(InputError, match="needs a case, not str"):
        ldm.brats_metrics(data.voided, "x")


@pytest.mark.parametrize("wrong", [{"steps": 3}, {"samples": 2}])
def test_a_wrong_name_is_a_type_error(cases, tiny_model_folder, wrong):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ldm.Inpainter.load(tiny_model_folder)(cases[0], **wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ldm.inpaint(cases[0].t1n_voided, cases[0].mask, "out.nii.gz", **wrong)


# ---- more laws


def test_another_mask_or_scan_is_another_map(bare, cache, tiny_initial_estimate_folder, fast_registration):
    from dataclasses import replace

    inpainter = ldm.Inpainter.load(tiny_initial_estimate_folder, device="cpu")
    case = ldm.load_case(bare)
    with fast_registration():
        inpainter(case, num_inference_steps=1)
        brighter = replace(case, voided=case.voided * np.float32(1.5), tissue=None)
        inpainter(brighter, num_inference_steps=1)
    assert len(list(cache.glob("*.nii.gz"))) == 2
