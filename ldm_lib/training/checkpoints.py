"""Checkpoints that can be trusted: on the disk whole, told apart by their sha256, at least one of them at any moment.

    checkpoints/last-00001200.ckpt           the training after optimiser step 1200, as torch.save writes it
    checkpoints/last-00001200.ckpt.sha256    its digest, as `sha256sum -c` reads it; written first

The digest is there before the file, and a new file before the oldest goes, so that whenever the power fails the newest
that verifies is a whole one. They are chosen by the step in their name: clocks jump, and copies are younger.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldm_lib.errors import TrainingError, WeightsError
from ldm_lib.files import replacing, sha256
from ldm_lib.model_io import current_names, read_checkpoint

log = logging.getLogger("ldm_lib")

KEPT = 2  # to go on from: the newest, and the one before
_STEP = re.compile(r"last-(\d+)\.ckpt")


def step_path(folder: Path, step: int) -> Path:
    """Where the training after an optimiser step is kept."""
    return folder / f"last-{step:08d}.ckpt"


def resumable(folder: Path) -> list[Path]:
    """What there is to go on from, the newest step first; not yet verified."""
    steps = {path: int(match.group(1)) for path in folder.glob("last-*.ckpt") if (match := _STEP.fullmatch(path.name))}
    return sorted(steps, key=steps.get, reverse=True)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its digest, flush both, and read the file back.

    Raises:
        TrainingError: it did not reach the disk; what was there before is as it was.
    """
    needed = tensor_bytes(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with partial.open("wb") as stream:
                writer = _Digesting(stream)
                torch.save(dict(content), writer)
            digest = writer.digest.hexdigest()
            if sha256(partial) != digest:
                raise OSError("what was read back is not what was written")
            # A step may be written twice, before and after its validation: until the file is replaced, both are good.
            _write_digests(path, [digest, *_digests(path)])
        _write_digests(path, [digest])
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        free = shutil.disk_usage(_existing(path.parent)).free
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        fix = "make room, then give the same command: it goes on from the checkpoint before"
        cause = f"not written ({reason}): {told_bytes(needed)} needed, {told_bytes(free)} free"
        raise TrainingError(cause, where=path, fix=fix) from error


def remove(path: Path) -> None:
    """Remove a checkpoint and then its digest."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def keep_newest(folder: Path) -> None:
    """Remove all but the newest of what could be resumed."""
    for path in resumable(folder)[KEPT:]:
        remove(path)


def remove_newer(path: Path) -> None:
    """Remove what was passed over for this checkpoint as damaged: by its step it would outlive what is written next."""
    newest_first = resumable(path.parent)
    for damaged in newest_first[: newest_first.index(path)]:
        remove(damaged)


def remove_orphans(folder: Path) -> None:
    """Remove what a process that was killed had half written, and digests whose file never came."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.ckpt.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def read_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is what was written, and where it lies; None where no training was begun.

    Raises:
        WeightsError: there are checkpoints, and each is damaged.
    """
    found = resumable(folder)
    for path in found:
        try:
            return path, read_verified(path)
        except WeightsError as error:
            log.warning("%s", error)
    if found:
        raise WeightsError(f"none of {len(found)} checkpoints is what was written", where=folder,
                           fix="remove this folder to train anew")  # fmt: skip
    return None


def read_verified(path: Path) -> dict[str, Any]:
    """A checkpoint whose bytes have the digest that was noted when it was written; nothing in it is executed."""
    fix = "the one before is taken, if there is one"
    try:
        found = sha256(path)
    except OSError as error:
        raise WeightsError(f"cannot be read ({error.strerror})", where=path, fix=fix) from error
    if found not in _digests(path):
        raise WeightsError("is not what its sha256 says", where=path, fix=fix)
    return current_names(read_checkpoint(path))


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin what would end with a full disk.

    Raises:
        TrainingError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise TrainingError(f"disk full: checkpoints take {told_bytes(needed)}, {told_bytes(free)} are free",
                            where=folder, fix="make room, or choose another outputs folder")  # fmt: skip


def differences(was: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """What a checkpoint was made with and is not asked for now, one sentence each; nested mappings key by key."""
    told = []
    for key in dict.fromkeys([*was, *now]):
        before, after = was.get(key), now.get(key)
        if before == after or key in set(allowed):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            told += differences(before, after, allowed)
        else:
            told.append(f"{key} was {_short(before)}, now {_short(after)}")
    return told


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested mappings and lists."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return sum(map(tensor_bytes, parts))


def told_bytes(count: int) -> str:
    """Bytes as one reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class _Digesting:
    """A stream that digests what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digests(path: Path) -> list[str]:
    """What was noted of a checkpoint, the newest first; a note may be damaged as any file."""
    note = _digest_path(path)
    lines = note.read_text(errors="replace").splitlines() if note.exists() else []
    return [line.partition(" ")[0] for line in lines]


def _write_digests(path: Path, digests: Iterable[str]) -> None:
    with replacing(_digest_path(path)) as note:
        note.write_text("".join(f"{digest}  {path.name}\n" for digest in digests))


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _flush_folder(folder: Path) -> None:
    """Names are on the disk only when their folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
