"""Build the parser of the command line; options that are parameters take default, choices and text from `Options`."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from ldm_lib.errors import ConfigError
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


class Parser(argparse.ArgumentParser):
    """Parse the command line; wrong usage is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        self.exit(2, f"ERROR {message}. Fix: see `{self.prog} --help`.\n")


def build_parser(
    commands: Sequence[Command], arguments: Mapping[str, list[Argument | list[Argument]]]
) -> argparse.ArgumentParser:
    """Return the parser of the command line; the first line of a command's docstring is its help."""
    prog = "ldm" if Path(sys.argv[0]).name == "ldm" else "python -m ldm_lib"
    parser = Parser(prog=prog, description="3D brain MRI inpainting by latent diffusion")
    parser.add_argument("--version", action="version", version=f"ldm {__version__}")
    help_quiet = "show no progress and no warnings, only errors and results"
    quiet: dict[str, Any] = {"action": "store_true", "help": help_quiet}
    parser.add_argument("--quiet", **quiet)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        text = str(command.__doc__).splitlines()[0].rstrip(".")
        sub = subparsers.add_parser(command.__name__, help=text, description=text)
        sub.add_argument("--quiet", default=argparse.SUPPRESS, **quiet)  # before the command or after it
        sub.set_defaults(command=command, misused=sub.error)
        for given in arguments.get(command.__name__, []):
            if isinstance(given, list):
                group = sub.add_mutually_exclusive_group(required=command.__name__ == "inpaint")
                for name, settings in given:
                    _add(group, name, settings)
            else:
                _add(sub, *given)
    return parser


def _add(parser: argparse._ActionsContainer, name: str, settings: dict[str, Any]) -> None:
    """Add an option under its name, and under another name where it has one."""
    names = [name, settings["also"]] if "also" in settings else [name]
    parser.add_argument(*names, **{key: value for key, value in settings.items() if key != "also"})


def parse(model: type[AnyOptions], options: argparse.Namespace) -> AnyOptions:
    """Return a model's parameters as given on the command line.

    Raises:
        ConfigError: a value out of range; the message names the option.
    """
    given = {name: getattr(options, name) for name in model.model_fields if hasattr(options, name)}
    try:
        return model.parse(given)
    except ConfigError as error:
        if error.where:  # a value that is allowed, but cannot be used here
            raise
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
