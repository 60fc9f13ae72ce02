"""Inpaint one file, and write the result in the file's own grid, header and data type."""

from collections.abc import Mapping
from pathlib import Path

from ldm_lib.data.case import Case, case_of_files, load_case
from ldm_lib.diffusion.samplers import check_sampler
from ldm_lib.files import expand_path, require_writable
from ldm_lib.images.image_files import require_results_writable
from ldm_lib.images.options import READ_STRICTLY, ReadOptions
from ldm_lib.inpainting.inpainter import DEFAULT_BLEND_MM, DEFAULT_DETAIL, DEFAULT_SAMPLER, DEFAULT_STEPS, Inpainter
from ldm_lib.inpainting.options import ResultOptions
from ldm_lib.inpainting.result import page_path, require_page, result_path, result_paths, summary_path
from ldm_lib.inpainting.summary import write_summary


def inpaint(
    t1n_voided: str | Path,
    mask: str | Path,
    output: str | Path,
    *,
    growth: str | Path | None = None,
    tissue: str | Path | None = None,
    brain_mask: str | Path | None = None,
    read_options: ReadOptions = READ_STRICTLY,
    make_missing: bool | None = None,
    model: str | Path | None = None,
    sampler: str = DEFAULT_SAMPLER,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance: float = 1.0,
    blend_mm: float = DEFAULT_BLEND_MM,
    detail: float = DEFAULT_DETAIL,
    temperature: float = 0.0,
    n_samples: int = 1,
    estimate: str = "samples",
    dilate: int = 0,
    write_samples: bool = False,
    summary: bool = False,
    page: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> list[Path]:
    """Inpaint the masked region of one file, in its own grid, header and data type; return the files written.

    Args:
        t1n_voided: 3D T1n; voided here, with a warning, if it is not void under the mask.
        mask: binary, on the same grid, 1 = inpaint this.
        output: .nii, .nii.gz, .mgh or .mgz; of several samples it is their mean, as `Inpainting.save` writes it.
        growth: tumour-cell concentration in [0, 1]; None means zero, healthy tissue.
        tissue: labels 1 CSF, 2 GM, 3 WM, made by one method inside and outside the mask; None means unknown, unless
            the map is made.
        brain_mask: of a whole head, on the same grid: what is above 0 is brain. Only the part of the mask in the brain
            is inpainted, from the brain alone; skull and scalp stay as they are. With
            `read_options=ReadOptions(skull_strip=True)` a missing one is made and written, as `<output>-brain-mask`.
        read_options: how input validation is relaxed.
        make_missing: make the tissue map from the scan where none is given, and keep it in the user's cache
            (`inpainting.tissue_maps`); None makes it if the model needs one.
        model: model folder; None takes the pretrained weights. A file of other voxel sizes is resampled to the model's,
            and the inpainted voxels are resampled back.
        estimate: "samples", or "mean": the mean of all samples in one denoiser evaluation (`Inpainter.estimate`).
        dilate: voxels by which the mask grows in every direction (a ball of this radius) before it is inpainted.
        summary: write the tissue labels of the result (`-dseg`) and a summary of volumes and settings
            (`-summary.json`), too; see `inpainting.summary`.
        page: also write an HTML page of the case next to the result (`Inpainting.page`).
        num_inference_steps: denoiser evaluations of a sample.
        guidance: classifier-free guidance scale: 0 unconditional, 1 conditional, above 1 amplified.
        blend_mm: reach of the intensity correction at the mask's edge, mm; 0 is off.
        detail: scale of the random detail finer than the latents, times the temperature; 0 leaves out its mean, too.
        temperature: scale of the initial noise and of detail; 0 takes the model's own.

    Raises:
        LdmError: an input, parameter, model or output path that cannot be used; nothing is written then.

    Examples:
        >>> import ldm_lib as ldm
        >>> case = ldm.find_cases(cohort)[0]
        >>> output, few = folder / "inpainted.nii.gz", {"num_inference_steps": 2}
        >>> files = ldm.inpaint(case.t1n_voided, case.mask, output, model=model, **few)
        >>> [path.name for path in files]
        ['inpainted.nii.gz']
    """
    maps = {"growth": growth, "tissue": tissue, "brain_mask": brain_mask}
    case = case_of_files(t1n_voided, mask, **maps, read_options=read_options, dilate=dilate)
    given = {"sampler": sampler, "num_inference_steps": num_inference_steps, "detail": detail, "precision": precision}
    given |= {"seed": seed, "guidance": guidance, "temperature": temperature, "blend_mm": blend_mm, "device": device}
    options = ResultOptions.of_arguments(n_samples=n_samples, estimate=estimate, dilate=dilate, **given)
    results = result_paths(expand_path(output), n_samples, each=write_samples, case=case)
    _require_writable(results, case, summary=summary, page=page)
    data, inpainter = load_case(case), Inpainter.for_sampling(model, options)
    check_sampler(*options.method, inpainter.model.schedule)  # before a map is made
    result = inpainter(inpainter.prepare(data, make_missing=make_missing), make_missing=False, **options.sampling)
    written = result.save(results[""], samples=write_samples)
    written += write_summary(inpainter, options, result, results[""]) if summary else []
    return written + ([result.page(page_path(results[""]))] if page else [])


def _require_writable(results: Mapping[str, Path], case: Case, *, summary: bool, page: bool) -> None:
    labels = [result_path(results[""], "dseg")] if summary else []
    require_results_writable([*results.values(), *labels], case.files().values())
    if summary:
        require_writable(summary_path(results[""]))
    if page:
        require_page(page_path(results[""]))
