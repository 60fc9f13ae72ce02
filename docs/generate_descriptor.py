"""Write docs/nipoppy/ from the parser of `ldm inpaint`: `python docs/generate_descriptor.py`.

descriptor.json is the Boutiques descriptor of the command; with the other files the folder is a processing pipeline of
nipoppy, which inpaints the BIDS data set of a study.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ldm_lib.__main__ import COMMANDS
from ldm_lib.cli.arguments import ARGUMENTS
from ldm_lib.cli.options import build_parser
from ldm_lib.version import __version__

FOLDER = Path(__file__).with_name("nipoppy")
NAME, COMMAND = "brain-mri-inpainting", "inpaint"
PATHS = ("F", "DIR")  # metavars of what must be there
# What the command checks itself: with one file go its mask and its maps, with a folder a folder of maps.
NEEDS = {"t1n_voided": ["mask"], "conditioning_dir": ["data"],
         **{name: ["t1n_voided"] for name in ("mask", "growth", "tissue", "brain_mask")}}  # fmt: skip
SUBJECT, SESSION = "[[NIPOPPY_BIDS_PARTICIPANT_ID]]", "[[NIPOPPY_BIDS_SESSION_ID]]"


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    commands = next(each for each in build_parser(COMMANDS, ARGUMENTS)._actions if each.choices)
    return commands.choices[COMMAND]


def described(action: argparse.Action) -> list[dict[str, Any]]:
    """Return the inputs of an option, one for each of its flags if it has several that mean different things."""
    flags = action.option_strings if isinstance(action, argparse.BooleanOptionalAction) else action.option_strings[:1]
    found = []
    for flag in flags:
        id = flag[2:].replace("-", "_")
        given = {"id": id, "name": flag[2:], "description": action.help % vars(action), "optional": not action.required,
                 "command-line-flag": flag, "value-key": f"[{id.upper()}]"}  # fmt: skip
        if action.nargs == 0:
            given["type"] = "Flag"
        elif action.type in (int, float):
            given |= {"type": "Number", "integer": action.type is int}
        else:
            given["type"] = "File" if action.metavar in PATHS else "String"
        if action.choices:
            given["value-choices"] = list(action.choices)
        if id in NEEDS:
            given["requires-inputs"] = NEEDS[id]
        found.append(given)
    return found


def descriptor() -> dict[str, Any]:
    """Return the Boutiques descriptor of the command."""
    parser = command_parser()
    inputs = [given for action in parser._actions if action.dest != "help" for given in described(action)]
    groups = [
        {"id": "source", "name": "What is inpainted", "members": [each.dest for each in group._group_actions],
         "mutually-exclusive": True, "one-is-required": group.required}
        for group in parser._mutually_exclusive_groups
    ]  # fmt: skip
    switches = [[given["id"] for given in described(action)] for action in parser._actions if action.dest != "help"]
    groups += [{"id": ids[0] + "_or_not", "name": ids[0], "members": ids, "mutually-exclusive": True}
               for ids in switches if len(ids) > 1]  # fmt: skip
    return {
        "name": NAME,
        "tool-version": __version__,
        "schema-version": "0.5",
        "description": "Inpainting of 3D T1-weighted brain MRI by latent diffusion: a scan, a folder, a BIDS data set",
        "command-line": " ".join([f"ldm {COMMAND}", *(given["value-key"] for given in inputs)]),
        "inputs": inputs,
        "groups": groups,
        "output-files": [{"id": "result", "name": "result", "description": "a file, or a folder of results with --data",
                          "path-template": "[OUTPUT]", "optional": False}],
        "error-codes": [{"code": 1, "description": "Rejected or failed; the reason is one line"},
                        {"code": 2, "description": "Wrong usage"}],
        "tags": {"domain": ["neuroinformatics", "mri"]},
    }  # fmt: skip


def contents() -> dict[str, dict[str, Any]]:
    """Return the name of each file and what it holds."""
    step = {"DESCRIPTOR_FILE": "descriptor.json", "INVOCATION_FILE": "invocation.json", "ANALYSIS_LEVEL": "group",
            "TRACKER_CONFIG_FILE": "tracker.json", "GENERATE_PYBIDS_DATABASE": False}  # fmt: skip
    result = f"{SUBJECT}/{SESSION}/anat/{SUBJECT}_{SESSION}*_desc-inpainted_T1w.nii.gz"
    return {
        "descriptor.json": descriptor(),
        "invocation.json": {"data": "[[NIPOPPY_DPATH_BIDS]]", "output": "[[NIPOPPY_DPATH_PIPELINE_OUTPUT]]"},
        "tracker.json": {"SCHEMA_VERSION": "1.0", "PATHS": [result],
                         "PARTICIPANT_SESSION_DIR": f"{SUBJECT}/{SESSION}"},
        "config.json": {"NAME": NAME, "VERSION": __version__, "PIPELINE_TYPE": "processing", "SCHEMA_VERSION": "1.0",
                        "STEPS": [step]},
    }  # fmt: skip


def text(content: dict[str, Any]) -> str:
    """Return the text of a file."""
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in contents().items():
        (FOLDER / name).write_text(text(content))
