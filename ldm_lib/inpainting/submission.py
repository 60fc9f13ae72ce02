"""Check a folder of results by the rules of the challenge, and pack it into one archive."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm_lib.data.case import Case, load_case
from ldm_lib.data.cohort import find_cases, survey_cases
from ldm_lib.data.layouts import require_outside
from ldm_lib.errors import InputError, LdmError
from ldm_lib.files import expand_path, replacing, require_writable
from ldm_lib.images.grid import EXACT_MM
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import in_format_of, read_volume

PATTERN = "*-t1n-inference*.nii.gz"
OTHER_FILES = ("-std.nii.gz", "-nearest.nii.gz", "-dseg.nii.gz", "-brain-mask.nii.gz")  # of a result; not submitted
LEAST_BRAIN = 0.1  # fraction of a mask that is not air in a result; real healthy masks have three quarters
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in the archive, so that the same results are the same bytes


@dataclass(frozen=True)
class Finding:
    """Describe one case or file; an empty problem means that it may be submitted."""

    name: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem or 'ok'}"


def check(data_dir: str | Path, results: str | Path, read_options: ReadOptions = READ_STRICTLY) -> Iterator[Finding]:
    """Yield one finding for each case of a folder and, last, for each result that belongs to no case.

    Raises:
        InputError: a folder does not exist, or the first holds no case.
    """
    folder = expand_path(results)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix="give the output folder of `inpaint --data`")
    cases, exclusions = survey_cases(data_dir, read_options=read_options)
    yield from (Finding(exclusion.case, exclusion.reason) for exclusion in exclusions)
    for case in cases:
        yield Finding(case.key, _problem(case, folder))
    known = {case.result_name for case in cases}
    for path in sorted(folder.glob(PATTERN)):
        if path.name not in known and not path.name.endswith(OTHER_FILES) and "-sample-" not in path.name:
            yield Finding(path.name, "belongs to no case of the data. Fix: remove it, or give the whole data folder")


def require_archive(output: Path, data_dir: str | Path) -> None:
    """Raise early if the archive may not be written: among the cases, or in place of a result."""
    if output.suffix.lower() != ".zip":
        raise InputError("must end in .zip", where=output, fix="name it so")
    require_outside(output, data_dir)
    require_writable(output)


def pack(
    data_dir: str | Path, results: str | Path, output: str | Path, read_options: ReadOptions = READ_STRICTLY
) -> int:
    """Write the results of every case into a flat zip file, and read it back; return their number."""
    names = sorted(case.result_name for case in find_cases(data_dir, read_options=read_options))
    with replacing(expand_path(output)) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                content = (expand_path(results) / name).read_bytes()
                archive.writestr(zipfile.ZipInfo(name, EPOCH), content)
        with zipfile.ZipFile(partial) as archive:
            if archive.testzip() or archive.namelist() != names:
                raise InputError("cannot be read back", where=output, fix="check the disk")
    return len(names)


def has_several_masks(data_dir: str | Path, read_options: ReadOptions = READ_STRICTLY) -> bool:
    """Return whether file names carry the number of a mask, which the challenge's names do not have."""
    return any(case.index for case in find_cases(data_dir, read_options=read_options))


def _problem(case: Case, folder: Path) -> str:
    """Return how a result differs from its inpainted source other than in the mask; empty if it does not."""
    path = folder / case.result_name
    if not path.exists():
        return f"no {path.name}. Fix: inpaint it"
    try:
        data, result = load_case(case.to_inpaint()), read_volume(path, case.read_options)
    except LdmError as error:
        return str(error)
    source = in_format_of(path, read_volume(data.source.path, case.read_options))  # with the intercept of the file
    if result.shape != source.shape:
        shape, due = ("x".join(map(str, volume.shape)) for volume in (result, source))
        return f"{path.name} has shape {shape}, must have {due}"
    if (apart := np.abs(result.affine - source.affine).max()) > EXACT_MM:
        return f"{path.name} has another affine, {apart:.3g} off"
    if result.raw.dtype != source.raw.dtype:
        return f"{path.name} holds {result.raw.dtype}, must hold {source.raw.dtype}"
    if (result.slope, result.intercept) != (source.slope, source.intercept):
        scaling, due = (f"{volume.slope:g}, {volume.intercept:g}" for volume in (result, source))
        return f"{path.name} is scaled by {scaling}; must be by {due}"
    differs = ~np.isclose(result.raw, source.raw, rtol=0, atol=0, equal_nan=True)
    if changed := int(np.count_nonzero(differs & ~data.mask)):
        return f"{path.name} differs from its source in {changed} voxels outside the mask"
    filled = np.count_nonzero(~np.isin(result.voxels[data.mask], (0, data.source.background)))
    if filled < LEAST_BRAIN * data.mask.sum():
        return f"{path.name} is void under the mask: {filled} of its {int(data.mask.sum())} voxels are not 0"
    return ""
