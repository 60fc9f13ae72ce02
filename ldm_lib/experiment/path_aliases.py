"""Replace the paths of data and weights by names in all that a run keeps.

A path may contain the name of a patient or a user. A run keeps its paths in `.places.json`, which only its owner can
read; its other files say `$LDM_DATA_DIR` and the like, and work where these variables are set.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.errors import RunError
from ldm_lib.files import expand_path, read_json, replacing, write_json

FILE = ".places.json"
_PATHS = ("data_dir", "conditioning_dir", "brains_dir", "patients_file", "autoencoder_dir", "start_dir")
ALIASES = {name: f"LDM_{name.upper()}" for name in _PATHS}
_MACHINE = {Path(__file__).parents[2]: "$PROJECT", Path(sys.prefix): "$PYTHON", Path(sys.base_prefix): "$PYTHON_BASE",
            Path(tempfile.gettempdir()): "$TMPDIR", Path.home(): "$HOME"}  # fmt: skip


def with_aliases(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with an alias in the place of each path."""
    return {k: f"${ALIASES[k]}" if v and k in ALIASES else v for k, v in parameters.items()}


def command_with_aliases(words: Sequence[str]) -> list[str]:
    """Return the words of a command with an alias in the place of each path."""
    pairs = [(word, *word.partition("=")[::2]) for word in words]
    return [f"{name}=${ALIASES[name]}" if value and name in ALIASES else word for word, name, value in pairs]


def absolute_paths(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve paths relative to the working directory of the command, which is not that of the kernels."""
    return {k: str(expand_path(v).resolve()) if k in ALIASES and v else v for k, v in overrides.items()}


def remember_paths(run_folder: Path, *parameters: Mapping[str, Any]) -> None:
    """Keep the paths that were given, and pass them and those of earlier calls to kernels by environment variables."""
    pairs = [(ALIASES[k], v) for each in parameters for k, v in each.items() if k in ALIASES and v]
    given = {alias: path for alias, path in pairs if path != f"${alias}"}
    paths = known_paths(run_folder) | {alias: str(expand_path(path).resolve()) for alias, path in given.items()}
    os.environ.update(paths)
    if given:
        write_json(run_folder / FILE, paths)
        (run_folder / FILE).chmod(0o600)


def known_paths(run_folder: Path) -> dict[str, str]:
    """Return alias -> path, as kept for this run."""
    try:
        content = read_json(run_folder / FILE)
    except ValueError:
        return {}
    return {alias: content[alias] for alias in ALIASES.values() if isinstance(content.get(alias), str)}


def to_alias(path: Path, run_folder: Path) -> str:
    """Return a file's path relative to the nearest folder with an alias; unchanged if there is none."""
    paths = known_paths(run_folder)
    roots = {Path(root): f"${alias}" for alias, root in paths.items()}
    if data := paths.get(ALIASES["data_dir"]):
        roots.setdefault(Path(data).parent, f"${ALIASES['data_dir']}/..")  # where maps lie, if not inside
    inside = [root for root in roots if path.is_relative_to(root)]
    nearest = max(inside, key=lambda root: len(root.parts), default=None)
    return f"{roots[nearest]}/{path.relative_to(nearest).as_posix()}" if nearest else str(path)


def from_alias(text: str, run_folder: Path) -> Path:
    """Return the path that `to_alias` wrote, whose folder must be known and exist."""
    alias = re.match(r"\$(LDM_\w+)", text)
    if not alias:
        return Path(text)
    root = known_paths(run_folder).get(alias[1]) or os.environ.get(alias[1])
    if not root:
        raise RunError(f"its data are in ${alias[1]}, which is not known here", where=run_folder.name,
                       fix=f"set {alias[1]} to the folder, or run 01_data_audit again with it")  # fmt: skip
    if not Path(root).exists():
        raise RunError(f"its folder ${alias[1]} does not exist any more", where=run_folder.name,
                       fix=f"restore it, or `ldm run 01 --run {run_folder.name} --set data_dir=NEW`")  # fmt: skip
    return Path(root + text[alias.end() :])


def hide_paths(text: str, run_folder: Path) -> str:
    """Replace the paths of this run and the usual ones of this machine by their aliases, the longest first."""
    aliases = {path: f"${alias}" for alias, path in known_paths(run_folder).items()}
    aliases |= {str(run_folder): run_folder.name, str(run_folder.parent): "$OUTPUTS"}
    aliases |= {str(path): alias for path, alias in _MACHINE.items() if len(path.parts) > 1}
    for path in sorted(aliases, key=len, reverse=True):
        text = text.replace(path, aliases[path])
    return text


def hide_paths_in(file: Path, run_folder: Path) -> None:
    """Rewrite a text file, if it exists, without paths."""
    if file.is_file():
        text = file.read_text(errors="replace")
        with replacing(file) as partial:
            partial.write_text(hide_paths(text, run_folder))


class PathHidingFormatter(logging.Formatter):
    """Format log lines without paths."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.run_folder = run_folder

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, its paths replaced by aliases."""
        return hide_paths(super().format(record), self.run_folder)
