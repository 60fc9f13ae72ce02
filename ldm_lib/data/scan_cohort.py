"""Make a training cohort from skull-stripped scans of healthy people: real anatomy with a grown tumour and masks.

`person` makes each one, a function of (seed, id, scan): the files do not depend on the other scans, the workers or
interruptions.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ldm_lib.anatomy.registration import Registration
from ldm_lib.anatomy.synthetic_brain import brats_grid
from ldm_lib.data.layouts import CONDITIONING_FOLDERS, DEFAULT_CONDITIONING, Exclusion, Scan, list_scans
from ldm_lib.data.patients import patient_of
from ldm_lib.data.person import align_head, make_person, read_head
from ldm_lib.data.synthetic_cohort import SyntheticPatient, write_training_files
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.files import expand_path, read_json, sha256, write_csv, write_json
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.locking import FolderLock
from ldm_lib.process_control import parallel_map
from ldm_lib.progress import Progress

CODE_VERSION = 4  # raise it when a person would come out differently
MOST_MASKS = 8  # all masks of a person are hidden at once from the registration of the tissue map
STAGING = ".unfinished"
COLUMNS = ("case", "patient", "file", "spacing_mm", "orientation", "brain_ml", "turned_degrees", "brain_dice",
           "correlation", "tumour_ml", "mask_ml")  # fmt: skip
Draw = Callable[..., Any]


def make_scan_cohort(
    source: str | Path,
    folder: str | Path,
    *,
    masks: int = 3,
    seed: int = 0,
    spacing_mm: float = 1.0,
    workers: int = 1,
    limit: int = 0,
    read_options: ReadOptions = READ_STRICTLY,
    draw: Draw | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[dict[str, Any]], list[Exclusion]]:
    """Write a training cohort made from skull-stripped T1w scans of healthy people.

    The cases are in `<folder>/data`, their growth and tissue maps in `<folder>/conditioning_data`, a row per person in
    `cohort.csv` and a reason per scan that was excluded in `exclusions.csv`. A person who is finished is not made
    again, unless the scan, a setting or the code has changed. All time points of a person are of one patient.

    Args:
        source: folder of NIfTI files, or a BIDS data set; any grid, orientation and voxel size.
        masks: healthy masks per person, 1 to 8, each in a case of its own.
        spacing_mm: isotropic voxel size of the cases; 1 is the BraTS grid of 240 x 240 x 155 voxels.
        workers: processes that make the people; 1 makes them in this process. The files do not depend on it.
        limit: number of scans to take, in order of id; 0 takes all.
        read_options: how input validation is relaxed.
        draw: draws the registration of each person to a file, such as `plots.figures.save_planes`; it is called with
            the path, a title and the arguments of `Registration.plot_arguments`.
        say: receives a line for each person, instead of the bar, or the lines every 30 s, on standard error.

    Returns:
        A row per person, and what was excluded.

    Raises:
        InputError: no scan, two files of one id, or no usable person.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from ldm_lib.data.synthetic_cohort import make_synthetic_cohort
        >>> with TemporaryDirectory() as folder:
        ...     patients = make_synthetic_cohort(folder, 1, spacing_mm=8, masks=0)
        ...     scans = f"{folder}/data/{patients[0]}"
        ...     people, exclusions = make_scan_cohort(scans, f"{folder}/people", spacing_mm=8, masks=1)
        >>> [row["case"] for row in people], exclusions
        (['Synthetic_08000'], [])
    """
    if not (1 <= masks <= MOST_MASKS and workers >= 1 and min(seed, limit) >= 0 and 0.5 <= spacing_mm <= 12):
        given = f"masks {masks}, seed {seed}, spacing_mm {spacing_mm:g}, workers {workers}, limit {limit}"
        allowed = f"masks 1 to {MOST_MASKS}, spacing_mm 0.5 to 12, workers from 1, seed and limit from 0"
        raise ConfigError(f"{given} given; allowed are {allowed}", where="make_scan_cohort")
    scans, folder = list_scans(source), expand_path(folder)
    scans = scans[: limit or None]
    lock = FolderLock(folder)
    try:
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a call that was killed
        for scan in scans:
            _require_ours(folder, scan)
        settings = {"masks": masks, "seed": seed, "spacing_mm": spacing_mm}
        settings |= read_options.model_dump(exclude_defaults=True)
        make, records = partial(_finish, folder=folder, settings=settings, draw=draw), []
        with Progress(len(scans), name="scan", say=say) as progress:
            for number, record in enumerate(parallel_map(make, scans, workers), start=1):
                records.append(record)
                progress.update(number, _summary(record))
    finally:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        lock.release()
    return _tables(folder, records)


def _summary(record: dict[str, Any]) -> str:
    """Return one line on one person."""
    if record["excluded"]:
        return f"EXCLUDED {record['excluded']}"
    row = record["row"]
    figures = f"turned by {row['turned_degrees']:g} degrees, tumour {row['tumour_ml']:g} mL, masks {row['mask_ml']} mL"
    return f"OK {record['id']}: {figures}"


def _tables(folder: Path, records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Exclusion]]:
    """Write cohort.csv and exclusions.csv, and return what they hold."""
    rows = [{name: record["row"][name] for name in COLUMNS} for record in records if not record["excluded"]]
    exclusions = [Exclusion(record["id"], record["excluded"]) for record in records if record["excluded"]]
    write_csv(folder / "cohort.csv", rows, COLUMNS)
    write_csv(folder / "exclusions.csv", [vars(e) for e in exclusions], [f.name for f in fields(Exclusion)])
    if not rows:
        raise InputError(f"0 of {len(records)} scans are usable", where=folder, fix="see exclusions.csv there")
    return rows, exclusions


# ---- files of one person


def _record_path(folder: Path, identity: str, *, excluded: bool) -> Path:
    return folder / "excluded" / f"{identity}.json" if excluded else folder / "data" / identity / f"{identity}.json"


def _read_record(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the record of a person, who was made or excluded; None if there is none."""
    for excluded in (False, True):
        try:
            return read_json(_record_path(folder, identity, excluded=excluded))
        except ValueError:
            continue
    return None


