"""Build the parser of the command line; options that are parameters take default, choices and text from `Options`."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from ldm_lib.anatomy.options import GrowthRates
from ldm_lib.data.options import MadeCohortOptions, ReadOptions
from ldm_lib.errors import ConfigError
from ldm_lib.experiment.presets import DEFAULT_PRESET, PRESETS
from ldm_lib.files import PRETRAINED
from ldm_lib.inpainting.options import InpaintOptions, ResultOptions
from ldm_lib.options import Options
from ldm_lib.version import __version__

Command = Callable[[argparse.Namespace], int]
Argument = tuple[str, dict[str, Any]]  # an option and the arguments of argparse for it
AnyOptions = TypeVar("AnyOptions", bound=Options)
METAVARS = {int: "N", float: "X", str: "TEXT"}
# Parameters whose option has another name.
FLAGS = {"num_inference_steps": "steps", "diffusion_white_mm2_per_day": "diffusion", "diffusion_ratio": "ratio",
         "proliferation_per_day": "proliferation", "masks_per_patient": "masks"}  # fmt: skip
RENAMED_COMMANDS = {"ship": "it is called `export` since version 0.8",
                    "bench": "run `python -m benchmarks` in the repository"}  # fmt: skip


def arg(name: str, text: str, **settings: Any) -> Argument:
    """Describe an option, or a positional argument, that is no parameter."""
    return name, {"help": text} | settings


def parameters(model: type[Options], *names: str, **defaults: Any) -> list[Argument]:
    """Describe an option for each of these parameters of a model; `defaults` replace the model's own."""
    described = []
    for name in names:
        field = model.model_fields[name]
        default = defaults.get(name, field.default)
        text = str(field.description).replace("%", "%%")
        if isinstance(default, bool):
            settings: dict[str, Any] = {"action": "store_true"}
        elif choices := get_args(field.annotation):
            settings = {"choices": choices, "default": default}
        else:
            settings = {"type": type(default), "default": default, "metavar": METAVARS[type(default)]}
        shown = "" if isinstance(default, bool) or default == "" else f" (default: {default})"
        described.append(arg(flag(name), text + shown, dest=name, **settings))
    return described


