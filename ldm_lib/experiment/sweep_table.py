"""Summarise the runs of a sweep that are done in one table, one row a run, and one figure."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.evaluation.case_scores import SAMPLE, mean_of
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.experiment.run_folder import outputs_folder, read_record, tracked
from ldm_lib.experiment.stages import STAGES
from ldm_lib.experiment.sweep_file import Sweep, SweepRun
from ldm_lib.files import markdown, replacing, write_csv

EVALUATION = list(STAGES)[-1]
SCORES = {"PSNR": "psnr_01", "SSIM": "ssim", "MSE": "mse"}
LOW, HIGH = " low", " high"
ENDED = "ended with status "  # the last line of a run's log, written when it ended by itself


def sweep_folder(name: str) -> Path:
    """Return the folder in which a sweep keeps a copy of its file, its logs, table and figure."""
    return outputs_folder() / "sweeps" / name


def log_path(sweep: Sweep, run: SweepRun) -> Path:
    """Return the file that holds the output of a run."""
    return sweep_folder(sweep.name) / "logs" / f"{run.name}.txt"


def results(sweep: Sweep) -> list[dict[str, Any]]:
    """Return one row a run, in the file's order: what varies, scores, patients, masks, seconds and state.

    Scores are means over patients with their 95 % bootstrap interval by patient; without stage 06 they are replaced by
    the numbers in the last stage's summary. A run is `done`, `failed`, or `missing` while it has not ended.
    """
    return [_row(sweep, run) for run in sweep.runs]


def write_results(sweep: Sweep) -> str:
    """Write table.csv, table.md and figure.png into the sweep's folder, and return the table as Markdown."""
    rows, folder = results(sweep), sweep_folder(sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "table.csv", rows)
    columns = dict.fromkeys(name for row in rows for name in row if not name.endswith((LOW, HIGH)))
    columns = sorted(columns, key=lambda name: name in ("patients", "masks", "seconds", "state"))
    table = markdown([columns, *([_text(row, name) for name in columns] for row in rows)])
    with replacing(folder / "table.md") as partial:
        partial.write_text(f"{table}\n")
    if figure := _figure(sweep, rows):
        with replacing(folder / "figure.png") as partial:
            figure.savefig(partial, format="png", dpi=150)
    return table


def last_line(log: Path, start: str = "") -> str:
    """Return the last line of a log with this beginning; empty if there is none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if line.startswith(start)), "")


def _row(sweep: Sweep, run: SweepRun) -> dict[str, Any]:
    folders = [outputs_folder() / run.name / stage for stage in sweep.stages]
    made = [(folder, read_record(folder / "done.json")) for folder in folders if (folder / "done.json").exists()]
    # Only stages that finished with the parameters of this sweep count.
    records = [record for folder, record in made if record["parameters"] == tracked(run.configs[folder.name])]
    done = len(records) == len(folders)
    row = {"run": run.name} | {parameter: run.value(parameter) for parameter in sweep.varying}
    if done and sweep.stages[-1] == EVALUATION:
        row |= _scores(folders[-1], sweep, run)
    elif done:
        summary = read_record(folders[-1] / "summary.json")
        row |= {name: value for name, value in summary.items() if isinstance(value, int | float)}
    status = last_line(log_path(sweep, run)).removeprefix(ENDED)
    failed = status.lstrip("-").isdecimal() and int(status) != 0
    seconds = round(sum(record["seconds"] for record in records), 1)
    return row | {"seconds": seconds, "state": "done" if done else "failed" if failed else "missing"}


def _scores(folder: Path, sweep: Sweep, run: SweepRun) -> dict[str, Any]:
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found: dict[str, Any] = {}
    for label, method in zip(_labels(sweep), (SAMPLE, mean_of(run.value("samples"))), strict=True):
        own = [row for row in rows if row["method"] == method]
        for score, column in SCORES.items():
            values = bootstrap_by_patient([float(row[column]) for row in own], [row["patient"] for row in own])
            name = f"{label}: {score}"
            found |= {name: values["mean"], name + LOW: values["low"], name + HIGH: values["high"]}
        found |= {"patients": values["patients"], "masks": values["masks"]}
    return found


def _labels(sweep: Sweep) -> tuple[str, str]:
    """Return the column labels of the two methods; the second names K if it is the same in all runs."""
    samples = {run.value("samples") for run in sweep.runs}
    return SAMPLE, mean_of(samples.pop()) if len(samples) == 1 else "mean of K"


def _text(row: Mapping[str, Any], name: str) -> str:
    """Return a value as text, its interval behind it in brackets."""
    value = row.get(name, "")
    text = f"{value:.4g}" if isinstance(value, float) and name != "seconds" else str(value)
    low, high = (row.get(name + end, math.nan) for end in (LOW, HIGH))
    return text if math.isnan(low + high) else f"{text} [{low:.4g}, {high:.4g}]"


def _figure(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw PSNR of each run, or the scores with PSNR in their name; return None if no run has any."""
    from ldm_lib.plots.charts import interval_dots

    names = sorted({name for row in rows for name in row} - {"run", *sweep.varying})
    columns, title = {label: f"{label}: PSNR" for label in _labels(sweep) if f"{label}: PSNR" in names}, ""
    if columns:
        several = max(row.get("patients", 0) for row in rows) > 1
        title = f": {'mean over patients, bar: 95 % bootstrap interval by patient' if several else 'one patient'}"
    elif not (columns := {name: name for name in names if "psnr" in name}):
        return None
    groups = {
        label: [[row.get(name + end, math.nan) for end in ("", LOW, HIGH)] for row in rows]
        for label, name in columns.items()
    }
    labels = [run.name.removeprefix(f"{sweep.name}-")[:48] for run in sweep.runs]
    notes = [str(row["state"]) for row in rows]
    return interval_dots(
        groups, names=labels, unit="PSNR, dB (higher is better)", notes=notes, title=sweep.name + title
    )
