"""Write and read checkpoints that are whole, verified by their sha256, and of which one is valid at any moment.

    checkpoints/last-00001200.ckpt           the training after optimiser step 1200, as torch.save writes it
    checkpoints/last-00001200.ckpt.sha256    its digest, as `sha256sum -c` reads it; written first

The digest is written before the file, and a new file before the oldest is removed. Checkpoints are chosen by the step
in their name: clocks jump, and copies are younger than their originals.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_lib.errors import TrainingError, WeightsError
from ldm_lib.files import replacing, sha256
from ldm_lib.model_io import read_checkpoint

log = logging.getLogger("ldm_lib")

FORMAT = 2  # of the content; raise it when what a training is resumed from changes its form
KEPT = 2  # checkpoints to resume from: the newest, and the one before
_STEP = re.compile(r"last-(\d+)\.ckpt")


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of the training after an optimiser step."""
    return folder / f"last-{step:08d}.ckpt"


def resumable(folder: Path) -> list[Path]:
    """Return the checkpoints to resume from, the newest step first; not yet verified."""
    matches = (_STEP.fullmatch(path.name) for path in folder.glob("last-*.ckpt"))
    return [step_path(folder, step) for step in sorted((int(m[1]) for m in matches if m), reverse=True)]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its digest, whole or not at all.

    Raises:
        TrainingError: it did not reach the disk; what was there before is unchanged.
    """
    require_room(path.parent, _tensor_bytes(content))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with partial.open("wb") as stream:
                torch.save(dict(content), stream)
            digest = sha256(partial)
            # A step is written twice if it is validated in between: until the file is replaced, both are valid.
            _write_digests(path, [digest, *_digests(path)])
        _write_digests(path, [digest])
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        fix = "make room, then give the same command: it resumes from the checkpoint before"
        raise TrainingError(f"not written ({reason})", where=path, fix=fix) from error


def remove(path: Path) -> None:
    """Remove a checkpoint and then its digest."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def keep_newest(folder: Path) -> None:
    """Remove all but the newest checkpoints to resume from."""
    for path in resumable(folder)[KEPT:]:
        remove(path)


def remove_newer(path: Path) -> None:
    """Remove damaged checkpoints of later steps, which would outlive those that are written next."""
    newest_first = resumable(path.parent)
    for damaged in newest_first[: newest_first.index(path)]:
        remove(damaged)


def read_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that verifies and its content; None where no training was begun.

    Raises:
        WeightsError: there are checkpoints, and each is damaged.
        TrainingError: another version of this library wrote it.
    """
    found = resumable(folder)
    for path in found:
        try:
            content = read_verified(path)
        except WeightsError as error:
            log.warning("%s", error)
            continue
        if content.get("format") != FORMAT:
            raise TrainingError(f"was written by another version (format {content.get('format', 1)}, need {FORMAT})",
                                where=path, fix=f"remove {folder.name}/ to train from the start")  # fmt: skip
        return path, content
    if found:
        raise WeightsError(f"none of {len(found)} checkpoints matches its sha256", where=folder,
                           fix="remove this folder to train from the start")  # fmt: skip
    return None


def read_verified(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that matches its sha256; nothing in it is executed."""
    fix = "the checkpoint before is used, if there is one"
    try:
        found = sha256(path)
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror})", where=path, fix=fix) from error
    if found not in _digests(path):
        raise WeightsError("does not match its sha256", where=path, fix=fix)
    return read_checkpoint(path)


def require_room(folder: Path, needed: int) -> None:
    """Require free space for checkpoints, in bytes."""
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if free < needed:
        raise TrainingError(f"disk full: need {needed / 1e6:.1f} MB, have {free / 1e6:.1f} MB", where=folder,
                            fix="make room, or choose another outputs folder; the same command resumes")  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Return how two nested mappings differ, one clause a key, such as "seed was 0, now 4"."""
    found, allowed = [], set(allowed)
    for key in dict.fromkeys([*before, *now]):
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            found += differences(was, is_now, allowed)
        elif was != is_now and key not in allowed:
            found.append(f"{key} was {was!r:.40}, now {is_now!r:.40}")
    return found


def _tensor_bytes(content: Any) -> int:
    """Return the bytes of all tensors in nested mappings."""
    if isinstance(content, Mapping):
        return sum(map(_tensor_bytes, content.values()))
    return content.nbytes if isinstance(content, Tensor) else 0


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digests(path: Path) -> list[str]:
    file = _digest_path(path)
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return [line.partition(" ")[0] for line in lines]


def _write_digests(path: Path, digests: Iterable[str]) -> None:
    with replacing(_digest_path(path)) as partial:
        partial.write_text("".join(f"{digest}  {path.name}\n" for digest in digests))
