"""Stages that another run has made already: taken over with their `done.json` instead of being made again."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm_lib.experiment.run_folder import changes, is_done
from ldm_lib.experiment.runner import stage_inputs
from ldm_lib.experiment.stages import StageConfig
from ldm_lib.files import now
from ldm_lib.locking import FolderLock

# What a stage leaves beside its folder. Latents are named by what they were made from: what does not fit is not used.
BESIDE = {"03_conditioning": ("maps", "latents")}
# Files that are only ever replaced as a whole, by renaming, never written in place: a link to one is as good as a copy.
LINKED = (".nii.gz", ".safetensors", ".ckpt")


def adopt(
    run_folder: Path, configs: Mapping[str, StageConfig], stages: Sequence[str], donors: Sequence[Path]
) -> dict[str, str]:
    """Take over what a run would make alike, and return stage -> the run it came from.

    Stages are looked at in order, up to the first that must be made: what follows it is made from other files. A stage
    that was begun is left as it is, for the runner to go on with or to refuse.

    Args:
        configs: of the run, stage by stage.
        stages: full names.
        donors: folders of the runs to take from; the first that fits gives.

    Raises:
        LdmError: the run is locked by another process, or a source of it cannot be read.
    """
    lock, taken = FolderLock(run_folder), {}
    try:
        for stage in stages:
            folder = run_folder / stage
            if (folder / "done.json").exists():
                continue
            if folder.exists():
                break
            inputs = stage_inputs(stage, configs[stage], run_folder)
            donor = next((donor for donor in donors if _take(donor, folder, configs[stage], inputs)), None)
            if donor is None:
                break
            taken[stage] = donor.name
            with (run_folder / "log.txt").open("a") as told:
                told.write(f"{now()} INFO {stage} taken over from {donor.name}\n")
    finally:
        lock.release()
    return taken


def _take(donor: Path, folder: Path, config: StageConfig, inputs: dict[str, str]) -> bool:
    """Copy a stage if the donor's is this very one; what is judged is the copy, for the donor may change meanwhile."""
    source = donor / folder.name
    if source == folder or not (source / "done.json").exists() or changes(source, config, inputs):
        return False
    with TemporaryDirectory(dir=folder.parent, prefix=".adopting-") as place:
        copy = Path(place) / folder.name
        try:
            _copy(source, copy)
            if not is_done(copy, config, inputs):
                return False
            for beside in (name for name in BESIDE.get(folder.name, ()) if (donor / name).is_dir()):
                _copy(donor / beside, folder.parent / beside)
        except OSError:  # the donor is being replaced, or the disk is full, which the run itself will tell
            return False
        copy.rename(folder)
    return True


def _copy(source: Path, target: Path) -> None:
    """A folder without files that another process has not finished; what is there already stays."""
    unfinished = shutil.ignore_patterns(".*.part", ".claims", ".locks")
    shutil.copytree(source, target, symlinks=True, ignore=unfinished, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    if Path(target).exists():
        return
    if source.endswith(LINKED):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, target)
