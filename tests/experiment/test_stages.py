"""Parameters: what is rejected, what is converted, and that a notebook's parameters cell matches its model."""

import ast
from contextlib import nullcontext

import nbformat.v4 as nbf
import pytest
from papermill.inspection import _infer_parameters
from papermill.translators import PythonTranslator

from ldm_lib.diffusion import samplers
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.errors import ConfigError
from ldm_lib.experiment.presets import PRESETS, require_fit, resolve
from ldm_lib.experiment.stages import STAGES, parameter_groups, parameters_cell, stage_name
from ldm_lib.options import integers, safe_name

FIRST = {name: stage for stage, model in reversed(STAGES.items()) for name in model.model_fields}
NUMBERS = [(stage, name) for stage, model in STAGES.items() for name, field in model.model_fields.items()
           if type(field.default) in (int, float)]  # fmt: skip
CODE_AS_NAME = 'x=1\nimport os;os.system("touch PWNED")\ny'


@pytest.mark.parametrize(
    ("given", "intended"),
    [("max_epoch", "max_epochs"), ("lr_learning_rate", "learning_rate"), ("batchsize", "batch_size"), ("sed", "seed")],
)
def test_an_unknown_name_is_rejected_with_the_nearest(given, intended):
    with pytest.raises(ConfigError, match=f"unknown parameter '{given}'.*did you mean '{intended}'"):
        resolve("coarse", overrides={given: "1"})
    stage = FIRST[intended]
    with pytest.raises(ConfigError, match=f"unknown parameter '{given}'.*did you mean '{intended}'"):
        STAGES[stage].parse({given: 1})


def test_a_cohort_has_one_source():
    assert resolve("coarse", overrides={"brains_dir": "people"})["01_data_audit"].data_dir == ""
    with pytest.raises(
        ConfigError, match=r"data_dir and brains_dir are both given, .*; leave one of them empty\. Fix: see"
    ):
        resolve("coarse", overrides={"brains_dir": "people", "data_dir": "cases"})


def test_a_name_far_from_all_refers_to_the_list_of_parameters():
    with pytest.raises(ConfigError, match=r"unknown parameter 'qqqqqq'.*see `ldm params 01`"):
        resolve("coarse", overrides={"qqqqqq": "1"})


def test_a_parameter_name_that_is_code_is_rejected():
    with pytest.raises(ConfigError, match="unknown parameter 'x=1"):
        resolve("coarse", overrides={CODE_AS_NAME: "1"})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_epochs", "many", "integer from 1 to 100,000,000"),
        ("max_epochs", "2.5", "integer from 1 to 100,000,000"),
        ("learning_rate", "fast", "number above 0 to 1"),
        ("overwrite", "perhaps", "true, false"),
        ("sampler", "heun", r"ddpm, ddim, dpm\+\+2m, euler, midpoint"),
        ("device", "gpu", "auto, cpu, cuda"),
        ("channels", "16;32", "positive integers separated by commas"),
        ("channels", "16,0", "positive integers separated by commas"),
        ("channels", "16,²", "positive integers separated by commas"),
        ("channels", "", "positive integers separated by commas"),
        ("data_dir", 7, "text"),
    ],
)
def test_a_wrong_type_is_reported_with_the_expected_one(name, value, expected):
    with pytest.raises(
        ConfigError, match=rf"^{name} = .*: allowed: {expected}.* Fix: see `ldm params {FIRST[name][:2]}`"
    ):
        resolve("coarse", overrides={name: value})


