"""Fill cases whose truth is known, told nothing but what their voided scans tell, and score what comes out.

cases => atlas maps => K samples => beside them the ceiling and the baselines => metrics.csv, table.md, pictures
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ldm_lib.cases import Case, load_case
from ldm_lib.cohort import find_cases, with_target
from ldm_lib.config import SamplingConfig
from ldm_lib.errors import InputError
from ldm_lib.evaluation import CEILING, ONE_SAMPLE, candidates, mean_of, score_rows, spread_path
from ldm_lib.figures import with_spread
from ldm_lib.files import FolderLock, markdown, replacing, write_csv
from ldm_lib.filling import Row, fill_cases, require_all
from ldm_lib.inpainter import Inpainter
from ldm_lib.inpainting import write_ceiling
from ldm_lib.layouts import require_outside
from ldm_lib.metrics import bootstrap_by_patient
from ldm_lib.priors import equip
from ldm_lib.values import given_path
from ldm_lib.volumes import read_volume

SCORES = {"PSNR, dB": ("psnr_01", 2), "SSIM": ("ssim", 3)}  # heading -> column, digits
REFERENCE = "harmonic"
MOST_COLUMNS = 6  # cases that are told one by one
MAPS, RESULTS = "maps", "results"
_print = partial(print, flush=True)


def appraise(
    data_dir: str | Path,
    output: str | Path,
    config: SamplingConfig,
    *,
    model: str | Path | None = None,
    tissue: str = "atlas",
    pictures: int = 0,
    say: Callable[[str], None] = _print,
) -> str:
    """Fill and score every case of a folder that has its truth; return the table of methods as Markdown.

    The same call goes on where an interrupted one stopped.

    Args:
        output: takes `maps/`, `results/`, `metrics.csv`, `table.md` and `<case>.png`.
        config: samples, seed, sampler, steps, guidance, temperature, device and precision.
        model: folder with weights; none takes the shipped ones.
        tissue: "atlas" makes the map of every case from its voided scan, "given" takes those that came with them. No
            growth map is shown: the healthy part of the hole is what is scored.
        pictures: of how many cases.

    Raises:
        LdmError: no case with its truth, no model, a case that cannot be filled, or an output that cannot be used.
    """
    root, output = given_path(data_dir), given_path(output)
    require_outside(output, root)
    cases = [case.with_maps(growth=None) for case in with_target(find_cases(root)[0])]
    inpainter, lock = Inpainter.for_sampling(model, config), FolderLock(output)
    try:
        results = output / RESULTS
        results.mkdir(exist_ok=True)
        cases = [_equipped(case, output / MAPS, inpainter, anew=tissue == "atlas") for case in cases]
        filled = fill_cases(inpainter, [case.to_fill() for case in cases], config, results, say=say)
        require_all(filled)
        rows = [row for case in cases for row in _scored(case, inpainter, results, config.samples)]
        write_csv(output / "metrics.csv", rows)
        for case in cases[:pictures]:
            _draw(case, results, config.samples, output)
        table = _told(rows, config.samples)
        with replacing(output / "table.md") as half_written:
            half_written.write_text(f"{table}\n")
    finally:
        lock.release()
    return table


def _told(rows: Sequence[Row], samples: int) -> str:
    """All tables, and what averaging brings."""
    methods = _by_method(rows)
    told = [markdown(methods_table(rows))]
    if len(methods[REFERENCE]) <= MOST_COLUMNS:
        told.append(markdown(cases_table(rows)))
    if samples > 1:
        gain = _interval(methods[mean_of(samples)], "psnr_01", 2, methods[ONE_SAMPLE])
        told.append(f"{mean_of(samples)} over {ONE_SAMPLE}: {gain} dB")
    return "\n\n".join(told)


def methods_table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and cells: methods by PSNR, means over patients with 95 % bootstrap intervals by patient, in brackets.

    The last columns are differences to the harmonic fill, patient by patient.
    """
    by_method = _by_method(rows)
    lines = []
    for method, own in by_method.items():
        cells = [_interval(own, *scores, others) for others in ((), by_method[REFERENCE]) for scores in SCORES.values()]
        lines.append([method, *cells])
    order = sorted(lines, key=lambda line: -float(line[1].partition(" ")[0]))
    return [["method", *SCORES, *(f"{name}, over {REFERENCE}" for name in SCORES)], *order]


def cases_table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and cells: PSNR and SSIM of each method in each case."""
    by_method = _by_method(rows)
    cases = [row["case"] for row in by_method[REFERENCE]]
    told = {
        name: {row["case"]: f"{row['psnr_01']:.2f}, {row['ssim']:.3f}" for row in own}
        for name, own in by_method.items()
    }
    return [["method", *cases], *([name, *(cells.get(case, "") for case in cases)] for name, cells in told.items())]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _interval(rows: Sequence[Row], score: str, digits: int, others: Sequence[Row] = ()) -> str:
    """Mean over patients of a score, or of what it is above others', with its interval."""
    theirs = {other["case"]: other[score] for other in others}  # more cases, where only some have a tissue map
    values = [row[score] - (theirs[row["case"]] if others else 0) for row in rows]
    found = bootstrap_by_patient(values, [row["patient"] for row in rows])
    told = [f"{found[name]:{'+' if others else ''}.{digits}f}" for name in ("mean", "low", "high")]
    return told[0] + (f" [{told[1]}, {told[2]}]" if found["patients"] > 1 else "")


def _equipped(case: Case, maps: Path, inpainter: Inpainter, *, anew: bool) -> Case:
    if not anew and case.tissue is not None:
        return case
    equipped, made = equip(case, maps, tissue=True, growth=False, refine=inpainter.settings.refinement)
    if made and made[0].refused:
        raise InputError(f"no tissue map: {made[0].refused}", where=case.key, fix="take it out of the folder")
    return equipped


def _scored(case: Case, inpainter: Inpainter, results: Path, samples: int) -> list[Row]:
    data = load_case(case)
    write_ceiling(inpainter, data, results / CEILING / case.result_name)
    return score_rows(data, candidates(data, results, samples))[0]


def _draw(case: Case, results: Path, samples: int, output: Path) -> None:
    """Voided, one sample, the mean, the truth, and how far the samples spread."""
    data = load_case(case)
    found = candidates(data, results, samples, baselines=False)
    shown = {name: found[name] for name in (ONE_SAMPLE, mean_of(samples))}
    views = {"voided": data.voided, **shown, "truth": data.target}
    views = {name: data.lps(view) for name, view in views.items()}
    spread = read_volume(spread_path(results, data)).voxels if samples > 1 else np.zeros(data.mask.shape)
    where = {"spacing_mm": data.lps_spacing_mm, "mask": data.lps(data.mask), "title": case.key}
    with_spread(views, data.lps(spread), **where).savefig(output / f"{case.key}.png", dpi=110)
