"""Inpaint many cases, each once: an interrupted call continues, and a case that fails does not stop the others.

`filled/<case>.json` records the library's version and the digests of what a result was made from and of the files
written: a case whose record and files agree is not inpainted again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.cohort import survey_cases
from ldm_lib.data.layouts import require_outside
from ldm_lib.diffusion.samplers import check_sampler
from ldm_lib.errors import InputError, LdmError
from ldm_lib.files import expand_path, fingerprint, read_json, require_writable, sha256, write_csv, write_json
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.inpainting.derivatives import describe_data_set, write_sidecars
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.result import BRAIN, page_path, require_page, result_path, sidecar_path, summary_path
from ldm_lib.inpainting.summary import write_summary
from ldm_lib.locking import FolderLock
from ldm_lib.progress import Progress, report
from ldm_lib.version import __version__

RECORDS, TABLE = "filled", "results.csv"
MOST_READERS = 4  # each holds a case
PARTIAL = (  # files of a killed process
    ".*.nii.gz.*.part", ".*.html.*.part", "sub-*/**/.*.part", f"{RECORDS}/.*.json.*.part", f".{TABLE}.*.part",
)  # fmt: skip
FILLED, FOUND, REFUSED = "filled", "found", "refused"
Row = dict[str, Any]


def inpaint_folder(
    data_dir: str | Path,
    output: str | Path,
    options: InpaintOptions,
    *,
    conditioning_dir: str | Path = "",
    read_options: ReadOptions = READ_STRICTLY,
    model: str | Path | None = None,
    make_missing: bool | None = None,
    each: bool = False,
    dilate: int = 0,
    summary: bool = False,
    page: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Inpaint every case of a folder, in either layout or as BIDS, and write `results.csv` with a row for each.

    The same call continues where an interrupted one stopped. A finished result that lacks a summary or a page is made
    again where one is asked for.

    Args:
        output: takes `<ID>-t1n-inference.nii.gz`, or BIDS derivatives (`inpainting.derivatives`), and for
            several samples the other files of `Inpainting.save`.
        make_missing: make the tissue maps that cases lack from their scans; None makes them if the model needs them.
        each: write every sample.
        dilate: voxels by which masks grow in every direction before they are inpainted.
        summary: write the tissue labels and the summary of each result (`inpainting.summary`), too.
        page: write an HTML page of each result (`Inpainting.page`), too.

    Returns:
        rows as of `fill_cases`, first those of folders that hold no case.

    Raises:
        LdmError: no case at all, no model, or an output folder that cannot be used.
    """
    root, output = expand_path(data_dir), expand_path(output)
    require_outside(output, root)
    cases, exclusions = survey_cases(root, conditioning_dir, read_options)
    inpainter = Inpainter.for_sampling(model, options)
    lock = FolderLock(output)
    try:
        require_writable(output / TABLE)
        for pattern in (*PARTIAL, TABLE):
            for path in output.glob(pattern):
                path.unlink()
        rows = [_failed(exclusion.case, exclusion.reason) for exclusion in exclusions]
        for row in rows:
            (say or partial(report, error=True))(_line(row))
        cases = [replace(case.to_inpaint(), dilate=dilate) for case in cases]
        if any(case.derivative for case in cases):
            describe_data_set(output, root, labels=summary)
        wanted = {"make_missing": make_missing, "each": each, "summary": summary, "page": page}
        rows += fill_cases(inpainter, cases, options, output, **wanted, say=say)
        write_csv(output / TABLE, rows)
    finally:
        lock.release()
    return rows


