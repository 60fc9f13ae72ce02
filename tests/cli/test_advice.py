"""Every option that a message names exists in the commands that print it."""

import ast
import re
from pathlib import Path

import pytest

from ldm_lib.__main__ import main
from ldm_lib.cli.arguments import ARGUMENTS
from ldm_lib.experiment import runner
from ldm_lib.experiment.stages import AuditConfig

LIBRARY = Path(__file__).parents[2] / "ldm_lib"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHER_COMMAND = re.compile(r"`[^`]*`?|[^`]*`$")  # it names the command that has the option
READERS = ("run", "inpaint", "submission", "prior", "validate", "evaluate", "score", "cohort")
# Commands without such an input, which never print the message.
WITHOUT = {
    "--mask-labels": {"cohort"}, "--resample-mask": {"cohort"}, "--skull-strip": {"cohort", "score"},
    "--patients": {"inpaint", "submission", "prior", "score", "cohort"},
    **dict.fromkeys(("--growth", "--seed-mm", "--segmentation"), {*READERS} - {"prior"}),
}  # fmt: skip


def options(command):
    given = [one for each in ARGUMENTS[command] for one in (each if isinstance(each, list) else [each])]
    return {name for name, _ in given}


def named():
    """Option -> where a message about an image, a case or a map names it."""
    found = {}
    for room in ("images", "anatomy", "data", "inpainting"):
        for path in sorted((LIBRARY / room).glob("*.py")):
            tree = ast.parse(path.read_text())
            documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
            docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented)
                    and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                    for option in OPTION.findall(OTHER_COMMAND.sub("", node.value)):
                        found.setdefault(option, []).append(f"{path.stem}:{node.lineno}")
    return found


@pytest.mark.parametrize("option", sorted(named()))
def test_commands_that_read_cases_have_the_options_of_their_messages(option):
    lacking = {command for command in READERS if option not in options(command)}
    assert lacking <= WITHOUT.get(option, set()), named()[option]


def test_the_known_advice_is_found():
    assert {"--assume-orientation", "--nan-as-zero", "--mask-labels", "--resample-mask", "--patients"} <= {*named()}


@pytest.mark.parametrize(
    ("words", "parameter", "value"),
    [
        (["--assume-orientation", "LPS"], "assume_orientation", "LPS"),
        (["--mask-labels", "1,2"], "mask_labels", "1,2"),
        (["--nan-as-zero"], "nan_as_zero", True),
        (["--resample-mask"], "resample_mask", True),
        (["--skull-strip"], "skull_strip", True),
        (["--patients", "p.csv"], "patients_file", "p.csv"),
    ],
)
def test_run_takes_them_as_parameters_of_its_notebooks(monkeypatch, tmp_path, words, parameter, value):
    asked = {}
    monkeypatch.setattr(runner, "run_stages", lambda stages, **given: asked.update(given) or tmp_path)
    assert main(["run", "01", "--run", "lab", "--preset", "smoke", *words]) == 0
    assert asked["overrides"] == {parameter: value} and parameter in AuditConfig.model_fields
    assert main(["run", "01", "--run", "lab", "--preset", "smoke"]) == 0 and asked["overrides"] == {}
