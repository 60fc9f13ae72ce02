"""Files that are there whole or not at all, and digests that tell them apart."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, then flush it to disk and rename it; on failure the old file stays."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Sorted, readable JSON, written whole."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Hex digest of any JSON-like content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """numpy scalars and paths as JSON sees them."""
    return value.item() if hasattr(value, "item") else str(value)