def fill_cases(
    inpainter: Inpainter,
    cases: Sequence[Case],
    options: InpaintOptions,
    folder: Path,
    *,
    make_missing: bool | None = None,
    each: bool = True,
    summary: bool = False,
    page: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Inpaint each case that has no result in a folder yet, and show the progress with the time that is left.

    Args:
        say: receives a line for each case, instead of the bar, or the lines every 30 s, on standard error.

    Returns:
        a row for each case, in order: "case", "status" (filled, found or refused), "result", "spread" (mean standard
        deviation in the mask over the case's scale), "seconds" and "reason".

    Raises:
        ConfigError: a sampler or number of steps that this model cannot take.
    """
    check_sampler(*options.method, inpainter.model.schedule)  # once, not for each case
    if page:
        require_page(folder / f"{RECORDS}.html")
    records = folder / RECORDS
    if records.is_symlink() or (records.exists() and not records.is_dir()):
        raise InputError("is not a folder of its own", where=records, fix="remove it, or name another output")
    records.mkdir(parents=True, exist_ok=True)
    rows = []
    job = Job(inpainter, options, folder, inpainter.makes_maps(make_missing), each, summary, page)
    with Progress(len(cases), name="case", say=say) as progress:
        for k, row in enumerate(_results(job, cases), start=1):
            rows.append(row)
            if row["status"] == REFUSED and not say:
                report(_line(row), error=True)
            progress.update(k, _line(row), skipped=row["status"] != FILLED)
    return rows


def require_all(rows: Sequence[Row]) -> None:
    """Raise, with the first reason, unless every case has a result."""
    if failed := [row for row in rows if row["status"] == REFUSED]:
        raise InputError(f"{len(failed)} of {len(rows)} cases failed; {_line(failed[0])}",
                         where=RECORDS, fix="correct or remove them; finished results are kept")  # fmt: skip


def require_recorded(cases: Sequence[Case], folder: Path) -> None:
    """Raise if another process could not inpaint one of its cases."""
    if missing := [case.key for case in cases if not record_path(case, folder).exists()]:
        cause = f"{len(missing)} of {len(cases)} cases have no result, the first {missing[0]}"
        raise InputError(cause, where=folder.name, fix="see the messages of the process that failed")


def record_path(case: Case, folder: Path) -> Path:
    """Return the record of a case's result."""
    return folder / RECORDS / f"{case.key}.json"


class Record(BaseModel):
    """Hold what a result was made from, the library's version, the digests of its files by name, and its row."""

    made_from: str = ""
    version: str = ""  # says where a result comes from; another version does not make it again
    outputs: dict[str, str] = {}
    row: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """Read, inpaint and write one case after the other."""

    inpainter: Inpainter
    options: InpaintOptions
    folder: Path
    make_missing: bool
    each: bool
    summary: bool = False
    page: bool = False

    def read(self, case: Case) -> tuple[Row | None, CaseData | None, str, float]:
        """Return the row of a case that has its result, or its data; the digest of its sources; seconds."""
        started, case = time.monotonic(), case.with_digests()
        made_from = self._made_from(case)
        row = self._found(case, made_from)
        data = None if row else self.inpainter.prepare(load_case(case), make_missing=self.make_missing)
        return row, data, made_from, time.monotonic() - started

    def fill(self, data: CaseData, made_from: str, started: float) -> Row:
        """Inpaint a case, write the result and, last, its record; return its row."""
        case = data.case
        try:
            result = self.inpainter(data, make_missing=False, **self.options.sampling)
        except RuntimeError as error:  # torch has no type of its own for a full memory of a CPU
            if "memory" not in str(error):
                raise
            raise InputError("not enough memory", where=case.key, fix="take fewer samples") from error
        output = self.folder / case.result_name
        output.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("", "std", "nearest", "sample-*", "dseg", BRAIN):  # of other settings: none may stay
            for path in output.parent.glob(result_path(output, kind).name):
                if not path.is_dir():
                    path.unlink()
                    sidecar_path(path).unlink(missing_ok=True)
        for path in (summary_path(output), page_path(output)):
            path.unlink(missing_ok=True)
        written = result.save(output, samples=self.each)
        if case.derivative:
            written += write_sidecars(self.inpainter, self.options, result, written)
        if self.summary:
            written += write_summary(self.inpainter, self.options, result, output)
        if self.page:
            written.append(result.page(page_path(output)))
        std = float(result.std[data.mask].mean() / data.scale)
        seconds = round(time.monotonic() - started, 2)
        row = _row(case.key, FILLED, result=case.result_name, spread=std, seconds=seconds)
        outputs = {path.relative_to(self.folder).as_posix(): sha256(path) for path in written}
        record = Record(made_from=made_from, version=__version__, outputs=outputs, row=row)
        write_json(record_path(case, self.folder), record.model_dump())
        return row

    def _found(self, case: Case, made_from: str) -> Row | None:
        """Return the row of a result of the same files, weights and settings whose files are whole."""
        try:
            record = Record(**read_json(record_path(case, self.folder)))
        except ValueError:  # missing or damaged
            return None
        result = Path(case.result_name)
        wanted = [result] + [summary_path(result)] * self.summary + [page_path(result)] * self.page
        if record.made_from != made_from or not {path.as_posix() for path in wanted} <= set(record.outputs):
            return None
        paths = {self.folder / name: digest for name, digest in record.outputs.items()}
        if not all(path.is_file() and sha256(path) == digest for path, digest in paths.items()):
            return None
        numbers = {name: record.row.get(name) for name in ("spread", "seconds")}
        return _row(case.key, FOUND, result=case.result_name, **numbers)

    def _made_from(self, case: Case) -> str:
        model, sampling = self.inpainter.model, self.options.sampling
        settings = {"make_missing": self.make_missing, "each": self.each, "precision": model.precision}
        settings |= {"samples": sampling.pop("n_samples"), **sampling}
        settings |= {"blend_mm": self.options.blend_mm, "detail": self.options.detail, "temperature": model.temperature}
        description = {"cells": model.spec.model_dump(), "schedule": model.denoiser.folder_config["schedule"]}
        description |= {name: getattr(model, name) for name in ("crop", "box_margin", "prediction")}
        weights = [network.folder_config["sha256"] for network in (model.denoiser, model.autoencoder)]
        settings |= {"read_options": case.read_options.model_dump()} if case.read_options != READ_STRICTLY else {}
        settings |= {"dilate": case.dilate} if case.dilate else {}
        sources = {"weights": weights, "model": description, "files": dict(case.digests)}
        return fingerprint(sources | {"settings": settings})


def _results(job: Job, cases: Sequence[Case]) -> Iterator[Row]:
    """Yield the rows of the cases in order, each once its files are written; the next cases are read meanwhile.

    Reading takes long where the atlas is registered. On a CPU several cases are therefore read at once, each by a
    thread of its own that computes with one core.
    """
    threads = torch.get_num_threads()
    readers = min(threads, MOST_READERS) if job.inpainter.model.device.type == "cpu" else 1
    try:
        with ThreadPoolExecutor(readers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead = deque(pool.submit(job.read, case) for case in cases[:readers])
            for k, case in enumerate(cases):
                reading = ahead.popleft()
                ahead.extend(pool.submit(job.read, later) for later in cases[k + readers : k + readers + 1])
                yield _result(job, case, reading)
    finally:
        torch.set_num_threads(threads)  # a thread that is started sets the number for those that follow, too


def _result(job: Job, case: Case, reading: Future) -> Row:
    try:
        row, data, made_from, seconds = reading.result()
        started = time.monotonic() - seconds
        return row or job.fill(data, made_from, started)
    except LdmError as error:
        return _failed(case.key, error.within(*case.folders, job.folder))  # no path of this machine
    except (OSError, MemoryError) as error:
        cause = getattr(error, "strerror", "") or "not enough memory"
        return _failed(case.key, str(InputError(cause, where=case.key, fix="check the disk and the memory")))


def _row(key: str, status: str, **values: Any) -> Row:
    return {"case": key, "status": status, "result": "", "spread": None, "seconds": None, "reason": ""} | values


def _failed(key: str, reason: str) -> Row:
    return _row(key, REFUSED, reason=reason)


def _line(row: Row) -> str:
    if row["status"] == REFUSED:
        return f"{row['case']}: rejected: {row['reason']}"
    return f"{row['case']}: {row['status']}" + (f" in {row['seconds']:.1f} s" if row["status"] == FILLED else "")
