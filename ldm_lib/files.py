"""Write files atomically, read and write JSON, CSV and Markdown, compute digests, and expand paths."""

import csv
import errno
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm_lib.errors import ConfigError, InputError

PRETRAINED = Path(__file__).with_name("pretrained")  # the model folder of the package
AUTOENCODER_FOLDER = "autoencoder"  # in a model folder: the autoencoder that its denoiser was trained on
MAX_JSON_BYTES = 64 << 20  # of a JSON file that is read; a cohort of 10,000 cases has a tenth of it


def require_writable(path: str | Path) -> None:
    """Check early that a file can be written.

    Raises:
        InputError: its folder does not exist or is read-only, or the path is no place for a file.
    """
    path = Path(path)
    probe = _partial_path(path)
    try:
        if not path.parent.is_dir():
            raise InputError("its folder does not exist", where=path, fix=f"mkdir -p {shlex.quote(str(path.parent))}")
        if path.is_dir():
            raise InputError("is a directory", where=path, fix="name a file")
        _require_replaceable(path)
        probe.unlink(missing_ok=True)  # left by a crash, or a link that someone planted
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError("its name is too long", where=path, fix="shorten it") from error
        raise InputError(
            f"cannot be written ({error.strerror})", where=path, fix="choose a folder you may write to"
        ) from error


def _require_replaceable(path: Path) -> None:
    """Reject what is not a regular file: as root, a rename would replace /dev/null."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError("is a device, a pipe or a socket", where=path, fix="name a file")


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yield a path to write to, then flush and rename it; on failure the old file stays."""
    path = Path(path)
    _require_replaceable(path)
    partial = _partial_path(path)
    partial.unlink(missing_ok=True)  # a link that someone planted there would be followed
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write content as indented JSON with sorted keys, atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        ValueError: it holds none; the message says why.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("is not a file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"is larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds no mapping but {type(content).__name__}")
    return content


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> list[str]:
    """Write rows as a CSV file, atomically; return its columns: those given, and others in order of appearance."""
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    with replacing(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return columns


def package_file(package: str, *parts: str) -> Path:
    """Return the path of a file that an installed package carries, without importing the package, which takes seconds.

    Raises:
        InputError: the installed package lacks the file.
    """
    found = find_spec(package)
    path = Path(found.origin).parent.joinpath(*parts) if found and found.origin else Path(*parts)
    if not path.is_file():
        raise InputError(f"the installed {package} lacks this file", where=path.name,
                         fix=f"install the version of {package} that pyproject.toml names")  # fmt: skip
    return path


def sha256(path: str | Path) -> str:
    """Return the hex digest of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def digests(*given: str) -> dict[str, str]:
    """Return name -> sha256 of the given files, of the JSON files next to them, and of all files in given folders.

    Empty and absent paths are left out.
    """
    paths = [expand_path(path) for path in given if path]
    files = [path for path in paths if path.is_file()]
    files += [file for path in files for file in path.parent.glob("*.json")]
    files += [file for path in paths for file in path.glob("*")]
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in files if file.is_file()}


def fingerprint(content: Any) -> str:
    """Return a hex digest of JSON-like content that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Convert numpy scalars and paths for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def now() -> str:
    """Return the time in UTC to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def expand_path(text: str | Path) -> Path:
    """Expand `~` and environment variables in a path; a part of it that exists as it is written stays as it is.

    Raises:
        ConfigError: a zero byte, or `~name` of an unknown user.
    """
    if "\0" in str(text):
        raise ConfigError("holds a zero byte, which no path may", where=repr(str(text)), fix="write the path again")
    if "$" not in str(text) and not str(text).startswith("~"):
        return Path(text)
    path = Path()
    try:
        for part in Path(text).parts:
            if "$" in part and not _exists(path / part):
                value = os.path.expandvars(part)  # that of $HOME, a path, has no place within one
                part = part if path.parts and value.startswith("/") else value
            path /= part
        return path if _exists(path) else path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            "no such user: ~name cannot be expanded", where=str(text), fix="write the path out"
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False
