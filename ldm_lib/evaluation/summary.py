"""Summarise scores as means over patients with 95 % bootstrap intervals by patient, and format them as tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ldm_lib.errors import InputError
from ldm_lib.evaluation.case_scores import SAMPLE
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.files import markdown

METRICS = ("psnr", "psnr_01", "ssim", "mse", "rmse", "mae")
SHOWN = {"PSNR, dB": ("psnr", 2), "SSIM": ("ssim", 3)}  # heading -> column, digits
REFERENCE = "harmonic"
MOST_COLUMNS = 6  # cases with a column of their own


def as_table(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Return rows of `score_rows` as a table, its PSNR in the column "psnr"."""
    return pd.DataFrame(rows).rename(columns={"psnr_01": "psnr"})


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read a file of scores (metrics.csv) as such a table, without rounding."""
    return as_table(pd.read_csv(path, dtype={"patient": str}, float_precision="round_trip"))


def summarise(
    table: pd.DataFrame, scores: Sequence[str] = (), *, by: str | list[str] = "method", reference: str = ""
) -> pd.DataFrame:
    """Compute the mean over patients of each score and method, with its interval of `metrics.bootstrap_by_patient`.

    Args:
        table: columns "patient", that or those of `by`, and scores, such as `ldm.evaluate` returns.
        scores: columns to summarise; by default all of `METRICS` that the table has.
        by: column or columns that name the groups.
        reference: a method; if given, the differences to it in the same "case" are summarised.

    Returns:
        a row for each group, in the order of the table, with columns (score, "mean" | "low" | "high").

    Raises:
        InputError: a column that the table lacks.

    Examples:
        >>> import pandas as pd
        >>> rows = [("a", "estimate", 20.0), ("a", "estimate", 22.0), ("b", "estimate", 25.0)]
        >>> table = pd.DataFrame(rows, columns=["patient", "method", "psnr"])
        >>> summarise(table)["psnr"].loc["estimate"].tolist()
        [23.0, 21.0, 25.0]
    """
    scores = list(scores or [name for name in METRICS if name in table])
    needed = ["patient", *([by] if isinstance(by, str) else by), *scores, *(["case", "method"] if reference else [])]
    if missing := [name for name in needed if name not in table]:
        raise InputError(f"the table has no column {missing[0]!r}, but {', '.join(map(str, table))}", where="summarise",
                         fix="name the columns of the groups in `by`, and those of scores in `scores`")  # fmt: skip
    if reference:
        base = table[table["method"] == reference].set_index("case")[scores].reindex(table["case"])
        table = table.assign(**{name: table[name].to_numpy() - base[name].to_numpy() for name in scores})
    rows = {}
    for group, own in table.groupby(by, sort=False):
        found = {name: bootstrap_by_patient(own[name], list(own["patient"])) for name in scores}
        rows[group] = {(name, part): found[name][part] for name in scores for part in ("mean", "low", "high")}
    return pd.DataFrame(rows).T.rename_axis(by)


def interval_table(
    table: pd.DataFrame, scores: Sequence[str], *, by: str | list[str] = "method", digits: int = 3
) -> pd.DataFrame:
    """Return `summarise` as text to show, "mean [low, high]": a row for each group, a column for each score."""
    found = summarise(table, scores, by=by)
    text = {score: [_interval(row, digits) for _, row in found[score].iterrows()] for score in scores}
    return pd.DataFrame(text, index=found.index)


def report(table: pd.DataFrame) -> str:
    """Format the table of methods, that of cases if they are few, and the gain by averaging, as Markdown."""
    parts = [markdown(methods_table(table))]
    if table["case"].nunique() <= MOST_COLUMNS:
        parts.append(markdown(cases_table(table)))
    for mean in (name for name in table["method"].unique() if name.startswith("mean of ")):
        gain = summarise(table, ["psnr"], reference=SAMPLE).loc[mean, "psnr"]
        parts.append(f"{mean} over {SAMPLE}: {_interval(gain, 2, sign='+')} dB")
    return "\n\n".join(parts)


def methods_table(table: pd.DataFrame) -> list[list[str]]:
    """Return head and cells: methods by PSNR, means with intervals, and differences to a harmonic baseline."""
    scores = [score for score, _ in SHOWN.values()]
    own, gain = summarise(table, scores), summarise(table, scores, reference=REFERENCE)
    compared = REFERENCE in own.index
    lines = []
    for method in own.sort_values(("psnr", "mean"), ascending=False, kind="stable").index:
        means = [_interval(own.loc[method, score], digits) for score, digits in SHOWN.values()]
        gains = [_interval(gain.loc[method, score], digits, sign="+") for score, digits in SHOWN.values() if compared]
        lines.append([method, *means, *(gains if method != REFERENCE else [""] * len(gains))])
    return [["method", *SHOWN, *(f"{name}, over {REFERENCE}" for name in SHOWN if compared)], *lines]


def cases_table(table: pd.DataFrame) -> list[list[str]]:
    """Return head and cells: PSNR and SSIM of each method in each case."""
    text = [f"{psnr:.2f}, {ssim:.3f}" for psnr, ssim in zip(table["psnr"], table["ssim"], strict=True)]
    cells = table.assign(text=text).pivot(index="method", columns="case", values="text")
    cells = cells.reindex(index=table["method"].unique(), columns=table["case"].unique()).fillna("")
    return [["method", *cells.columns], *cells.reset_index().to_numpy().tolist()]


def _interval(found: pd.Series, digits: int, sign: str = "") -> str:
    mean, low, high = (f"{found[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return mean if pd.isna(found["low"]) else f"{mean} [{low}, {high}]"
