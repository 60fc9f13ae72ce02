"""Reuse stages that another run has finished: they are copied with their `done.json` instead of being run again."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm_lib.experiment.run_folder import changes, is_done
from ldm_lib.experiment.stage import stage_inputs
from ldm_lib.experiment.stages import StageConfig
from ldm_lib.locking import FolderLock

# Folders next to a stage's that go with it. Latents are named after their inputs: those that do not fit are not used.
COMPANIONS = {"03_conditioning": ("maps", "latents")}
# Files that are never written in place, only replaced by renaming: a hard link is as good as a copy.
LINKED = (".nii.gz", ".safetensors", ".ckpt")


def reuse_stages(
    run_folder: Path, configs: Mapping[str, StageConfig], stages: Sequence[str], sources: Sequence[Path]
) -> dict[str, str]:
    """Copy the stages that this run would make identically, and return stage -> name of the run it came from.

    Stages are copied in order from the first source, a folder of a run, that fits, up to the first that must be made. A
    stage that was started is left to the runner.
    """
    lock, reused = FolderLock(run_folder), {}
    try:
        for stage in (name for name in stages if not (run_folder / name / "done.json").exists()):
            folder = run_folder / stage
            if folder.exists():
                break
            inputs = stage_inputs(stage, configs[stage], run_folder)
            source = next((run for run in sources if _copy_stage(run / stage, folder, configs[stage], inputs)), None)
            if not source:
                break
            reused[stage] = source.name
    finally:
        lock.release()
    return reused


def _copy_stage(source: Path, folder: Path, config: StageConfig, inputs: dict[str, str]) -> bool:
    """Copy a stage that fits; the copy is what is checked, since the source may change meanwhile."""
    if source == folder or not (source / "done.json").exists() or changes(source, config, inputs):
        return False
    with TemporaryDirectory(dir=folder.parent, prefix=".reusing-") as temporary:
        copy = Path(temporary) / folder.name
        try:
            _copy(source, copy)
            if not is_done(copy, config, inputs):
                return False
            for companion in COMPANIONS.get(folder.name, ()):
                if (source.parent / companion).is_dir():
                    _copy(source.parent / companion, folder.parent / companion)
        except OSError:  # the source is being replaced, or the disk is full, which the run itself will report
            return False
        copy.rename(folder)
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a folder without unfinished files; existing files stay."""
    unfinished = shutil.ignore_patterns(".*.part", ".claims", ".locks")
    shutil.copytree(source, target, symlinks=True, ignore=unfinished, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    if Path(target).exists():
        return
    with suppress(OSError):  # another file system, or one without links
        if source.endswith(LINKED):
            os.link(source, target)
            return
    shutil.copy2(source, target)
