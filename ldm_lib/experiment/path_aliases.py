"""Where the data lie, told by names in all that is kept: a path may hold a patient's, a project's or a user's name.

A run knows its places from `.places.json`, which only its owner can read; its other files say `$LDM_DATA_DIR`
and the like. A run folder without that one file gives no path away, and goes on where the variables are set.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_lib.errors import RunError
from ldm_lib.files import expand_path, read_json, replacing, write_json

FILE = ".places.json"
PATHS = ("data_dir", "conditioning_dir", "autoencoder_dir", "start_dir")
NAMES = {name: f"LDM_{name.upper()}" for name in PATHS}
_PROJECT = Path(__file__).parents[2]
_ELSEWHERE = {_PROJECT: "$PROJECT", Path(sys.prefix): "$PYTHON", Path(sys.base_prefix): "$PYTHON_BASE",
              Path(tempfile.gettempdir()): "$TMPDIR", Path.home(): "$HOME"}  # fmt: skip


def named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with a name in the place of each path."""
    return {k: f"${NAMES[k]}" if v and k in NAMES else v for k, v in parameters.items()}


def settle(run_folder: Path, *parameters: Mapping[str, Any]) -> None:
    """Note the paths that were given, and let kernels know them and those of earlier calls by the environment."""
    given = {NAMES[k]: v for each in parameters for k, v in each.items() if k in NAMES and v and v != f"${NAMES[k]}"}
    places = places_of(run_folder) | {name: str(expand_path(path).resolve()) for name, path in given.items()}
    os.environ.update(places)
    if given:
        write_json(run_folder / FILE, places)
        (run_folder / FILE).chmod(0o600)


def places_of(run_folder: Path) -> dict[str, str]:
    """Name -> path, as settled for this run."""
    try:
        found = read_json(run_folder / FILE)
    except ValueError:
        return {}
    return {name: found[name] for name in NAMES.values() if isinstance(found.get(name), str)}


def told(path: Path, run_folder: Path) -> str:
    """A file's path from the nearest place that has a name; absolute if there is none."""
    places = places_of(run_folder)
    roots = {Path(place): f"${name}" for name, place in places.items()}
    if data := places.get(NAMES["data_dir"]):
        roots.setdefault(Path(data).parent, f"${NAMES['data_dir']}/..")  # where maps lie, if not inside
    for root in sorted(roots, key=lambda root: -len(root.parts)):
        if path.is_relative_to(root):
            return f"{roots[root]}/{path.relative_to(root).as_posix()}"
    return str(path)


def found(text: str, run_folder: Path) -> Path:
    """The path that `told` wrote.

    Raises:
        RunError: a place that is not known here.
    """
    match = re.match(r"\$(LDM_\w+)", text)
    if not match:
        return Path(text)
    place = places_of(run_folder).get(match[1]) or os.environ.get(match[1])
    if place and not Path(place).exists():
        raise RunError(f"its folder ${match[1]} is not there any more", where=run_folder.name,
                       fix=f"put it back, or: make 01 RUN={run_folder.name} DATA_DIR=/new/place")  # fmt: skip
    if not place:
        raise RunError(f"its data lie in ${match[1]}, which is not known here", where=run_folder.name,
                       fix=f"set {match[1]} to the folder, or run 01_data_audit again with it")  # fmt: skip
    return Path(place + text[match.end() :])


def hidden(text: str, run_folder: Path) -> str:
    """The text with names in the place of this run's places and of this machine's usual ones."""
    names = {path: f"${name}" for name, path in places_of(run_folder).items()}
    names |= {str(run_folder): run_folder.name, str(run_folder.parent): "$OUTPUTS"}
    names |= {str(path): name for path, name in _ELSEWHERE.items() if len(path.parts) > 1}
    any_of = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"({any_of})(?![\w.-])", lambda match: names[match[1]], text)


def hide(path: Path, run_folder: Path) -> None:
    """Rewrite a text file, if there is one, as `hidden` tells it."""
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    with replacing(path) as partial:
        partial.write_text(hidden(text, run_folder))


class HidingFormatter(logging.Formatter):
    """Log lines without paths."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.run_folder = run_folder

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record), self.run_folder)