@pytest.mark.parametrize(("stage", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400"])
def test_no_number_may_be_infinite_undefined_or_negative(stage, name, value):
    with pytest.raises(ConfigError, match=rf"^{name} = '"):
        STAGES[stage].parse({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0), ("max_epochs", 0), ("samples", 0), ("learning_rate", 0), ("learning_rate", 1.1),
        ("seed", 2**40), ("seed", 2**31), ("validation_fraction", 0), ("validation_fraction", 1), ("spacing_mm", 0.5),
        ("spacing_mm", 9), ("synthetic_patients", 1), ("masks_per_patient", 9), ("mask_dilation", 5), ("dropout", 1),
        ("ema_decay", 1), ("growth_threshold", 1.01), ("beta_end", 1), ("diffusion_steps", 1), ("gradient_clip", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_rejected_with_the_limit(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} = {value}: allowed: (integer|number) (from|above) [0-2]"):
        STAGES[FIRST[name]].parse({name: value})


@pytest.mark.parametrize(
    ("name", "low", "high"), [("seed", 0, 2**31 - 1), ("spacing_mm", 1, 8), ("mask_dilation", 0, 4)]
)
def test_limits_themselves_are_allowed(name, low, high):
    for value in (low, high):
        assert getattr(STAGES[FIRST[name]].parse({name: value}), name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_start": 0.03}, r"^beta_start = 0.03: above beta_end = 0.02"),
        ({"multipliers": "1,2"}, r"^attention_rates = '4': multipliers '1,2' leave \[1, 2\]"),
        ({"attention_rates": "3"}, r"^attention_rates = '3': multipliers '1,2,4' leave \[1, 2, 4\]"),
        ({"prediction": "flow"}, "^prediction = 'flow': with schedule 'linear'; either both are flow or neither"),
        ({"schedule": "flow"}, "^prediction = 'velocity': with schedule 'flow'; either both are flow or neither"),
        ({"num_inference_steps": 9, "diffusion_steps": 8}, "^num_inference_steps = 9: above diffusion_steps = 8"),
        ({"allow_change": "learning_rate, speed"}, "^allow_change = .*: speed is no parameter"),
        ({"crop": 7}, "^crop = 7: a latent voxel is 2 voxels wide, an axis of a crop needs at least 4"),
        ({"crop": 63, "input_transform": "haar", "channels": "8,8,8"}, "^crop = 63: a latent voxel is 16 voxels wide"),
        ({"crop": 64}, "^final_crop = 48: must be at least crop = 64"),
        ({"learned": "none", "linear_start": False}, "^learned = 'none': needs linear_start"),
    ],
)
def test_inconsistent_parameters_are_rejected_at_once(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve("coarse", overrides=values)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4), ("overwrite", "true", True), ("overwrite", "no", False),
        ("overwrite", "1", True), ("use_mlflow", "False", False), ("max_epochs", "3", 3),
        ("precision", "32", "32"), ("show_case", "00012", "00012"), ("show_case", "NO", "NO"),
        ("channels", "8,16", "8,16"), ("seed", "0", 0),
    ],
)  # fmt: skip
def test_text_of_the_command_line_is_converted(name, text, value):
    found = getattr(resolve("coarse", overrides={name: text})[FIRST[name]], name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/abs/x", "a/b", "a\\b", "..", ".", ".hidden", "-x", "x\n", "x y", "x;ls", "$(ls)", "é", "", "a" * 300],
)
def test_names_that_are_no_file_names_are_rejected(name):
    with pytest.raises(ConfigError, match=r"^run = .*letters, digits"):
        resolve("coarse", overrides={"run": name})
    with pytest.raises(ValueError, match="letters, digits"):
        safe_name(name)


@pytest.mark.parametrize("name", ["lab", "BraTS2021_00000", "BraTS-GLI-00000-000", "a" * 128, "1.5mm"])
def test_names_that_are_file_names_are_kept(name):
    assert safe_name(name) == name


def test_unknown_preset_and_stage_name_the_nearest():
    with pytest.raises(
        ConfigError,
        match=r"no preset 'smok'; there are smoke, demo, coarse, full, weights, people.*did you mean 'smoke'",
    ):
        resolve("smok")
    with pytest.raises(ConfigError, match=r"no stage '04_trainig'.*did you mean '04_training'"):
        stage_name("04_trainig")
    for text in ("7", "0", "", "00", "04_"):
        with pytest.raises(ConfigError, match="no stage"):
            stage_name(text)
    assert [stage_name(text) for text in ("4", "04", "04_training")] == ["04_training"] * 3


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_resolves_to_its_values_and_defaults_elsewhere(preset):
    configs = resolve(preset)
    assert set(PRESETS[preset]) <= set(FIRST), "a preset's key that no stage has"
    for stage, model in STAGES.items():
        expected = {name: PRESETS[preset].get(name, field.default) for name, field in model.model_fields.items()}
        assert configs[stage].model_dump() == expected


def test_defaults_are_within_their_limits():
    for model in STAGES.values():
        model(**{name: field.default for name, field in model.model_fields.items()})


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("run", "other"), ("num_inference_steps", 3), ("precision", "16")]
)
def test_an_override_reaches_every_stage_that_has_it(name, value):
    configs = resolve("smoke", {name: value})
    having = [stage for stage, model in STAGES.items() if name in model.model_fields]
    assert len(having) > 1
    assert [getattr(configs[stage], name) for stage in having] == [value] * len(having)


