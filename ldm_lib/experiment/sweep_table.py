"""Summarise the runs of a sweep that are done in one table, one row a run, and one figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lib.evaluation.case_scores import SAMPLE, mean_of
from ldm_lib.experiment.run_folder import outputs_folder, read_record, tracked
from ldm_lib.experiment.stages import STAGES
from ldm_lib.experiment.sweep_file import Sweep, SweepRun
from ldm_lib.files import markdown, replacing, write_csv

EVALUATION = list(STAGES)[-1]
SCORES = {"PSNR": "psnr", "SSIM": "ssim", "MSE": "mse"}
PARTS = {"": "mean", " low": "low", " high": "high"}  # what ends a column's name -> what it holds
LAST = ("patients", "masks", "seconds", "state")
ENDED = "ended with status "  # how the last line of a failed run's log begins


def sweep_folder(name: str) -> Path:
    """Return the folder in which a sweep keeps its logs, table and figure."""
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
    names = [name for name in write_csv(folder / "table.csv", rows) if not name.endswith((" low", " high"))]
    names = sorted(names, key=LAST.__contains__)
    table = markdown([names, *([_text(row, name) for name in names] for row in rows)])
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
    failed = last_line(log_path(sweep, run)).startswith(ENDED)
    seconds = round(sum(record["seconds"] for record in records), 1)
    return row | {"seconds": seconds, "state": "done" if done else "failed" if failed else "missing"}


def _scores(folder: Path, sweep: Sweep, run: SweepRun) -> dict[str, Any]:
    from ldm_lib.evaluation.summary import read_scores, summarise

    table = read_scores(folder / "metrics.csv")
    found, row = summarise(table, list(SCORES.values())), {}
    for label, method in zip(_labels(sweep), (SAMPLE, mean_of(run.value("samples"))), strict=True):
        for score, column in SCORES.items():
            row |= {f"{label}: {score}{end}": found.loc[method, (column, part)] for end, part in PARTS.items()}
    own = table[table["method"] == SAMPLE]
    return row | {"patients": own["patient"].nunique(), "masks": len(own)}


def _labels(sweep: Sweep) -> tuple[str, str]:
    """Return the column labels of the two methods; the second names K if it is the same in all runs."""
    samples = {run.value("samples") for run in sweep.runs}
    return SAMPLE, mean_of(samples.pop()) if len(samples) == 1 else "mean of K"


def _text(row: Mapping[str, Any], name: str) -> str:
    """Return a value as text, its interval behind it in brackets."""
    value, low, high = (row.get(name + end, "") for end in PARTS)
    text = f"{value:.4g}" if isinstance(value, float) and name != "seconds" else str(value)
    has_interval = isinstance(low, float) and not math.isnan(low)  # a single patient has none
    return f"{text} [{low:.4g}, {high:.4g}]" if has_interval else text


def _figure(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the PSNR of each run with its interval; return None if no run has any."""
    from ldm_lib.plots.charts import interval_dots

    if not any("patients" in row for row in rows):
        return None
    groups = {
        label: [[row.get(f"{label}: PSNR{end}", math.nan) for end in PARTS] for row in rows] for label in _labels(sweep)
    }
    return interval_dots(
        groups,
        names=[run.name.removeprefix(f"{sweep.name}-")[:48] for run in sweep.runs],
        unit="PSNR, dB (higher is better)",
        notes=[row["state"] for row in rows],
        title=f"{sweep.name}: mean over patients, bar: 95 % bootstrap interval by patient",
    )