def _require_ours(folder: Path, scan: Scan) -> None:
    place = folder / "data" / scan.id
    if place.exists() and not _record_path(folder, scan.id, excluded=False).is_file():
        raise InputError("exists and was not made from a scan", where=place, fix="name another output folder")


@dataclass
class _Outcome:
    """Hold what became of one scan: a patient, or the reason why there is none."""

    made: SyntheticPatient | None = None
    row: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    registration: Registration | None = None  # that the picture shows: the last one


def _make(scan: Scan, *, masks: int, seed: int, spacing_mm: float, **reading: Any) -> _Outcome:
    outcome, grid = _Outcome(), brats_grid(spacing_mm)
    try:
        head = read_head(scan.path, ReadOptions(**reading))
        registration = outcome.registration = head.register()
        aligned = align_head(head, registration, grid, where=scan.path)
        made, outcome.registration = make_person(aligned, scan.id, grid, seed=seed, masks=masks)
    except InputError as error:
        outcome.reason = error.within(scan.path.parent)
        return outcome
    voxel_ml = spacing_mm**3 / 1000
    outcome.made = made
    outcome.row = {
        "case": scan.id,
        "patient": patient_of(scan.id),
        "file": scan.path.name,
        **head.facts,
        "turned_degrees": round(aligned.turned_degrees, 1),
        "brain_dice": round(registration.brain_dice, 3),
        "correlation": round(registration.correlation, 3),
        "tumour_ml": round(float(made.segmentation.sum()) * voxel_ml, 1),
        "mask_ml": " ".join(f"{healthy.sum() * voxel_ml:.1f}" for healthy, _ in made.masks),
    }
    return outcome


def _finish(scan: Scan, *, folder: Path, settings: dict[str, Any], draw: Draw | None) -> dict[str, Any]:
    """Make one person, unless finished already, and return the record."""
    claim = {"id": scan.id, "from": _digest(scan.path), "settings": settings, "version": CODE_VERSION}
    record = _read_record(folder, scan.id)
    if record and all(record.get(name) == value for name, value in claim.items()) and _undamaged(folder, record):
        return record
    outcome = _make(scan, **settings)
    if draw and outcome.registration:
        picture = folder / "pictures" / f"{scan.id}.png"
        picture.parent.mkdir(exist_ok=True)
        draw(picture, title=scan.id, **outcome.registration.plot_arguments())
    record, staging = claim | {"excluded": outcome.reason, "row": outcome.row}, folder / STAGING / scan.id
    staging.mkdir(parents=True)
    if outcome.made:
        files = write_training_files(staging, scan.id, outcome.made)
        record["outputs"] = {path.relative_to(staging).as_posix(): sha256(path) for path in files}
        write_json(_record_path(staging, scan.id, excluded=False), record)
    _withdraw(folder, scan.id, staging)
    if outcome.made:
        _publish(folder, scan.id, staging)
    else:
        path = _record_path(folder, scan.id, excluded=True)
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
    shutil.rmtree(staging)
    return record


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:  # excluded with its reason when it is read
        return f"unreadable: {type(error).__name__}"


def _undamaged(folder: Path, record: dict[str, Any]) -> bool:
    outputs = record.get("outputs", {})
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in outputs.items())


def _withdraw(folder: Path, identity: str, staging: Path) -> None:
    """Remove a person who was made with other settings: the cases at once, then their maps."""
    if (cases := folder / "data" / identity).exists():
        cases.rename(staging / "replaced")
    for name in CONDITIONING_FOLDERS.values():
        (folder / DEFAULT_CONDITIONING / name / f"{identity}.nii.gz").unlink(missing_ok=True)
    _record_path(folder, identity, excluded=True).unlink(missing_ok=True)


def _publish(folder: Path, identity: str, staging: Path) -> None:
    """Move a person into place: the maps first, then all cases and the record at once."""
    inner = [Path(DEFAULT_CONDITIONING, name, f"{identity}.nii.gz") for name in CONDITIONING_FOLDERS.values()]
    for path in (*inner, Path("data", identity)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).rename(folder / path)
