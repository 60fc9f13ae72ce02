"""Fill many cases, each once whoever is interrupted, while the next is read and the last is written.

A sample depends on its case, its number and the seed alone, so that a case comes out the same whenever and by whomever
it is filled. What is filled is noted in `filled/<case>.json`, with digests of what it was made from and of what was
written: a case whose record and files agree is not filled again. A case that cannot be filled does not stop the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.cohort import survey_cases
from ldm_lib.data.layouts import require_outside
from ldm_lib.data.nifti import stem
from ldm_lib.data.options import READ_STRICTLY, ReadOptions
from ldm_lib.diffusion.samplers import check_sampler
from ldm_lib.errors import InputError, LdmError
from ldm_lib.files import fingerprint, given_path, read_json, require_writable, sha256, write_csv, write_json
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.preprocess import Inpainting
from ldm_lib.inpainting.single_file import make_ready, write_result
from ldm_lib.locking import FolderLock

RECORDS, TABLE = "filled", "results.csv"
FILLED, FOUND, REFUSED = "filled", "found", "refused"
REFUSALS = (LdmError, OSError, MemoryError)  # of one case: the others go on
Row = dict[str, Any]
_print = partial(print, flush=True)


def inpaint_folder(
    data_dir: str | Path,
    output: str | Path,
    config: InpaintOptions,
    *,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    model: str | Path | None = None,
    make_missing: bool | None = None,
    each: bool = False,
    say: Callable[[str], None] = _print,
) -> list[Row]:
    """Fill every case of a folder, in either layout, and write `results.csv` with a row for each.

    The same call goes on where an interrupted one stopped.

    Args:
        output: takes `<ID>-t1n-inference.nii.gz`, and with several samples what `write_filled` writes beside it.
        config: samples, seed, sampler, steps, guidance, device and precision.
        allow: what the gate is to let pass, and how it is read then.
        make_missing: make the tissue maps that cases lack from their scans; None: if the model needs them.
        each: write every sample.

    Returns:
        rows as of `fill_cases`, first those of folders that hold no case.

    Raises:
        LdmError: no case at all, no model, or an output folder that cannot be used.
    """
    root, output = given_path(data_dir), given_path(output)
    require_outside(output, root)
    cases, exclusions = survey_cases(root, conditioning_dir, read_options)
    inpainter = Inpainter.for_sampling(model, config)
    lock = FolderLock(output)
    try:
        require_writable(output / TABLE)
        _clear(output)
        rows = [_refused(exclusion.case, exclusion.reason) for exclusion in exclusions]
        for row in rows:
            say(_told(row))
        cases = [case.to_fill() for case in cases]
        rows += fill_cases(inpainter, cases, config, output, make_missing=make_missing, each=each, say=say)
        write_csv(output / TABLE, rows)
    finally:
        lock.release()
    return rows


def _clear(output: Path) -> None:
    """Remove what a killed process left half-written, and the table of an earlier call."""
    for pattern in (".*.nii.gz.*.part", f"{RECORDS}/.*.json.*.part", f".{TABLE}.*.part", TABLE):
        for path in output.glob(pattern):
            path.unlink()


def fill_cases(
    inpainter: Inpainter,
    cases: Sequence[Case],
    config: InpaintOptions,
    folder: Path,
    *,
    make_missing: bool | None = None,
    each: bool = True,
    say: Callable[[str], None] = _print,
) -> list[Row]:
    """Fill each case that is not filled yet.

    Args:
        folder: takes the results and their records.
        each: write every sample.
        say: is told a line a case, with the time that is left.

    Returns:
        a row for each case, in order: "case", "status" (filled, found or refused), "result", "spread" (mean standard
        deviation in the hole over the case's scale), "seconds" and "reason".

    Raises:
        ConfigError: a sampler or number of steps that this model cannot take.
    """
    check_sampler(config.sampler, config.num_inference_steps, inpainter.model.schedule)  # refused now, not once a case
    _make_room(folder / RECORDS)
    rows, started, filled = [], time.monotonic(), 0
    job = Job(inpainter, config, folder, inpainter.makes_maps(make_missing), each)
    for k, row in enumerate(_in_turn(job, cases), start=1):
        rows.append(row)
        filled += row["status"] == FILLED
        behind = len(cases) - k - 1  # the next one has been filled by the time this one is on the disk
        left = timedelta(seconds=round((time.monotonic() - started) / (filled + 1) * behind))
        told = f", {left} left" if filled and behind >= 0 else ""
        say(f"[{k}/{len(cases)}] {_told(row)}{told}")
    return rows


def _make_room(records: Path) -> None:
    if records.is_symlink() or (records.exists() and not records.is_dir()):
        raise InputError("is no folder of this one's own", where=records, fix="remove it, or name another output")
    records.mkdir(parents=True, exist_ok=True)


def require_all(rows: Sequence[Row]) -> None:
    """Refuse, with the first reason, what is not filled altogether."""
    if refused := [row for row in rows if row["status"] == REFUSED]:
        raise InputError(f"{len(refused)} of {len(rows)} cases could not be filled; {_told(refused[0])}",
                         where=RECORDS, fix="mend or remove them; what is filled is kept")  # fmt: skip


def require_recorded(cases: Sequence[Case], folder: Path) -> None:
    """Refuse when another process could not fill one of its cases."""
    if missing := [case.key for case in cases if not record_path(case, folder).exists()]:
        told = f"{len(missing)} of {len(cases)} cases are not filled, the first {missing[0]}"
        raise InputError(told, where=folder.name, fix="see what the process that refused it said")


def record_path(case: Case, folder: Path) -> Path:
    """Where it is noted that a case is filled."""
    return folder / RECORDS / f"{case.key}.json"


@dataclass(frozen=True)
class Job:
    """What is done to each case, in three parts that may overlap from case to case."""

    inpainter: Inpainter
    config: InpaintOptions
    folder: Path
    make_missing: bool
    each: bool

    def read(self, case: Case) -> tuple[Row | None, CaseData | None, str, float]:
        """The row of a case that is filled already, or its data; digest of what it is made from; seconds."""
        started, case = time.monotonic(), case.sealed()
        made_from = self._made_from(case)
        row = self._found(case, made_from)
        data = None if row else make_ready(load_case(case), self.inpainter, make_missing=self.make_missing)
        return row, data, made_from, time.monotonic() - started

    def fill(self, data: CaseData) -> tuple[Inpainting, float]:
        """The samples of a case, and seconds."""
        started, config = time.monotonic(), self.config
        how = {"sampler": config.sampler, "steps": config.num_inference_steps, "guidance": config.guidance}
        try:
            filled = self.inpainter.fill(data, samples=config.samples, seed=config.seed, **how)
        except RuntimeError as error:  # what torch raises, for a processor's memory without a type of its own
            if "memory" not in str(error):
                raise
            raise InputError("not enough memory to fill it", where=data.case.key, fix="take fewer samples") from error
        return filled, time.monotonic() - started

    def write(self, filled: Inpainting, data: CaseData, made_from: str, seconds: float) -> Row:
        """Write the result and, last, its record; return its row."""
        started, case = time.monotonic(), data.case
        for name in self._recorded(case)["outputs"]:  # of other settings: none of them may stay beside the new ones
            (self.folder / name).unlink(missing_ok=True)
        written = write_result(filled, data, self.folder / case.result_name, samples=self.each)
        spread = float(filled.std[data.mask].mean() / data.scale)
        seconds = round(seconds + time.monotonic() - started, 2)
        row = {"case": case.key, "status": FILLED, "result": written[0].name, "spread": spread, "seconds": seconds}
        outputs = {path.name: sha256(path) for path in written}
        write_json(
            record_path(case, self.folder), {"made_from": made_from, "outputs": outputs, "row": row | {"reason": ""}}
        )
        return row | {"reason": ""}

    def _found(self, case: Case, made_from: str) -> Row | None:
        """The row of a case filled from the same files, weights and settings, if its results are still whole."""
        record, folder = self._recorded(case), self.folder
        if record["made_from"] != made_from or case.result_name not in record["outputs"]:
            return None
        if not all((folder / n).is_file() and sha256(folder / n) == d for n, d in record["outputs"].items()):
            return None
        figures = {name: _number(record["row"].get(name)) for name in ("spread", "seconds")}
        return {"case": case.key, "status": FOUND, "result": case.result_name, **figures, "reason": ""}

    def _recorded(self, case: Case) -> dict[str, Any]:
        """The record of a case; one that is not there, or is damaged, is as none."""
        nothing = {"made_from": "", "outputs": {}, "row": {}}
        try:
            record = read_json(record_path(case, self.folder))
        except ValueError:
            return nothing
        known = all(isinstance(record.get(name), type(value)) for name, value in nothing.items())
        return record if known and all(_is_result(name, case) for name in record["outputs"]) else nothing

    def _made_from(self, case: Case) -> str:
        asked = ("samples", "seed", "sampler", "num_inference_steps", "guidance", "blend_mm")
        engine, networks = self.inpainter, (self.inpainter.model.denoiser, self.inpainter.model.autoencoder)
        settings = {"make_missing": self.make_missing, "each": self.each, "precision": engine.model.precision}
        settings |= {name: getattr(self.config, name) for name in asked} | {"temperature": engine.model.temperature}
        model = {"cells": engine.model.spec.model_dump(), "crop": engine.model.crop, "box_margin": engine.model.box_margin,
                 "prediction": engine.model.prediction, "schedule": engine.model.denoiser.folder_config["schedule"]}  # fmt: skip
        weights = [network.folder_config["sha256"] for network in networks]
        settings |= {"read_options": case.read_options.model_dump()} if case.read_options != READ_STRICTLY else {}
        return fingerprint({"weights": weights, "model": model, "files": dict(case.digests), "settings": settings})


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _is_result(name: str, case: Case) -> bool:
    """Whether a file of this name may have been written for a case: never one of another folder's."""
    return Path(name).name == name and name.startswith(stem(Path(case.result_name)))


def _in_turn(job: Job, cases: Sequence[Case]) -> Iterator[Row]:
    """The rows of the cases in order, each once its files are on the disk.

    Any time one case is read ahead and one written behind, so that memory holds three, however many there are.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = [reader.submit(job.read, case) for case in cases[:1]]
        behind: list[tuple[Case, Future]] = []
        for k, case in enumerate(cases):
            reading = ahead.pop()
            ahead += [reader.submit(job.read, later) for later in cases[k + 1 : k + 2]]
            done = _begun(job, writer, reading)
            yield from (_settled(*last, job.folder) for last in behind)
            behind = [(case, done)]
        yield from (_settled(*last, job.folder) for last in behind)


def _begun(job: Job, writer: ThreadPoolExecutor, reading: Future) -> Future:
    """What becomes of a case that is being read: its row once it is written, or why it is refused."""
    done: Future = Future()
    try:
        row, data, made_from, read_s = reading.result()
        if row is None:
            filled, fill_s = job.fill(data)
            return writer.submit(job.write, filled, data, made_from, read_s + fill_s)
        done.set_result(row)
    except REFUSALS as error:
        done.set_exception(error)
    return done


def _settled(case: Case, done: Future, folder: Path) -> Row:
    try:
        return done.result()
    except REFUSALS as error:
        return _refused(case.key, _why(error, case, folder))


def _why(error: Exception, case: Case, folder: Path) -> str:
    """One line, with no path of this machine."""
    if isinstance(error, LdmError):
        return error.within(*case.folders, folder)
    cause = getattr(error, "strerror", "") or "not enough memory"
    return str(InputError(cause, where=case.key, fix="check the disk and the memory"))


def _refused(key: str, reason: str) -> Row:
    return {"case": key, "status": REFUSED, "result": "", "spread": None, "seconds": None, "reason": reason}


def _told(row: Row) -> str:
    """One line about a case."""
    if row["status"] == REFUSED:
        return f"{row['case']}: refused: {row['reason']}"
    return f"{row['case']}: {row['status']}" + (f" in {row['seconds']:.1f} s" if row["status"] == FILLED else "")
