"""What a sweep came to: one table, one row a run, and one figure, from whatever is done."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.evaluation.case_scores import SAMPLE, mean_of
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.experiment.run_folder import outputs_folder, read_record, tracked
from ldm_lib.experiment.stages import STAGES
from ldm_lib.experiment.sweep_file import Grid, SweepRun
from ldm_lib.files import markdown, replacing, write_csv

EVALUATION = list(STAGES)[-1]
SCORES = {"PSNR": "psnr_01", "SSIM": "ssim", "MSE": "mse"}
LOW, HIGH = " low", " high"
ENDED = "ended with status "  # the last line of a run's log, written when it ended by itself


def sweep_folder(name: str) -> Path:
    """Where a sweep keeps its copy of the grid, its logs, table and figure."""
    return outputs_folder() / "sweeps" / name


def log_path(grid: Grid, run: SweepRun) -> Path:
    """What a run of a sweep printed."""
    return sweep_folder(grid.name) / "logs" / f"{run.name}.txt"


def gather(grid: Grid) -> list[dict[str, Any]]:
    """One row a run, in the grid's order: what varies, the scores found, patients, holes, seconds and state.

    Scores are means over patients with their 95 % bootstrap interval by patient; where stage 06 was not asked for,
    the figures of the last stage's summary stand in their place. Seconds are those of all its stages, also of stages
    that were taken over from another run. A run is `done`, `failed`, or `missing` while it has not ended.
    """
    return [_row(grid, run) for run in grid.runs]


def write_results(grid: Grid) -> str:
    """Gather, write table.csv, table.md and figure.png into the sweep's folder, and return the table as Markdown."""
    rows, folder = gather(grid), sweep_folder(grid.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "table.csv", rows)
    table = markdown(_lines(rows))
    with replacing(folder / "table.md") as partial:
        partial.write_text(f"{table}\n")
    if figure := _figure(grid, rows):
        with replacing(folder / "figure.png") as partial:
            figure.savefig(partial, format="png", dpi=150)
    return table


def _row(grid: Grid, run: SweepRun) -> dict[str, Any]:
    folders = {stage: outputs_folder() / run.name / stage for stage in grid.stages}
    records = [_record(folder, run) for folder in folders.values()]
    row = {"run": run.name} | {parameter: run.value(parameter) for parameter in grid.varying}
    found: dict[str, Any] = {}
    if all(records):
        last = folders[grid.stages[-1]]
        found = _scores(last, grid, run) if last.name == EVALUATION else _figures(last)
    seconds = round(sum(record["seconds"] for record in records if record), 1)
    return row | found | {"seconds": seconds, "state": _state(grid, run, all(records))}


def _record(folder: Path, run: SweepRun) -> dict[str, Any] | None:
    """What a stage left when it ended with the parameters that the grid asks for now."""
    done = folder / "done.json"
    record = read_record(done) if done.exists() else None
    return record if record and record["parameters"] == tracked(run.configs[folder.name]) else None


def _scores(folder: Path, grid: Grid, run: SweepRun) -> dict[str, Any]:
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found: dict[str, Any] = {}
    for label, method in zip(_labels(grid), (SAMPLE, mean_of(run.value("samples"))), strict=True):
        own = [row for row in rows if row["method"] == method]
        for score, column in SCORES.items():
            values = bootstrap_by_patient([float(row[column]) for row in own], [row["patient"] for row in own])
            name = f"{label}: {score}"
            found |= {name: values["mean"], name + LOW: values["low"], name + HIGH: values["high"]}
        found |= {"patients": values["patients"], "holes": values["masks"]}
    return found


def _labels(grid: Grid) -> tuple[str, str]:
    """What our two methods are called in columns; K is told where all runs have the same."""
    samples = {run.value("samples") for run in grid.runs}
    return SAMPLE, mean_of(samples.pop()) if len(samples) == 1 else "mean of K"


def _figures(folder: Path) -> dict[str, float]:
    """The numbers of a stage's summary."""
    return {k: v for k, v in read_record(folder / "summary.json").items() if isinstance(v, int | float)}


def _state(grid: Grid, run: SweepRun, done: bool) -> str:
    if done:
        return "done"
    code = last_words(log_path(grid, run)).removeprefix(ENDED)
    return "failed" if code.lstrip("-").isdecimal() and int(code) else "missing"


def last_words(log: Path, start: str = "") -> str:
    """The last line of a log that starts so; empty if there is none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if line.startswith(start)), "")


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and cells for reading: an interval stands behind its value, in brackets."""
    columns = dict.fromkeys(name for row in rows for name in row if not name.endswith((LOW, HIGH)))
    columns = sorted(columns, key=lambda name: name in ("patients", "holes", "seconds", "state"))
    return [list(columns)] + [[_cell(row, name) for name in columns] for row in rows]


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    told = f"{value:.4g}" if isinstance(value, float) and name != "seconds" else str(value)
    interval = [row.get(name + end, math.nan) for end in (LOW, HIGH)]
    return told if math.isnan(sum(interval)) else f"{told} [{interval[0]:.4g}, {interval[1]:.4g}]"


def _figure(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> Any:
    """PSNR of each run, or the figure nearest to it that the runs have; None if no run has any."""
    from ldm_lib.plots.charts import interval_dots

    names = {name for row in rows for name in row} - {"run", *grid.varying}
    columns, title = {label: f"{label}: PSNR" for label in _labels(grid) if f"{label}: PSNR" in names}, ""
    if columns:
        several = max(row.get("patients", 0) for row in rows) > 1
        title = f": {'mean over patients, bar: 95 % bootstrap interval by patient' if several else 'one patient'}"
    elif not (columns := {name: name for name in sorted(names) if "psnr" in name}):
        return None
    groups = {
        label: [[row.get(name + end, math.nan) for end in ("", LOW, HIGH)] for row in rows]
        for label, name in columns.items()
    }
    labels = [run.name.removeprefix(f"{grid.name}-")[:48] for run in grid.runs]
    notes = [str(row["state"]) for row in rows]
    return interval_dots(groups, names=labels, unit="PSNR, dB (higher is better)", notes=notes, title=grid.name + title)
