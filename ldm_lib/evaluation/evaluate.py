"""Inpaint cases with a known target, and score the results next to baselines and the autoencoder's upper bound.

cases => atlas maps => K samples, upper bound, baselines => metrics.csv, table.md, figures
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ldm_lib.data.case import Case, CaseData, load_case
from ldm_lib.data.cohort import find_cases, with_target
from ldm_lib.data.conditioning_maps import add_conditioning_maps
from ldm_lib.data.layouts import require_outside
from ldm_lib.diffusion.samplers import check_sampler
from ldm_lib.errors import ConfigError, InputError
from ldm_lib.evaluation.case_scores import (
    ESTIMATE,
    SAMPLE,
    UPPER_BOUND_FOLDER,
    candidates,
    mean_of,
    read_sample,
    result_path,
    score_rows,
    write_page,
)
from ldm_lib.evaluation.reconstruction import write_upper_bound
from ldm_lib.evaluation.summary import as_table, report
from ldm_lib.files import expand_path, replacing, write_csv
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.images.volume import read_volume, write_like
from ldm_lib.inpainting.folder import Row, fill_cases, require_all
from ldm_lib.inpainting.inpainter import DEFAULT_SAMPLER, DEFAULT_STEPS, Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.locking import FolderLock
from ldm_lib.plots import case_plots
from ldm_lib.progress import Progress


def evaluate(
    inpainter: Inpainter,
    cases: Sequence[Case],
    *,
    n_samples: int = 16,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance: float = 1.0,
    tissue: str = "atlas",
    output: str | Path | None = None,
    pictures: int = 0,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Inpaint and score every case that has its full T1n; return a row for each case and method.

    Methods are a sample, the mean and the medoid of the samples, the estimate (`Inpainter.estimate`), the baselines,
    and the autoencoder's upper bound. No growth map is used: the healthy part of the mask is scored. The same call
    with an output folder continues where an interrupted one stopped.

    Args:
        tissue: "atlas" makes the tissue map of every case from its voided scan; "given" uses the map that came with a
            case where there is one, which may leak the masked region.
        output: folder for `maps/`, `results/`, `metrics.csv`, `table.md` and pictures; None keeps no file.
        pictures: number of cases to draw into the output folder, each as `<case>.png` and as `<case>.html`.
        say: receives a line for each case that is prepared, inpainted or scored, instead of the bar, or the lines every
            30 s, on standard error.

    Returns:
        columns "case", "patient", "mask_size" (its class), "tissue_map", "method", "psnr" (dB), "ssim", "mse",
        "rmse", "mae" (`brats_metrics`). `ldm.summarise` gives means with intervals.

    Raises:
        LdmError: no case with its T1n, a case that cannot be inpainted, or a parameter that is out of range.

    Examples:
        >>> import ldm_lib as ldm
        >>> inpainter = ldm.Inpainter.load(model)
        >>> cases, quiet = ldm.find_cases(cohort)[:1], {"say": lambda line: None}
        >>> table = ldm.evaluate(inpainter, cases, n_samples=2, num_inference_steps=1, tissue="given", **quiet)
        >>> sorted(table["method"])[:4]
        ['estimate', 'harmonic', 'initial estimate', 'mean intensity']
        >>> ldm.summarise(table).loc["estimate", "psnr"].index.tolist()
        ['mean', 'low', 'high']
    """
    if pictures < 0:
        raise ConfigError(f"pictures = {pictures}: 0 or more are allowed")
    fixed = {"blend_mm": inpainter.blend_mm, "detail": inpainter.detail, "temperature": inpainter.model.temperature}
    sampling = {"sampler": sampler, "num_inference_steps": num_inference_steps, "seed": seed, "guidance": guidance}
    options = InpaintOptions.of_arguments(n_samples=n_samples, **(fixed | sampling))
    check_sampler(sampler, num_inference_steps, inpainter.model.schedule)
    cases = [case.with_maps(growth=None) for case in with_target(cases)]
    run = partial(_inpaint_and_score, inpainter, cases, options, atlas=tissue == "atlas", say=say)
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            return as_table(run(Path(folder)))
    folder = expand_path(output)
    lock = FolderLock(folder)
    try:
        rows = run(folder)
        write_csv(folder / "metrics.csv", rows)
        links = [_draw(load_case(case), folder / "results", n_samples, folder) for case in cases[:pictures]]
        with replacing(folder / "table.md") as partial_file:
            partial_file.write_text("\n\n".join([report(as_table(rows)), *links]) + "\n")
    finally:
        lock.release()
    return as_table(rows)


