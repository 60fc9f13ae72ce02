"""The command line: exit statuses, one line per error, and no heavy import where none is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heavy import heavy_imports
from scipy import ndimage

from ldm_lib.__main__ import main
from ldm_lib.cli.arguments import ARGUMENTS
from ldm_lib.cli.options import joined
from ldm_lib.diffusion.samplers import SAMPLERS
from ldm_lib.errors import ConfigError, RunError
from ldm_lib.evaluation.metrics import brats_scores
from ldm_lib.experiment import runner
from ldm_lib.experiment.run_folder import OUTPUTS_VARIABLE
from ldm_lib.experiment.stages import STAGES, parameter_groups
from ldm_lib.images.options import ReadOptions
from ldm_lib.inpainting.options import InpaintOptions

pytestmark = pytest.mark.usefixtures("outputs")
LPS = np.diag([-1.0, -1, 1, 1])
INPAINT = ["inpaint", "--t1n-voided", "v", "--mask", "m", "--output", "o"]


def save(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, LPS)
    image.set_sform(LPS, 1)
    image.set_qform(LPS, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


@pytest.fixture
def cases(tmp_path):
    """Three small patients in the training layout: folder and the files of each."""
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 22, 20), np.uint8)
    mask[8:13, 8:13, 8:13] = 1
    files = {}
    for name in ("P0", "P1", "P2"):
        brain = np.zeros(mask.shape, np.int16)
        brain[3:21, 3:19, 3:17] = rng.integers(200, 900, (18, 16, 14))
        folder = tmp_path / "data" / name
        files[name] = {
            "t1n": save(folder / f"{name}-t1n.nii.gz", brain),
            "voided": save(folder / f"{name}-t1n-voided-0000.nii.gz", brain * (1 - mask)),
            "mask": save(folder / f"{name}-mask-0000.nii.gz", mask),
            "healthy": save(folder / f"{name}-mask-healthy-0000.nii.gz", mask),
        }
    return files


def score_arguments(files, prediction):
    return ["score", "--prediction", str(prediction), "--target", str(files["t1n"]), "--voided", str(files["voided"]),
            "--mask-healthy", str(files["healthy"])]  # fmt: skip


def usage_error(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


def error_line(arguments, capsys):
    """The one line of an error."""
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ERROR ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["inpaint", "--mask", "m"], "required: --output"),
        (["inpaint", "--mask", "m", "--output", "o"], "one of the arguments --t1n-voided --data is required"),
        (["inpaint", "--t1n-voided", "v", "--output", "o"], "--t1n-voided needs --mask"),
        (["inpaint", "--t1n-voided", "v", "--data", "d", "--output", "o"], "not allowed with argument"),
        (["inpaint", "--data", "d", "--mask", "m", "--output", "o"], "--growth, --tissue and --brain-mask go with"),
        ([*INPAINT, "--conditioning-dir", "c"], "takes no --conditioning-dir"),
        ([*INPAINT, "--sampler", "heun"], "invalid choice: 'heun'"),
        ([*INPAINT, "--steps", "x"], "invalid int value: 'x'"),
        (["export", "model"], "required: --output"),
        (["export", "--to", "onnx", "--output", "o"], "invalid choice: 'onnx'"),
        (["run", "--unknown"], "unrecognized arguments: --unknown. Fix: see `python -m ldm_lib run --help`."),
        (["--unknown"], "Fix: see `python -m ldm_lib --help`."),
        (["ship", "folder"], "no command 'ship': it is called `export` since version 0.8"),
        (["bench"], "no command 'bench': run `python -m benchmarks` in the repository"),
    ],
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments, message, capsys):
    printed = usage_error(arguments, capsys)
    assert message in printed and printed.count("\n") == 1 and "--help`." in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--set", "max_epoch=1"], "ERROR unknown parameter 'max_epoch'. Fix: did you mean 'max_epochs'?"),
        (["run", "--set", "max_epochs"], "ERROR --set max_epochs: not KEY=VALUE. Fix: write for example --set max_epo"),
        (["run", "--set", "seed=1", "--set", "seed=2"], "ERROR --set seed is given twice, '1' and '2'. Fix: keep one."),
        (["run", "--preset", "huge"],
         "ERROR no preset 'huge'; there are smoke, demo, coarse, full, weights, people. Fix: give one of them."),
        (["run", "09"], f"ERROR no stage '09'; there are {', '.join(STAGES)}. Fix: give one of them."),
        (["compare", "a", "b"], f"ERROR no stage 'a'; there are {', '.join(STAGES)}. Fix: give one of them."),
        (["export", "m", "--output", "o", "--temperature", "9"],
         "ERROR temperature = 9.0: allowed: number from 0 to 2. Fix: give an allowed value."),
        (["prior", *INPAINT[1:5], "--tissue", "t", "--growth", "g"],
         "ERROR growth: a growth map needs an output and one start. Fix: give --growth with either --seed-mm or --seg"),
        (["run", "--run", "../x"], "ERROR run = '../x': allowed: letters, digits, "),
        (["run", "--set", "variety=wide"], "ERROR unknown parameter 'variety'. Fix: it is called 'domain_rand"),
        (["run", "--set", "strategy=fsdp"], "ERROR unknown parameter 'strategy'. Fix: remove it: "),
        ([*INPAINT, "--steps", "0"], "ERROR --steps 0: allowed: integer from 1 to 100,000,000. Fix: see `ldm"),
        ([*INPAINT, "--mask-labels", "a"], "ERROR --mask-labels 'a': allowed: empty, or positive integers separated"),
        (["evaluate", "d", "--output", "o", "--samples", "0"], "ERROR --samples 0: allowed: integer from 1 to 10,000."),
        (["prior", *INPAINT[1:5], "--tissue", "t", "--ratio", "0"], "ERROR --ratio 0.0: allowed: number above 0"),
        (["params", "9"], "ERROR no stage '9'; there are "),
        (["validate", "nowhere"], "ERROR nowhere: no such folder. Fix: "),
        (["validate", ".", "--json", "nowhere/a.json"], "ERROR nowhere/a.json: its folder does not exist. Fix: "),
    ],
)  # fmt: skip
def test_an_error_is_status_1_and_one_line(arguments, line, capsys, outputs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert error_line(arguments, capsys).startswith(line)
    assert not outputs.exists()


def test_a_renamed_value_is_rejected_with_its_new_name(capsys):
    for old, new in (("context=draft", "initial_estimate"), ("tissue_map=true", "exact")):
        assert error_line(["run", "--set", old], capsys).endswith(f"Fix: it is called {new!r} since version 0.8.")


def test_debug_raises_the_error_itself():
    with pytest.raises(ConfigError, match="did you mean 'max_epochs'"):
        main(["--debug", "run", "--set", "max_epoch=1"])


def test_an_existing_run_is_continued_with_its_own_preset(monkeypatch, tmp_path):
    """The messages that say which stage is missing name the run, not its preset."""
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path))
    received = {}
    monkeypatch.setattr(runner, "run_stages", lambda stages, **options: received.update(options) or Path("folder"))
    (tmp_path / "eye").mkdir()
    (tmp_path / "eye" / "config.json").write_text('{"preset": "smoke"}')
    for typed, preset in ((["--run", "eye"], "smoke"), (["--run", "new"], "demo"), (["--preset", "full"], "full")):
        assert main(["run", "02", *typed]) == 0 and received["preset"] == preset


def test_run_passes_on_stages_and_parameters(monkeypatch, capsys):
    received = {}
    monkeypatch.setattr(
        runner, "run_stages", lambda stages, **options: received.update(stages=stages, **options) or Path("folder")
    )
    typed = [
        "run",
        "4",
        "05_sampling",
        "--preset",
        "smoke",
        "--set",
        "data_dir=a=b c",
        "--set",
        " seed = 3",
        "--overwrite",
    ]
    assert main(typed) == 0
    assert received["stages"] == ["4", "05_sampling"]
    assert received["overrides"] == {"data_dir": "a=b c", "seed": "3", "overwrite": True}
    assert received["run"] == received["preset"] == "smoke"
    assert capsys.readouterr().out == f"report: {Path('folder/index.html')}\n"


@pytest.mark.parametrize(
    ("typed", "name"),
    [([], "demo"), (["--run", "a"], "a"), (["--set", "run=b"], "b"), (["--preset", "full", "--set", "run=b"], "b")],
)
def test_a_run_is_named_by_option_parameter_or_preset(typed, name, monkeypatch):
    received = {}
    monkeypatch.setattr(runner, "run_stages", lambda stages, **options: received.update(options) or Path("folder"))
    main(["run", *typed])
    assert received["run"] == name


def test_an_outputs_folder_that_cannot_be_written_is_rejected_at_the_start(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "file" / "outputs"))
    assert "demo: cannot be written (Not a directory). Fix: choose another" in error_line(["run"], capsys)


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "a/volume.nii.gz")

    monkeypatch.setattr(runner, "run_stages", full)
    assert error_line(["run"], capsys) == "ERROR a/volume.nii.gz: No space left on device."


@pytest.mark.parametrize(("words", "fix"), [
    (["run"], "it continues, finished stages are not repeated"),
    (["cohort", "--from", "a", "--output", "b"], "it continues, finished scans are not repeated"),
    (["inpaint", "--data", "a", "--output", "b"], "it continues, finished cases are not repeated"),
    (["evaluate", "a", "--output", "b"], "it continues, finished cases are not repeated"),
    (["inpaint", "--t1n-voided", "a", "--mask", "m", "--output", "b"], "it starts over"),
    (["score", "--prediction", "a", "--target", "a", "--voided", "a", "--mask-healthy", "a"], "it starts over"),
])  # fmt: skip
def test_ctrl_c_is_one_line_about_how_to_go_on(words, fix, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    interrupted.__name__, interrupted.__doc__ = words[0], "Stop."
    monkeypatch.setattr("ldm_lib.__main__.COMMANDS", [interrupted])
    assert main(words) == 130
    assert capsys.readouterr() == ("", f"ERROR stopped. Fix: give the same command again: {fix}.\n")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_quiet_keeps_results_and_errors_alone(place, monkeypatch, capsys):
    def stand_in(stages, *, progress, **_):
        progress("01_data_audit: running")
        return Path("folder")

    monkeypatch.setattr(runner, "run_stages", stand_in)
    words = ["run", "01"]
    assert main(words) == 0
    report_line = f"report: {Path('folder/index.html')}\n"
    assert capsys.readouterr() == (report_line, "01_data_audit: running\n")
    words.insert(place, "--quiet")
    assert main(words) == 0 and capsys.readouterr() == (report_line, "")
    assert main(["--quiet", "run", "--set", "seed"]) == 1 and capsys.readouterr().err.startswith("ERROR ")


def test_a_closed_pipe_is_no_error(monkeypatch):
    monkeypatch.setattr(
        sys, "stdout", types.SimpleNamespace(write=lambda text: (_ for _ in ()).throw(BrokenPipeError()))
    )
    assert main(["params", "04"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_params_prints_each_parameter(stage, capsys):
    assert main(["params", stage[:2], "--preset", "full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        name for _, names in parameter_groups(STAGES[stage]) for name in names
    ]
    assert lines[0] == "Run"


def test_sampling_options_are_parameters_with_the_same_choices_and_defaults(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        main(["inpaint", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{{{','.join(SAMPLERS)}}}" in printed
    for name in ("guidance", "temperature", "blend_mm", "precision", "num_inference_steps"):
        assert InpaintOptions.model_fields[name].description in printed
    received = {}
    stand_in = types.SimpleNamespace(inpaint=lambda *_, **options: received.update(options) or [])
    monkeypatch.setitem(sys.modules, "ldm_lib.inpainting.single_file", stand_in)
    assert main([*INPAINT, "--seed", "3", "--precision", "bf16"]) == 0
    expected = InpaintOptions(samples=1, seed=3, precision="bf16").model_dump()
    expected["n_samples"] = expected.pop("samples")
    assert {name: received[name] for name in expected} == expected
    assert received["read_options"] == ReadOptions()


def test_validate_accepts_good_cases(cases, tmp_path, capsys):
    assert main(["validate", str(tmp_path / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2].rstrip(":") for line in lines[:-1]] == ["P0-0000", "P1-0000", "P2-0000"]
    assert lines[-1] == "3 cases: 3 usable (3 with warnings), 0 rejected"


def test_the_folder_of_one_patient_is_not_the_folder_of_cases(cases, tmp_path, capsys):
    line = error_line(["validate", str(tmp_path / "data" / "P0")], capsys)
    assert line.endswith("Fix: give the folder above this one, which is of one patient.")


def test_a_folder_above_that_of_the_cases_is_told_where_they_are(cohort_folder, tmp_path, capsys):
    shutil.copytree(cohort_folder, tmp_path / "above" / "cases" / "data")
    assert main(["validate", str(tmp_path / "above" / "cases")]) == 1
    assert "Fix: give the folder data, one level down: its folders are the cases." in capsys.readouterr().out


def test_validate_reports_every_invalid_case_in_one_pass(cases, tmp_path, capsys):
    cases["P0"]["voided"].write_bytes(b"")
    content = cases["P2"]["mask"].read_bytes()
    cases["P2"]["mask"].write_bytes(content[: len(content) // 2])
    (tmp_path / "data" / "bad id").mkdir()
    findings = tmp_path / "findings.json"
    assert main(["validate", str(tmp_path / "data"), "--json", str(findings)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert sorted(line.split()[1] for line in lines[:-1]) == ["ERROR", "ERROR", "ERROR", "WARNING"]
    assert lines[-1] == "4 cases: 1 usable (1 with warnings), 3 rejected"
    rows = {row["case"]: row for row in json.loads(findings.read_text())}
    assert {key: row["status"] for key, row in rows.items()} == {
        "'bad id'": "refused", "P0-0000": "refused", "P1-0000": "warning", "P2-0000": "refused"
    }  # fmt: skip
    empty = "P0/P0-t1n-voided-0000.nii.gz: empty (0 bytes). Fix: download it again."
    assert rows["P0-0000"]["reason"] == empty, "named from the data folder on"
    assert "P2-mask-0000.nii.gz" in rows["P2-0000"]["reason"]


def test_score_prints_the_scores_of_metrics(cases, tmp_path, capsys):
    files = cases["P0"]
    target, voided, healthy = (np.asarray(nib.load(files[k]).dataobj) for k in ("t1n", "voided", "healthy"))
    prediction = np.where(healthy, 500, target).astype(np.int16)
    path = save(tmp_path / "prediction.nii.gz", prediction)
    assert main(score_arguments(files, path)) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = brats_scores(prediction, target, voided, healthy)
    assert list(printed) == list(expected)
    assert {k: float(v) for k, v in printed.items()} == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["mse"] < 1


def test_help_validate_score_and_params_load_nothing_heavy(cases, tmp_path):
    """Commands that need no network start at once; one process runs them all, so that it is imported once."""
    commands = [["--help"], *([name, "--help"] for name in ARGUMENTS), ["params", "04"],
                ["validate", str(tmp_path / "data")], score_arguments(cases["P0"], cases["P0"]["t1n"]),
                ["compare", "01", "nowhere"],
                ["submission", "--data", str(tmp_path / "data"), "--results", str(tmp_path)]]  # fmt: skip
    printed, loaded = heavy_imports(commands)
    assert "3 cases: 3 usable" in printed and "ssim     1" in printed
    assert not any(loaded)


def test_the_module_runs_as_a_command():
    environment = {**os.environ, OUTPUTS_VARIABLE: "nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", "ldm_lib", "params", "77"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ERROR no stage '77'") and done.stderr.count("\n") == 1


@pytest.fixture
def scan(cohort_folder, tmp_path, fast_registration):
    """The arguments of `prior` for a small case, and a point in its white matter, mm; registrations are shortened."""
    from ldm_lib.data.case import load_case
    from ldm_lib.data.cohort import find_cases

    case = find_cases(cohort_folder)[0]
    data = load_case(case)
    depth = ndimage.distance_transform_edt((data.tissue == 3) & ~data.mask)
    seed = data.source.affine @ [*np.unravel_index(depth.argmax(), depth.shape), 1]
    words = ["prior", "--t1n-voided", str(case.t1n_voided), "--mask", str(case.mask),
             "--tissue", str(tmp_path / "t.nii.gz")]  # fmt: skip
    with fast_registration():
        yield words, ",".join(f"{v:g}" for v in seed[:3])


def test_prior_makes_both_maps_and_then_finds_them(scan, tmp_path, capsys):
    words, seed = scan
    words = [*words, "--growth", str(tmp_path / "g.nii.gz"), "--seed-mm", seed, "--days", "150"]
    assert seed.startswith("-")  # argparse would take it for an option
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "t.nii.gz: made (brain_dice 0.9" in first and "g.nii.gz: made (visible_ml " in first
    assert main(words) == 0
    assert "t.nii.gz: found (" in (again := capsys.readouterr().out) and "g.nii.gz: found (" in again
    settings = json.loads((tmp_path / "g.json").read_text())["settings"]
    assert settings["days"] == 150 and ",".join(f"{v:g}" for v in settings["seed_mm"]) == seed


@pytest.mark.parametrize(("seed", "message"), [
    ("0,0,500", r"ERROR seed: \(0, 0, 500\) mm is voxel .*, outside white and grey matter\. Fix: give x,y,z in mm"),
    ("nan,0,0", r"ERROR --seed-mm nan,0,0: not three numbers\. Fix: write for example"),
    ("1,2", r"ERROR --seed-mm 1,2: not three numbers\. Fix: write for example"),
])  # fmt: skip
def test_an_invalid_seed_point_is_rejected_in_one_line(scan, tmp_path, capsys, seed, message):
    assert main([*scan[0], "--growth", str(tmp_path / "g.nii.gz"), "--seed-mm", seed]) == 1
    assert re.fullmatch(message + r"[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "g.nii.gz").exists()


def test_a_failed_registration_leaves_a_figure_and_no_map(scan, tmp_path, capsys, monkeypatch):
    from ldm_lib.anatomy import registration

    monkeypatch.setattr(registration, "MIN_DICE", 1.01)
    assert main(scan[0]) == 1
    pattern = r"ERROR .*: the atlas does not fit: brains overlap by Dice 0\.\d+ .* Fix: see .*-refused\.png"
    assert re.search(pattern, capsys.readouterr().err)
    assert (tmp_path / "t-refused.png").stat().st_size > 10_000 and not (tmp_path / "t.nii.gz").exists()


def test_an_empty_value_stays_an_argument():
    """`make` passes an empty --conditioning-dir when there is none."""
    words = ["validate", "D", "--conditioning-dir", "", "--seed-mm", "-1,2,3"]
    assert joined(words) == ["validate", "D", "--conditioning-dir", "", "--seed-mm=-1,2,3"]
    assert joined(["--seed-mm"]) == ["--seed-mm"]


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(runner, "run_stages", lambda *_, **__: [][0])
    with pytest.raises(IndexError, match="out of range"):
        main(["run"])


def test_an_error_of_the_runner_is_status_1(monkeypatch, capsys):
    def locked(*_, **__):
        raise RunError("locked by pid 7 since noon", where="lab", fix="wait for it")

    monkeypatch.setattr(runner, "run_stages", locked)
    assert error_line(["run"], capsys) == "ERROR lab: locked by pid 7 since noon. Fix: wait for it."


def test_score_rejects_another_grid(cases, tmp_path, capsys):
    path = save(tmp_path / "prediction.nii.gz", np.ones((4, 4, 4), np.int16))
    assert "prediction.nii.gz" in error_line(score_arguments(cases["P0"], path), capsys)


def test_the_library_and_the_command_line_start_quickly():
    """Ratios to importing numpy and nibabel, the best of three each, measured in turns on the same machine."""
    scripts = {"base": "import numpy, nibabel", "library": "import ldm_lib", "command": "import ldm_lib.__main__"}
    seconds = {name: [] for name in scripts}
    for _ in range(3):
        for name, script in scripts.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", script], check=True)
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    assert best["library"] < 0.5 * best["base"] and best["command"] < 2 * best["base"], best
