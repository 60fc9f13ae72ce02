"""Read a sweep from a YAML file: named and validated runs; what is invalid is rejected before anything runs.

    name: objectives
    preset: smoke
    stages: [01, 02, 03, 04, 05, 06]   # all six if not given
    set: {max_epochs: 20}              # of every run
    grid:                              # every combination
      prediction: [noise, velocity]
      learning_rate: [1e-4, 1e-3]
    runs:                              # and these
      - {prediction: noise, base_width: 16}

Every scalar is text as typed; the types of the parameters convert it, so that `1e-4`, `no` and `01` keep their meaning.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from ldm_lib.errors import ConfigError, InputError
from ldm_lib.experiment.path_aliases import absolute_paths
from ldm_lib.experiment.presets import DEFAULT_PRESET, resolve
from ldm_lib.experiment.stages import STAGES, StageConfig, stage_name
from ldm_lib.files import expand_path, fingerprint
from ldm_lib.options import Name, Options

MOST_BYTES, MOST_RUNS, MOST_LETTERS = 64 * 1024, 1000, 128
DEEPEST = 3  # a mapping of mappings of lists, or of lists of mappings


class SweepFile(Options):
    """Describe the content of a sweep's file."""

    hint = "see the documentation, page Sweeps"
    name: Name
    preset: str = DEFAULT_PRESET
    stages: list[str] = Field([])
    set: dict[str, str] = Field({})
    grid: dict[str, list[str]] = Field({})
    runs: list[dict[str, str]] = Field([])


@dataclass(frozen=True)
class SweepRun:
    """Hold one run of a sweep, its configuration stage by stage."""

    name: str
    own: dict[str, str]  # the parameters that vary -> their text as typed
    values: dict[str, str]  # those and the ones common to all
    configs: dict[str, StageConfig]

    def value(self, parameter: str) -> Any:
        """Return the value of a parameter in this run, given or default."""
        return _value(self.configs, parameter)


@dataclass(frozen=True)
class Sweep:
    """Hold a sweep as its file describes it; `varying` are the parameters in order of appearance."""

    name: str
    preset: str
    stages: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    @property
    def varying(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parameter for run in self.runs for parameter in run.own))


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file and resolve every run of it; reject what is invalid."""
    try:
        file = SweepFile.parse(_content(expand_path(path)))
        stages = sorted({stage_name(stage) for stage in file.stages})
        runs = [_run(file, own) for own in _combinations(file)]
        names = [run.name for run in runs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two runs have the same name {twice[0]!r}", fix="remove one, or vary another value")
        return Sweep(file.name, file.preset, tuple(stages or STAGES), tuple(runs))
    except ConfigError as error:
        place = f"{path}, {error.where}" if error.where else path
        raise ConfigError(error.cause, where=place, fix=error.fix) from error


def _content(path: Path) -> dict[str, Any]:
    """Return mappings, lists and text; what could cost far more than the file's size is rejected."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError("is not a file", where=path, fix="name a sweep file")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"is larger than {MOST_BYTES} bytes", fix="split it into several sweeps")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.BaseLoader):  # the time it takes grows with the square of the depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                raise ConfigError(f"aliases and nesting deeper than {DEEPEST} are not allowed", fix=SweepFile.hint)
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="name a sweep file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid YAML ({' '.join(str(error).split())})", fix=SweepFile.hint) from error
    if not isinstance(content, dict):
        raise ConfigError("is not a mapping", fix="write `parameter: value` lines")
    return content


def _combinations(file: SweepFile) -> list[dict[str, str]]:
    """Return the values that are each run's own: every combination of the grid, then the list."""
    count = len(file.runs) + (math.prod(map(len, file.grid.values())) if file.grid else 0)
    if not 0 < count <= MOST_RUNS:
        raise ConfigError(f"{count} runs; from 1 to {MOST_RUNS} are allowed", fix=SweepFile.hint)
    combined = itertools.product(*file.grid.values()) if file.grid else ()
    return [dict(zip(file.grid, values, strict=True)) for values in combined] + file.runs


def _run(file: SweepFile, own: dict[str, str]) -> SweepRun:
    for twice in file.set.keys() & own.keys():
        raise ConfigError(f"{twice!r} is in `set` and varies", fix="keep one")
    values = file.set | own
    if "run" in values:
        raise ConfigError("'run' cannot be set: runs are named after what varies", fix="remove it")
    configs = resolve(file.preset, values)
    # The name joins the sweep's and the run's own values as converted: `1e-3` and `0.001` are the same run.
    converted = {parameter: str(_value(configs, parameter)) for parameter in own}
    words = [file.name, *(value or "empty" for value in converted.values())]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))
    if len(name) > MOST_LETTERS:
        name = f"{name[: MOST_LETTERS - 13]}-{fingerprint(converted)[:12]}"
    return SweepRun(name, own, values, resolve(file.preset, absolute_paths(values) | {"run": name}))


def _value(configs: Mapping[str, StageConfig], parameter: str) -> Any:
    return next(getattr(config, parameter) for config in configs.values() if hasattr(config, parameter))
