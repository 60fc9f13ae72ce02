"""Fill cases whose truth is known, told nothing but what their voided scans tell, and score what comes out.

cases => atlas maps => K samples => beside them the ceiling and the baselines => metrics.csv, table.md, pictures
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.cohort import find_cases, with_target
from ldm_lib.data.conditioning_maps import add_conditioning_maps
from ldm_lib.data.layouts import require_outside
from ldm_lib.data.volume import read_volume
from ldm_lib.diffusion.samplers import check_sampler
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.evaluation.case_scores import ONE_SAMPLE, UPPER_BOUND, candidates, mean_of, score_rows, spread_path
from ldm_lib.evaluation.metrics import bootstrap_by_patient
from ldm_lib.files import expand_path, markdown, replacing, write_csv
from ldm_lib.inpainting.folder import Row, fill_cases, require_all
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.single_file import write_upper_bound
from ldm_lib.locking import FolderLock
from ldm_lib.plots import case_plots

SCORES = {"PSNR, dB": ("psnr_01", 2), "SSIM": ("ssim", 3)}  # heading -> column, digits
REFERENCE = "harmonic"
MOST_COLUMNS = 6  # cases that are told one by one
MAPS, RESULTS = "maps", "results"
_print = partial(print, flush=True)


def evaluate(
    data_dir: str | Path,
    output: str | Path,
    config: InpaintOptions,
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
        say: is told a line about each case that is prepared, filled or scored.

    Raises:
        LdmError: no case with its truth, no model, a case that cannot be filled, a number of steps or pictures that
            cannot be, or an output that cannot be used.
    """
    if pictures < 0:
        raise ConfigError(f"pictures = {pictures}: 0 or more are allowed")
    root, output = expand_path(data_dir), expand_path(output)
    require_outside(output, root)
    cases = [case.with_maps(growth=None) for case in with_target(find_cases(root))]
    inpainter = Inpainter.for_sampling(model, config)
    check_sampler(config.sampler, config.num_inference_steps, inpainter.model.schedule)
    lock = FolderLock(output)
    try:
        cases = list(_equipped(cases, output / MAPS, inpainter, anew=tissue == "atlas", say=say))
        rows = _filled_and_scored(cases, inpainter, config, output / RESULTS, say=say)
        write_csv(output / "metrics.csv", rows)
        for case in cases[:pictures]:
            _draw(case, output / RESULTS, config.samples, output)
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
    for method in sorted(by_method, key=lambda name: -_by_patient(by_method[name], "psnr_01")["mean"]):
        own = by_method[method]
        plain = [_interval(own, *scores) for scores in SCORES.values()]
        over = [_interval(own, *scores, by_method[REFERENCE]) for scores in SCORES.values()]
        lines.append([method, *plain, *(over if method != REFERENCE else [""] * len(over))])
    return [["method", *SCORES, *(f"{name}, over {REFERENCE}" for name in SCORES)], *lines]


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
    """Mean over patients of a score, or of what it is above others', with its interval, as text."""
    found = _by_patient(rows, score, others)
    told = [f"{found[name]:{'+' if others else ''}.{digits}f}" for name in ("mean", "low", "high")]
    return told[0] + (f" [{told[1]}, {told[2]}]" if found["patients"] > 1 else "")


def _by_patient(rows: Sequence[Row], score: str, others: Sequence[Row] = ()) -> dict[str, float]:
    """Mean and interval by patient (`metrics.bootstrap_by_patient`), case by case of what is above others'."""
    theirs = {other["case"]: other[score] for other in others}  # more cases, where only some have a tissue map
    values = [row[score] - (theirs[row["case"]] if others else 0) for row in rows]
    return bootstrap_by_patient(values, [row["patient"] for row in rows])


def _equipped(
    cases: Sequence[Case], maps: Path, inpainter: Inpainter, *, anew: bool, say: Callable[[str], None]
) -> Iterator[Case]:
    """The cases with a tissue map made from the voided scan, or with their own."""
    for k, case in enumerate(cases, start=1):
        if not anew and case.tissue is not None:
            yield case
            continue
        equipped, made = add_conditioning_maps(
            case, maps, tissue=True, growth=False, refine=inpainter.model.spec.refinement
        )
        for prior in made:
            if prior.failure:
                raise InputError(f"no tissue map: {prior.failure}", where=case.key, fix="take it out of the folder")
            say(f"[{k}/{len(cases)}] {case.key}: tissue map {'made' if prior.made_now else 'found'}")
        yield equipped


def _filled_and_scored(
    cases: Sequence[Case], inpainter: Inpainter, config: InpaintOptions, results: Path, *, say: Callable[[str], None]
) -> list[Row]:
    results.mkdir(exist_ok=True)
    require_all(fill_cases(inpainter, [case.to_fill() for case in cases], config, results, say=say))
    rows = []
    for k, case in enumerate(cases, start=1):
        data = load_case(case)
        write_upper_bound(inpainter, data, results / UPPER_BOUND / case.result_name)
        rows += score_rows(data, _fills(data, results, config.samples))[0]
        say(f"[{k}/{len(cases)}] {case.key}: scored")
    return rows


def _fills(data: CaseData, results: Path, samples: int, *, baselines: bool = True) -> dict[str, np.ndarray]:
    """Method -> filled volume; of one sample there is no mean to tell."""
    found = candidates(data, results, samples, baselines=baselines)
    return found if samples > 1 else {name: fill for name, fill in found.items() if name != mean_of(1)}


def _draw(case: Case, results: Path, samples: int, output: Path) -> None:
    """Voided, one sample and the truth; of several samples the mean too, and how far they spread."""
    data = load_case(case)
    fills = _fills(data, results, samples, baselines=False)
    shown = {name: fill for name, fill in fills.items() if name in (ONE_SAMPLE, mean_of(samples))}
    views = {"voided": data.voided, **shown, "truth": data.target}
    if samples > 1:
        figure = case_plots.plot_series(data, views, std=read_volume(spread_path(results, data)).voxels)
    else:
        figure = case_plots.plot(data, views)
    figure.savefig(output / f"{case.key}.png", dpi=110)
