"""Volume in, volume out: one file's hole is filled, and the result written in its own grid, header and dtype."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm_lib.autoencoder.region_decoding import reconstruct
from ldm_lib.data.case import NO_MAP, CaseData, case_of_files, load_case
from ldm_lib.data.model_grid import grid_case
from ldm_lib.data.nifti import require_results_writable, stem
from ldm_lib.data.options import READ_STRICTLY, ReadOptions
from ldm_lib.data.resampling import resampling
from ldm_lib.data.volume import write_like, write_map
from ldm_lib.files import given_path
from ldm_lib.inpainting.inpainter import DEFAULT_BLEND_MM, DEFAULT_SAMPLER, DEFAULT_STEPS, Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.preprocess import Inpainting

log = logging.getLogger("ldm_lib")


def result_paths(output: Path, samples: int, *, each: bool) -> dict[str, Path]:
    """What a result consists of -> its file: "" the volume, and of several samples their spread and the nearest."""
    names = (["std", "nearest"] if samples > 1 else []) + [f"sample-{k:04d}" for k in range(samples if each else 0)]
    first = stem(output)
    ending = output.name[len(first) :]
    return {"": output} | {name: output.with_name(f"{first}-{name}{ending}") for name in names}


def write_result(filled: Inpainting, data: CaseData, output: Path, *, samples: bool = False) -> list[Path]:
    """Write the result: one sample as it is; of several the mean, their spread, the nearest and, if asked, each.

    The standard deviation is float32 in source units at `<output>-std`, the sample nearest to the mean at
    `<output>-nearest`, the samples at `<output>-sample-000k`.
    """
    paths = result_paths(output, len(filled.values), each=samples)
    volumes = {"": lambda: filled.mean, "nearest": lambda: filled.nearest}  # each made when it is its turn
    volumes |= {f"sample-{k:04d}": partial(filled.sample, k) for k in range(len(filled.values))}
    return [
        write_map(path, filled.std, data.source.affine)
        if name == "std"
        else write_like(path, data.source, volumes[name](), data.mask)
        for name, path in paths.items()
    ]


def inpaint(
    t1n_voided: str | Path,
    mask: str | Path,
    output: str | Path,
    *,
    growth: str | Path | None = None,
    tissue: str | Path | None = None,
    read_options: ReadOptions = READ_STRICTLY,
    make_missing: bool | None = None,
    model: str | Path | None = None,
    sampler: str = DEFAULT_SAMPLER,
    steps: int = DEFAULT_STEPS,
    guidance: float = 1.0,
    blend_mm: float = DEFAULT_BLEND_MM,
    temperature: float = 0.0,
    samples: int = 1,
    write_samples: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> list[Path]:
    """Fill the hole of one file and write the result in the file's own grid, header and dtype.

    Args:
        t1n_voided: 3D T1n; voided here, with a warning, if it is not void under the mask.
        mask: binary, on the same grid, 1 = fill this.
        output: .nii or .nii.gz; the mean when samples > 1, then `<output>-std` is written beside it.
        growth: tumour-cell concentration in [0, 1]; none means zero, healthy tissue.
        tissue: labels 1 CSF, 2 GM, 3 WM, of one method inside and outside the hole; none: unknown, unless it is made.
        allow: what the gate is to let pass, and how it is read then.
        make_missing: make the tissue map from the scan where none is given (`segmentation.tissue_from_scan`); None does
            so if the model needs one.
        model: folder with weights; none takes the shipped ones. A file of other voxel sizes than the
            model's is brought to them, and what fills the hole is brought back.
        guidance: how far to go from being told nothing (0) to being told all (1) and beyond.
        blend_mm: reach of the correction that makes the hole's edge fit; 0 leaves it as it was sampled.
        temperature: of the noise that sampling starts from; 0 takes the model's own.

    Returns:
        the files written.

    Raises:
        LdmError: an input, parameter, model or output path that cannot be used; nothing is written then.
    """
    case = case_of_files(t1n_voided, mask, growth=growth, tissue=tissue, read_options=read_options)
    asked = {"sampler": sampler, "num_inference_steps": steps, "samples": samples, "seed": seed}
    how = {"blend_mm": blend_mm, "temperature": temperature, "device": device}
    InpaintOptions.parse(asked | {"guidance": guidance} | how)
    results = result_paths(given_path(output), samples, each=write_samples)
    require_results_writable(results.values(), case.files().values())
    data, inpainter = load_case(case), Inpainter.load(model, **how)
    data = make_ready(data, inpainter, make_missing=inpainter.makes_maps(make_missing))
    filled = inpainter.fill(data, samples=samples, seed=seed, sampler=sampler, steps=steps, guidance=guidance)
    return write_result(filled, data, results[""], samples=write_samples)


def write_upper_bound(inpainter: Inpainter, data: CaseData, path: Path) -> Path:
    """Write the truth of a case as it comes back from the autoencoder, pasted into the hole, for scores beside ours."""
    where = {"device": inpainter.model.device, "precision": inpainter.model.precision}
    on_grid, factor = grid_case(data, inpainter.model.autoencoder.factor), inpainter.model.autoencoder.factor
    rebuilt = reconstruct(inpainter.model.autoencoder, on_grid.target, **where).volume
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_like(path, data.source, data.paste(rebuilt, factor), data.mask)


def make_ready(data: CaseData, inpainter: Inpainter, *, make_missing: bool) -> CaseData:
    """Say what is odd about a case, and give it the tissue map it lacks if asked.

    A growth map that is missing is not odd here: it means healthy.
    """
    trained_mm, to_make = inpainter.model.autoencoder.spacing_mm, make_missing and data.tissue is None
    silent = {NO_MAP.format("growth"), *([NO_MAP.format("tissue")] if to_make else [])}
    resampled = f"voxels of {data.source.spacing_mm} mm; the hole is filled in the model's of {trained_mm:g} mm"
    for warning in [*data.warnings, *([resampled] if resampling(data, trained_mm) else [])]:
        if warning not in silent:
            log.warning("%s: %s", data.case.t1n_voided or data.case.t1n, warning)
    return _with_tissue(data, inpainter.model.spec.refinement) if to_make else data


def _with_tissue(data: CaseData, refine: str) -> CaseData:
    """The case with a tissue map made from its scan, or as it is where that failed."""
    from ldm_lib.anatomy.tissue_segmentation import tissue_from_scan  # seconds to load, and seldom needed

    made = tissue_from_scan(data.voided / data.scale, data.source.affine, data.mask, refine=refine)
    if made.registration.flaw:
        log.warning("%s: no tissue map: %s; filled without", data.case.t1n_voided, made.registration.flaw)
        return data
    return replace(data, tissue=made.labels)