def evaluate_folder(
    data_dir: str | Path,
    output: str | Path,
    options: InpaintOptions,
    *,
    model: str | Path | None = None,
    read_options: ReadOptions = READ_STRICTLY,
    patients_file: str | Path = "",
    **rest: object,
) -> str:
    """Evaluate a model folder, or the pretrained weights, on a folder of cases; return the tables as Markdown.

    `rest` are `tissue`, `pictures` and `say`, as in `evaluate`.
    """
    root, output = expand_path(data_dir), expand_path(output)
    require_outside(output, root)
    cases = with_target(find_cases(root, read_options=read_options, patients_file=patients_file))
    inpainter = Inpainter.for_sampling(model, options)
    return report(evaluate(inpainter, cases, output=output, **options.sampling, **rest))


def _inpaint_and_score(
    inpainter: Inpainter,
    cases: Sequence[Case],
    options: InpaintOptions,
    folder: Path,
    *,
    atlas: bool,
    say: Callable[[str], None] | None,
) -> list[Row]:
    """Write the results of all cases into a folder, and return their scores."""
    with Progress(len(cases), name="tissue map", say=say) as progress:
        cases = [_with_map(case, folder / "maps", inpainter, partial(progress.update, k), atlas=atlas)
                 for k, case in enumerate(cases, start=1)]  # fmt: skip
    results = folder / "results"
    results.mkdir(exist_ok=True)
    require_all(fill_cases(inpainter, [case.to_inpaint() for case in cases], options, results, say=say))
    rows, progress = [], Progress(len(cases), name="score", say=say)
    for k, case in enumerate(cases, start=1):
        data = load_case(case)
        write_upper_bound(inpainter.model, data, results / UPPER_BOUND_FOLDER / case.result_name)
        _write_estimate(inpainter, data, results / ESTIMATE / case.result_name)
        volumes = candidates(data, results, options.samples)
        rows += score_rows(data, {name: volume for name, volume in volumes.items() if name != mean_of(1)})[0]
        progress.update(k, f"{case.key}: scored")
    return rows


def _write_estimate(inpainter: Inpainter, data: CaseData, path: Path) -> Path:
    """Write the mean of all samples, made in one denoiser evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_like(path, data.source, inpainter.estimate(data, make_missing=False).mean, data.mask)


def _with_map(case: Case, maps: Path, inpainter: Inpainter, progress: Callable[[str], None], *, atlas: bool) -> Case:
    """Return the case with a tissue map made from the voided scan, or with its own."""
    if not atlas and case.tissue is not None:
        return case
    refine = inpainter.model.spec.refinement
    case, made = add_conditioning_maps(case, maps, tissue=True, growth=False, refine=refine)
    for each in made:
        if each.failure:
            raise InputError(f"no tissue map: {each.failure}", where=case.key, fix="take it out of the folder")
        progress(f"{case.key}: {'made' if each.made_now else 'found'}")
    return case


def _draw(data: CaseData, results: Path, samples: int, output: Path) -> str:
    """Write a figure and a page of a case, and return links to them.

    The figure shows the voided image, up to two samples, the estimate, the ground truth and the standard deviation.
    """
    found = candidates(data, results, samples, baselines=False)
    volumes = {"voided": data.voided, "sample 1": found[SAMPLE]}
    if samples > 1:
        volumes["sample 2"] = read_sample(results, data, 1)
    volumes |= {"estimate": found[ESTIMATE], "ground truth": data.target}
    if samples > 1:
        volumes["standard deviation"] = read_volume(result_path(results, data, "std")).voxels
    case_plots.plot(data, volumes, across=True).savefig(output / f"{data.key}.png", dpi=110)
    write_page(output / f"{data.key}.html", results, data, samples)
    name = quote(data.key)
    return f"{data.key}: [in a browser]({name}.html), [figure]({name}.png)"