def flag(name: str) -> str:
    """Return the option of a parameter, such as "--steps" of "num_inference_steps"."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


SCAN = "3D T1n, skull-stripped, .nii or .nii.gz"
CASES = "folder of cases: several masks per patient, or the BraTS challenge's layout"
MODEL = arg("--model", "model folder (default: the pretrained weights)", metavar="DIR")
MAPS = arg(
    "--conditioning-dir", "folder of growth and tissue maps (default: next to the data)", default="", metavar="DIR"
)
STAGE = arg("stage", "such as 04 or 04_training", metavar="STAGE")
SAMPLING = ("sampler", "num_inference_steps", "temperature", "seed", "device", "precision")
READING = ("assume_orientation", "nan_as_zero", "mask_labels")
# Command -> its options; a list of several options holds those of which only one may be given.
ARGUMENTS: dict[str, list[Argument | list[Argument]]] = {
    "run": [
        arg("stages", "such as 04 or 04_training (default: all six)", nargs="*", metavar="STAGE"),
        arg("--run", "run folder in the outputs folder (default: named as the preset)", default="", metavar="NAME"),
        arg("--preset", f"{', '.join(PRESETS)} (default: that of the run, else {DEFAULT_PRESET})", default=""),
        arg("--set", "set a parameter; repeatable", action="append", default=[], metavar="KEY=VALUE"),
        arg("--overwrite", "replace stages that were run with other settings", action="store_true"),
    ],
    "sweep": [
        arg("grid", "YAML file: name, preset, stages, set, grid, runs", metavar="GRID"),
        arg("--jobs", "runs at a time (default: 1)", type=int, default=1, metavar="N"),
        [arg("--only", "run number K alone, from 0, for array jobs; no table", type=int, metavar="K"),
         arg("--count", "print the number of runs and stop", action="store_true"),
         arg("--table", "write table and figure of the finished runs only", action="store_true")],
    ],
    "compare": [STAGE, arg("runs", "run folders in the outputs folder", nargs="+", metavar="RUN")],
    "inpaint": [
        [arg("--t1n-voided", f"{SCAN}; needs --mask", metavar="F"),
         arg("--data", f"{CASES}, instead of one file", metavar="DIR")],
        arg("--mask", "mask on the same grid: 1 = inpaint", metavar="F"),
        arg("--output", "result file (mean of several samples); a folder with --data", required=True, metavar="OUT"),
        arg("--growth", "tumour-cell concentration in [0, 1] (default: 0, healthy)", metavar="F"),
        arg("--tissue", "tissue labels: 1 CSF, 2 GM, 3 WM", metavar="F"),
        MAPS,
        arg("--make-missing", "make missing tissue maps from the scans (default: if the model needs them)",
            action=argparse.BooleanOptionalAction),
        MODEL,
        *parameters(ResultOptions, "estimate", *SAMPLING, "guidance", "blend_mm", "samples"),
        arg("--write-samples", "write each sample, too", action="store_true"),
        *parameters(ReadOptions, *READING, "scrub_header"),
    ],
    "submission": [
        arg("--data", CASES, required=True, metavar="DIR"),
        arg("--results", "folder of their <ID>-t1n-inference.nii.gz", required=True, metavar="DIR"),
        arg("--output", "zip file to write (default: submission.zip in the results)", metavar="OUT"),
    ],
    "prior": [
        arg("--t1n-voided", SCAN, required=True, metavar="F"),
        arg("--mask", "mask on the same grid: 1 = unknown", required=True, metavar="F"),
        arg("--tissue", "tissue labels to write: 1 CSF, 2 GM, 3 WM", required=True, metavar="OUT"),
        arg("--growth", "tumour-cell concentration to write, in [0, 1]", metavar="OUT"),
        arg("--seed-mm", "start of the tumour in world coordinates of the file (RAS, mm)", metavar="X,Y,Z"),
        arg("--segmentation", "binary tumour segmentation, instead of a start", metavar="F"),
        arg("--days", "age of the tumour, days (default: 100)", type=float, default=100.0),
        *parameters(GrowthRates, *GrowthRates.model_fields),
        arg("--lesion", "binary lesion mask (visible but abnormal tissue)", metavar="F"),
        arg("--refine", "labelling of visible tissue: intensity and atlas, or the atlas alone (default: mixture)",
            default="mixture", choices=["mixture", "none"]),
        *parameters(ReadOptions, *READING),
    ],
    "validate": [
        arg("data_dir", CASES, metavar="DATA_DIR"),
        MAPS,
        arg("--json", "JSON file of the findings to write", metavar="OUT"),
        *parameters(ReadOptions, *READING),
    ],
    "cohort": [
        arg("--from", "skull-stripped T1w of healthy people: a folder of NIfTI files, or a BIDS data set",
            required=True, dest="source", metavar="DIR"),
        arg("--output", "folder to write: data, conditioning_data, cohort.csv, exclusions.csv, pictures", required=True,
            metavar="DIR"),
        *parameters(MadeCohortOptions, "masks_per_patient", "seed", "spacing_mm", "workers", spacing_mm=1.0),
    ],
    "score": [arg(f"--{name}", text, required=True, metavar="F") for name, text in
              (("prediction", "inpainted volume"), ("target", "true volume"), ("voided", "voided volume"),
               ("mask-healthy", "mask of the healthy tissue that is scored"))],
    "evaluate": [
        arg("data_dir", f"{CASES}, with their t1n", metavar="DATA_DIR"),
        arg("--output", "folder for maps, results, metrics.csv and table.md", required=True, metavar="DIR"),
        MODEL,
        arg("--tissue", "source of the tissue maps: each voided scan, or given maps, which may leak the hidden region "
            "(default: atlas)", default="atlas", choices=["atlas", "given"]),
        *parameters(InpaintOptions, *SAMPLING, "samples", samples=16),
        arg("--pictures", "number of cases to draw (default: 0)", type=int, default=0, metavar="N"),
    ],
    "export": [
        arg("model", "model folder of a stage 04", metavar="DIR"),
        arg("--output", "model folder to write (default: the package's)", default=str(PRETRAINED), metavar="DIR"),
        arg("--temperature", "default scale of the initial noise, for config.json", type=float, default=0.0),
    ],
    "params": [STAGE, arg("--preset", f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})", default=DEFAULT_PRESET)],
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Parse the command line; wrong usage is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        self.exit(2, f"ERROR {message}. Fix: see `{self.prog} --help`.\n")


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line; the first line of a command's docstring is its help."""
    prog = "ldm" if Path(sys.argv[0]).name == "ldm" else "python -m ldm_lib"
    parser = Parser(prog=prog, description="3D brain MRI inpainting by latent diffusion")
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        text = str(command.__doc__).splitlines()[0].rstrip(".")
        sub = subparsers.add_parser(command.__name__, help=text, description=text)
        sub.set_defaults(command=command, misused=sub.error)
        for given in ARGUMENTS.get(command.__name__, []):
            if isinstance(given, list):
                group = sub.add_mutually_exclusive_group(required=command.__name__ == "inpaint")
                for name, settings in given:
                    group.add_argument(name, **settings)
            else:
                sub.add_argument(given[0], **given[1])
    return parser


def parse(model: type[AnyOptions], options: argparse.Namespace) -> AnyOptions:
    """Return a model's parameters as given on the command line.

    Raises:
        ConfigError: a value out of range; the message names the option.
    """
    given = {name: getattr(options, name) for name in model.model_fields if hasattr(options, name)}
    try:
        return model.parse(given)
    except ConfigError as error:
        name, equals, cause = error.cause.partition(" = ")
        fix = f"see `ldm {options.command.__name__} --help`"
        raise ConfigError(f"{flag(name)} {cause}" if equals and name in given else error.cause, fix=fix) from None


def point(text: str) -> tuple[float, ...]:
    """Return "x,y,z" as three finite numbers."""
    try:
        x, y, z = (float(part) for part in text.split(","))
        if not all(map(math.isfinite, (x, y, z))):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seed-mm {text}: not three numbers", fix="write for example --seed-mm=-30,12,45") from None
    return x, y, z


def joined(arguments: Sequence[str]) -> list[str]:
    """Join --seed-mm and its value: argparse would take "-30,12,45" for an option."""
    words = list(arguments)
    if "--seed-mm" in words[:-1]:
        k = words.index("--seed-mm")
        words[k : k + 2] = [f"--seed-mm={words[k + 1]}"]
    return words


def assignments(texts: Iterable[str]) -> dict[str, str]:
    """Return ["key=value", ...] as a mapping; a key that is given twice is rejected."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(f"--set {text}: not KEY=VALUE", fix="write for example --set max_epochs=10")
        if name in values:
            raise ConfigError(f"--set {name} is given twice, {values[name]!r} and {value!r}", fix="keep one")
        values[name] = value
    return values
