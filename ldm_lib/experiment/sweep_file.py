"""A sweep's grid file: YAML in, named and validated runs out; whatever is refused is refused before anything runs.

    name: objectives
    preset: smoke
    stages: [01, 02, 03, 04, 05, 06]   # all six if not given
    set: {max_epochs: 20}              # of every run
    grid:                              # every combination
      prediction: [noise, velocity]
      learning_rate: [1e-4, 1e-3]
    runs:                              # and these as they stand
      - {prediction: noise, base_width: 16}

Every scalar is text as typed; the parameters' own types convert it, so that `1e-4`, `no` and `01` mean what they say.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm_lib.errors import ConfigError, InputError
from ldm_lib.experiment.presets import DEFAULT_PRESET, resolve
from ldm_lib.experiment.runner import absolute
from ldm_lib.experiment.stages import STAGES, StageConfig, stage_name
from ldm_lib.files import expand_path, fingerprint
from ldm_lib.options import nearest, safe_name

KEYS = ("name", "preset", "stages", "set", "grid", "runs")
MOST_BYTES, MOST_RUNS, MOST_LETTERS = 64 * 1024, 1000, 128
DEEPEST = 3  # a mapping of mappings of lists, or of lists of mappings


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder under outputs/.
        own: the parameters that vary -> their text as typed.
        values: those and the ones common to all.
        configs: its full configuration, stage by stage.
    """

    name: str
    own: dict[str, str]
    values: dict[str, str]
    configs: dict[str, StageConfig]

    def value(self, parameter: str) -> Any:
        """What a parameter came to, given or not."""
        return _value(self.configs, parameter)


@dataclass(frozen=True)
class Grid:
    """A sweep as its file tells it; `text` is the file, `varying` the parameters in order of appearance."""

    name: str
    preset: str
    stages: tuple[str, ...]
    runs: tuple[SweepRun, ...]
    text: str

    @property
    def varying(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parameter for run in self.runs for parameter in run.own))


def read_grid(path: str | Path) -> Grid:
    """Read a grid file and resolve every run of it.

    Raises:
        InputError: the file cannot be read or is too large.
        ConfigError: it is no plain YAML, or any run of it would be refused.
    """
    text = _text(expand_path(path))
    try:
        return _grid(_content(text), text)
    except ConfigError as error:
        place = f"{path}, {error.where}" if error.where else path
        raise ConfigError(error.cause, where=place, fix=error.fix) from error


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError("is no file", where=path, fix="name a grid file")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="name a grid file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"is no text in UTF-8 (byte {error.start})", where=path, fix="name a grid file") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"is larger than {MOST_BYTES} bytes", where=path, fix="split it into several sweeps")
    return text


def _content(text: str) -> Any:
    """Mappings, lists and text. Anchors, aliases and tags are refused: a list of parameters needs none of them."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            # Judged while it is parsed, so that neither depth nor aliases can cost more than the file's own size.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            _require_plain(event, depth)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML ({' '.join(str(error).split())})", fix="see docs/sweep.yaml") from error
    return "" if root is None else _plain(root)


def _require_plain(event: yaml.Event, depth: int) -> None:
    line = f"line {event.start_mark.line + 1}"
    if getattr(event, "anchor", None) or getattr(event, "tag", None):
        raise ConfigError("anchors, aliases and tags are not read", where=line, fix="write the value out")
    if depth > DEEPEST:
        raise ConfigError(f"nested deeper than {DEEPEST}", where=line, fix="see docs/sweep.yaml")


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    content: dict[str, Any] = {}
    for key, value in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError("a key that is no name", where=line, fix="write `parameter: value`")
        if key.value in content:
            raise ConfigError(f"{key.value!r} is given twice", where=line, fix="keep one")
        content[key.value] = _plain(value)
    return content


def _grid(content: Any, text: str) -> Grid:
    for unknown in _mapping(content, "the file").keys() - set(KEYS):
        raise ConfigError(f"unknown key {unknown!r}; there are {', '.join(KEYS)}", fix=nearest(unknown, KEYS))
    name, preset = _scalar(content.get("name", ""), "name"), _scalar(content.get("preset", DEFAULT_PRESET), "preset")
    try:
        safe_name(name)
    except ValueError as error:
        raise ConfigError(f"name = {name!r}: {error}", fix="name the sweep, such as `name: objectives`") from None
    stages = sorted({stage_name(_scalar(stage, "stages")) for stage in _list(content.get("stages", []), "stages")})
    common = _scalars(content.get("set", {}), "set")
    runs = [_run(name, preset, common, own) for own in _combinations(content)]
    names = [run.name for run in runs]
    for twice in (each for each in names if names.count(each) > 1):
        raise ConfigError(f"two runs come to the same name {twice!r}", fix="keep one, or let a further value tell them")
    return Grid(name, preset, tuple(stages or STAGES), tuple(runs), text)


def _combinations(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The values that each run has of its own: every combination of the grid, then the list."""
    grid = {k: _list(v, f"grid, {k}") for k, v in _mapping(content.get("grid", {}), "grid").items()}
    listed = _list(content.get("runs", []), "runs")
    for empty in (k for k, values in grid.items() if not values):
        raise ConfigError(f"{empty!r} has no values", where="grid", fix="give at least one, or leave it out")
    count = len(listed) + (math.prod(map(len, grid.values())) if grid else 0)
    if not 0 < count <= MOST_RUNS:
        raise ConfigError(f"{count} runs; from 1 to {MOST_RUNS} are allowed", fix="see docs/sweep.yaml")
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return [_scalars(own, "grid") for own in combined] + [_scalars(own, "runs") for own in listed]


def _run(sweep: str, preset: str, common: dict[str, str], own: dict[str, str]) -> SweepRun:
    for twice in common.keys() & own.keys():
        raise ConfigError(f"{twice!r} is in `set` and varies", fix="keep one")
    values = common | own
    if "run" in values:
        raise ConfigError("'run' is not yours to set: runs are named by what varies", fix="remove it")
    name = _named(sweep, own, resolve(preset, values))
    return SweepRun(name, own, values, resolve(preset, absolute(values) | {"run": name}))


def _named(sweep: str, own: dict[str, str], configs: Mapping[str, StageConfig]) -> str:
    """The sweep's name and the run's own values, as converted: `1e-3` and `0.001` are one run, whatever its place."""
    told = {parameter: str(_value(configs, parameter)) for parameter in own}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([sweep, *(value or "empty" for value in told.values())]))
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 13]}-{fingerprint(told)[:12]}"


def _value(configs: Mapping[str, StageConfig], parameter: str) -> Any:
    return next(getattr(config, parameter) for config in configs.values() if hasattr(config, parameter))


def _scalar(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{what}: {value!r} is not one value", fix='write a list of numbers as text: "8,16"')
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{what}: {value!r} is no list", fix="write [a, b], or one `- a` a line")
    return value


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: {value!r} is no mapping", fix="write `parameter: value` lines")
    return value


def _scalars(value: Any, what: str) -> dict[str, str]:
    return {k: _scalar(v, f"{what}, {k}") for k, v in _mapping(value, what).items()}
