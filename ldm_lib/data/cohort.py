"""Find, check and split the cases of a folder, in one of the layouts that `layouts` describes."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.data import bids
from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.layouts import Exclusion, list_cases, list_scans, listing
from ldm_lib.errors import InputError
from ldm_lib.files import digests, expand_path, fingerprint, sha256
from ldm_lib.images.image_files import require_file
from ldm_lib.images.options import READ_STRICTLY, ReadOptions

log = logging.getLogger("ldm_lib")

MAPS = ("growth", "tissue")


def find_cases(
    data_dir: str | Path,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
) -> list[Case]:
    """Find the cases of a folder: every mask of every patient, in order of id.

    No voxel is read. Every folder that cannot be used as a case is logged as a warning.

    Args:
        data_dir: folder that holds one folder per patient.
        conditioning_dir: folder of growth and tissue maps; empty looks for `conditioning_data` in `data_dir` and next
            to it.
        patients_file: CSV file with the columns `case` and `patient`, of cases whose names do not say their patient.

    Raises:
        InputError: the folder does not exist or holds no case at all.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 1, spacing_mm=8, masks=2)
        ...     cases = find_cases(f"{folder}/data")
        >>> [case.key for case in cases]
        ['Synthetic_08000-0000', 'Synthetic_08000-0001']
    """
    cases, exclusions = survey_cases(data_dir, conditioning_dir, read_options, patients_file)
    for exclusion in exclusions:
        log.warning("%s", exclusion.reason)
    return cases


def survey_cases(
    data_dir: str | Path,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
) -> tuple[list[Case], list[Exclusion]]:
    """Find the cases of a folder as `find_cases` does, and return what was excluded as well."""
    cases, exclusions = _search(data_dir, conditioning_dir, read_options, patients_file)
    if not cases:
        raise _nothing_found(data_dir, exclusions)
    return cases, exclusions


def _search(
    data_dir: str | Path, conditioning_dir: str | Path, read_options: ReadOptions, patients_file: str | Path
) -> tuple[list[Case], list[Exclusion]]:
    """List the cases in either layout, else those of a BIDS data set, and what cannot be used; both may be empty."""
    found = list_cases(data_dir, conditioning_dir, read_options, patients_file)
    if found[0]:
        return found
    in_bids = bids.list_cases(data_dir, conditioning_dir, read_options)
    return in_bids if any(in_bids) else found


def _nothing_found(data_dir: str | Path, exclusions: Sequence[Exclusion]) -> InputError:
    reasons = "".join(f"; {e.case}: {e.reason}" for e in exclusions[:3])
    of_one = any(expand_path(data_dir).glob("*-mask*.[nm]*"))
    usual = "give a folder with one folder for each patient (see `ldm validate --help`)"
    fix = "give the folder above this one, which is of one patient" if of_one else usual
    cause = f"looked for */<ID>-mask*.nii.gz, found 0 cases; present: {listing(data_dir)}{reasons}"
    return InputError(cause, where=data_dir, fix=fix)


def split_patients(patients: Iterable[str], *, seed: int, validation_fraction: float) -> dict[str, list[str]]:
    """Split patients into {"train": [...], "validation": [...]} by id and seed alone, at least one on each side."""
    unique = sorted(set(patients))
    if len(unique) < 2:
        raise InputError(f"{len(unique)} patient, need at least 2 to train on one and validate on another",
                         fix="add patients, or use `inpaint` with trained weights")  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(unique))
    count = min(max(1, round(validation_fraction * len(unique))), len(unique) - 1)
    chosen = {unique[i] for i in order[:count]}
    return {"train": [p for p in unique if p not in chosen], "validation": [p for p in unique if p in chosen]}


def with_target(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that have their full image, which training and validation need; at least one.

    Raises:
        InputError: no such case, or something that is no case of `find_cases`.
    """
    cases = list(cases) if isinstance(cases, Iterable) else [cases]
    for each in cases:
        if not isinstance(each, Case):
            raise InputError(f"needs cases, not {type(each).__name__}", where="cases", fix="take find_cases(folder)")
    found = [case for case in cases if case.t1n]
    if not found:
        raise InputError(f"none of {len(cases)} cases has a t1n next to its t1n-voided", where="cases",
                         fix="give cases with their full image; `inpaint` needs none")  # fmt: skip
    return found