def test_configurations_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        resolve()["04_training"].seed = 1


def test_integers():
    assert integers("32, 64,128") == (32, 64, 128)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_cell_executed_gives_the_defaults(stage):
    source, model = parameters_cell(STAGES[stage]), STAGES[stage]
    space = {}
    exec(source, {"__builtins__": {"str": str, "int": int, "float": float, "bool": bool}}, space)  # noqa: S102
    space.pop("__annotations__", None)
    assert space == model().model_dump()
    assert all(type(space[name]) is type(value) for name, value in model().model_dump().items())
    statements = ast.parse(source).body
    assert all(isinstance(s, ast.AnnAssign) and isinstance(s.value, ast.Constant) for s in statements)
    assignments = [line for line in source.splitlines() if line and not line.startswith("# ")]
    assert len(assignments) == len(statements), "one parameter a line"
    assert all(line.count("=") == 1 and "|" not in line for line in assignments)


@pytest.mark.parametrize("stage", STAGES)
def test_papermill_reads_every_parameter_with_type_and_description(stage):
    cell = nbf.new_code_cell(parameters_cell(STAGES[stage]), metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    found = _infer_parameters(nbf.new_notebook(cells=[cell], metadata=kernel))
    fields = STAGES[stage].model_fields
    assert [p.name for p in found] == [name for _, names in parameter_groups(STAGES[stage]) for name in names]
    assert [p.inferred_type_name for p in found] == [type(fields[p.name].default).__name__ for p in found]
    assert all(ast.literal_eval(p.default) == fields[p.name].default for p in found)
    assert all(p.help.startswith(fields[p.name].description) for p in found)


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_stands_in_one_group_under_a_heading(stage):
    groups = list(parameter_groups(STAGES[stage]))
    assert sorted(name for _, names in groups for name in names) == sorted(STAGES[stage].model_fields)
    assert groups[0] == ("Run", ["run", "overwrite", "seed"]) and all(heading for heading, _ in groups)


@pytest.mark.parametrize("value", ['"; import os; x="', "a'b\\n", "line\nimport os", "é ü {run} $(ls)", '\\"; os #'])
def test_a_parameters_value_stays_a_value_in_the_notebook(value):
    config = resolve("coarse", overrides={"data_dir": value})["01_data_audit"]
    source = PythonTranslator.codify(config.model_dump())
    assert all(isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant) for s in ast.parse(source).body)
    space = {}
    exec(source, {"__builtins__": {}}, space)  # noqa: S102 - what it does is tested
    assert space == config.model_dump()


@pytest.mark.parametrize(("changes", "rejected"), [
    ({"sampler": "midpoint"}, True), ({"sampler": "ddpm"}, False), ({"sampler": "dpm++2m"}, False),
    ({"sampler": "ddpm", "prediction": "flow", "schedule": "flow"}, True),
    ({"sampler": "euler", "prediction": "flow", "schedule": "flow"}, False),
])  # fmt: skip
def test_an_unsuitable_sampler_is_rejected_before_training(changes, rejected):
    configs = resolve("coarse", changes)
    with pytest.raises(ConfigError, match="take dpm") if rejected else nullcontext():
        require_fit(configs)


@pytest.mark.parametrize("schedule", ["linear", "flow"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_check_before_training_agrees_with_the_samplers(sampler, schedule):
    flow = {"prediction": "flow", "schedule": "flow"} if schedule == "flow" else {}
    supported = sampler in samplers.samplers_for(noise_schedule(schedule))
    with nullcontext() if supported else pytest.raises(ConfigError, match="take dpm"):
        require_fit(resolve("coarse", flow | {"sampler": sampler}))
