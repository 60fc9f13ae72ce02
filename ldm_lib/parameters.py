"""Parameters as they are written and read: by name, in a notebook's cell, on a command line."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from ldm_lib.config import STAGES, StageConfig
from ldm_lib.errors import ConfigError


def stage_name(text: str) -> str:
    """ "4", "04" or "04_training" -> "04_training"."""
    found = [name for name in STAGES if name == text or name[:2] == text.zfill(2)]
    if not found:
        raise ConfigError(f"no stage {text!r}; there are {', '.join(STAGES)}", fix=nearest(text, STAGES))
    return found[0]


def validated(model: type[StageConfig], values: dict[str, Any]) -> StageConfig:
    """Build a configuration, or say in one line what was expected."""
    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    given = f"{name} = {problem['input']!r}: " if name else ""
    fix = f"see `make params NB={_number(model)}`"
    if problem["type"] == "extra_forbidden":
        fix = nearest(name, model.model_fields)
    raise ConfigError(given + problem["msg"].removeprefix("Value error, "), fix=fix)


def parameters_cell(model: type[StageConfig]) -> str:
    """The source of a notebook's parameters cell: one `name: type = literal  # meaning` a line."""
    lines = []
    for name, field in model.model_fields.items():
        kind = type(field.default).__name__
        literal = json.dumps(field.default) if kind == "str" else repr(field.default)
        choices = getattr(field.annotation, "__args__", ())
        among = f" ({', '.join(choices)})" if choices and all(isinstance(c, str) for c in choices) else ""
        lines.append(f"{name}: {kind} = {literal}  # {field.description}{among}")
    return "\n".join(lines)


def _number(model: type[StageConfig]) -> str:
    return next(name[:2] for name, known in STAGES.items() if known is model)


def nearest(name: str, known: Iterable[str]) -> str:
    """What was most likely meant, as the mend of a refusal."""
    match = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"did you mean {match[0]!r}?" if match else "see `make params NB=01` to 06"