@dataclass(frozen=True)
class AuditRow:
    """Hold the result of validating one case: "ok", "warning" or "refused", the reason, and what was read."""

    key: str
    status: str
    reason: str
    case: Case | None
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a line of a table."""
        return {"case": self.key, "status": self.status, **self.facts, "reason": self.reason}


@dataclass(frozen=True)
class Audit:
    """Validate the cases of a folder: the number of rows is known at once, a case is read when its row is due."""

    cases: Sequence[Case]
    exclusions: Sequence[Exclusion]

    def __len__(self) -> int:
        return len(self.cases) + len(self.exclusions)

    def __iter__(self) -> Iterator[AuditRow]:
        """Yield one row a case; a rejected case does not stop the pass, and memory holds one case at a time."""
        for exclusion in self.exclusions:
            yield AuditRow(exclusion.case, "refused", exclusion.reason, None, {})
        owners: dict[bytes, Case] = {}
        held = {role for case in self.cases for role in case.files()}
        for case in self.cases:
            try:
                data = load_case(case)
                _require_new(data, owners)
            except InputError as error:
                yield AuditRow(case.key, "refused", error.within(*case.folders), case, {})
            except (OSError, MemoryError) as error:
                cause, fix = f"could not be read ({type(error).__name__})", "check the disk and the memory"
                yield AuditRow(case.key, "refused", str(InputError(cause, where=case.key, fix=fix)), case, {})
            else:
                lacking = (
                    f"no {kind} map, which other cases have" for kind in MAPS if kind in held - set(case.files())
                )
                warnings = "; ".join((*data.warnings, *lacking))
                status = "warning" if warnings else "ok"
                yield AuditRow(case.key, status, warnings, case.with_digests(), _facts(data))


def audit(
    data_dir: str | Path,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
) -> Audit:
    """Validate every case of a folder: iterate over the result for one row a case.

    Raises:
        InputError: the folder does not exist, or holds nothing that looks like a case.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 1, spacing_mm=8, masks=1)
        ...     rows = list(audit(f"{folder}/data"))
        >>> [(row.key, row.status, row.facts["shape"]) for row in rows]
        [('Synthetic_08000-0000', 'ok', '30x30x20')]
    """
    cases, exclusions = _search(data_dir, conditioning_dir, read_options, patients_file)
    if not cases and not exclusions:
        raise _nothing_found(data_dir, exclusions)
    return Audit(cases, exclusions)


def _require_new(data: CaseData, owners: dict[bytes, Case]) -> None:
    """Raise InputError for an image of another patient id: one might be used to train, the other to validate."""
    if data.target is None:
        return
    digest = hashlib.sha256(np.ascontiguousarray(data.target.T)).digest()
    owner = owners.setdefault(digest, data.case)
    if owner.patient != data.case.patient:
        fix = "remove one, or name both as of one patient with --patients"
        cause = f"holds the same voxels as the t1n of {owner.id}: one patient under two names"
        raise InputError(cause, where=data.case.t1n, fix=fix)


def _facts(data: CaseData) -> dict[str, Any]:
    voxel_ml = float(np.prod(data.source.spacing_mm)) / 1000
    return {
        "patient": data.case.patient,
        "shape": "x".join(map(str, data.source.shape)),
        "spacing_mm": data.source.spacing_mm[0],
        "orientation": data.source.orientation,
        "dtype": str(data.source.raw.dtype),
        "scale": data.scale,
        "mask_ml": round(float(data.mask.sum()) * voxel_ml, 1),
        "healthy_ml": None if data.healthy is None else round(float(data.healthy.sum()) * voxel_ml, 1),
        "growth": data.growth is not None,
        "tissue": data.tissue is not None,
    }


def source_digests(
    data_dir: str | Path,
    conditioning_dir: str | Path = "",
    brains_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
) -> dict[str, str]:
    """Return {"data": digest of the bytes of every file of every case, or scan}; empty for the synthetic cohort."""
    if brains_dir:
        return {"data": fingerprint({scan.id: _digest(scan.path) for scan in list_scans(brains_dir)})}
    if not data_dir:
        return {}
    cases, _ = _search(data_dir, conditioning_dir, read_options, patients_file)
    found = {"data": fingerprint({c.key: {role: _digest(path) for role, path in c.files().items()} for c in cases})}
    return found | digests(str(patients_file))


def _digest(path: Path) -> str:
    try:
        require_file(path)
        return sha256(path)
    except (InputError, OSError) as error:  # rejected with its reason when it is read
        return f"unreadable: {type(error).__name__}"
