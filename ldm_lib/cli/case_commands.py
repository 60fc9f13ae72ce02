"""Run the commands that work on scans: inpaint, prior, cohort, validate, submission, score, evaluate.

Heavy libraries are imported by the command that needs them, so that help, validate and score start at once.
"""

import argparse
import os
import sys
from collections import Counter

from ldm_lib.anatomy.options import GrowthRates
from ldm_lib.cli.options import parse, point
from ldm_lib.data.options import MadeCohortOptions
from ldm_lib.errors import InputError
from ldm_lib.files import expand_path, require_writable, write_json
from ldm_lib.images.options import ReadOptions
from ldm_lib.inpainting.options import InpaintOptions, ResultOptions
from ldm_lib.progress import report


def inpaint(options: argparse.Namespace) -> int:
    """Inpaint one volume, or every case of a folder."""
    maps = {name: getattr(options, name) for name in ("mask", "growth", "tissue", "brain_mask")}
    if options.data and any(maps.values()):
        options.misused(
            "--mask, --growth, --tissue and --brain-mask go with --t1n-voided; with --data, masks are found by "
            "their names, and maps in --conditioning-dir"
        )
    if not options.data and (not options.mask or options.conditioning_dir):
        options.misused("--t1n-voided needs --mask, and takes no --conditioning-dir")
    sampling, reading = parse(ResultOptions, options), parse(ReadOptions, options)
    if options.data:
        return _inpaint_folder(options, sampling, reading)
    from ldm_lib.inpainting.single_file import inpaint as inpaint_file

    settings = sampling.model_dump()
    settings["n_samples"] = settings.pop("samples")
    written = inpaint_file(
        options.t1n_voided,
        output=options.output,
        **maps,
        read_options=reading,
        make_missing=options.make_missing,
        model=options.model,
        write_samples=options.write_samples,
        summary=options.summary,
        page=options.page,
        **settings,
    )
    print("\n".join(str(path) for path in written))
    return 0


def _inpaint_folder(options: argparse.Namespace, sampling: ResultOptions, reading: ReadOptions) -> int:
    # several cases are computed at once, whose idle threads would otherwise keep the cores busy; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ldm_lib.inpainting.folder import REFUSED, TABLE, inpaint_folder

    rows = inpaint_folder(
        options.data,
        options.output,
        sampling,
        conditioning_dir=options.conditioning_dir,
        read_options=reading,
        model=options.model,
        make_missing=options.make_missing,
        each=options.write_samples,
        dilate=sampling.dilate,
        summary=options.summary,
        page=options.page,
    )
    counts = Counter(row["status"] for row in rows)
    report(f"{len(rows)} cases: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    print(expand_path(options.output) / TABLE)
    return 1 if counts[REFUSED] else 0


def prior(options: argparse.Namespace) -> int:
    """Make tissue and growth maps from a scan and its mask."""
    rates, seed_mm = parse(GrowthRates, options), point(options.seed_mm) if options.seed_mm else None
    from ldm_lib.data.conditioning_maps import make_conditioning_maps
    from ldm_lib.images.image_files import stem

    made = make_conditioning_maps(
        options.t1n_voided,
        options.mask,
        tissue=options.tissue,
        growth=options.growth,
        seed_mm=seed_mm,
        segmentation=options.segmentation,
        days=options.days,
        rates=rates,
        lesion=options.lesion,
        refine=options.refine,
        read_options=parse(ReadOptions, options),
    )
    for each in made:
        found = ", ".join(f"{name} {value:.4g}" for name, value in each.record["found"].items())
        print(f"{each.path}: {'made' if each.made_now else 'found'} ({found})")
    if reason := made[0].failure:
        picture = made[0].path.with_name(f"{stem(made[0].path)}-refused.png")
        if made[0].registration:
            from ldm_lib.plots.figures import planes

            planes(**made[0].registration.plot_arguments(), title=made[0].path.name).savefig(picture)
        raise InputError(f"the atlas does not fit: {reason}", where=options.t1n_voided,
                         fix=f"see {picture}; check orientation and skull-stripping")  # fmt: skip
    return 0


def cohort(options: argparse.Namespace) -> int:
    """Make a training cohort from skull-stripped scans of healthy people."""
    made = parse(MadeCohortOptions, options)
    from ldm_lib.data.layouts import require_outside
    from ldm_lib.data.scan_cohort import make_scan_cohort
    from ldm_lib.plots.figures import save_planes

    output = expand_path(options.output)
    require_outside(output, options.source)
    settings = made.model_dump()
    settings["masks"], settings["read_options"] = settings.pop("masks_per_patient"), parse(ReadOptions, options)
    people, exclusions = make_scan_cohort(options.source, output, **settings, draw=save_planes)
    report(
        f"{len(people)} people in {output}, {len(exclusions)} scans excluded; see cohort.csv, exclusions.csv, pictures/"
    )
    print(output / "cohort.csv")
    return 0


AUDIT_WORDS = {"ok": "OK", "warning": "WARNING", "refused": "ERROR"}


def validate(options: argparse.Namespace) -> int:
    """Check every case of a folder in one pass."""
    from ldm_lib.data.cohort import audit
    from ldm_lib.data.layouts import require_outside

    findings = expand_path(options.json) if options.json else None
    if findings:
        require_writable(findings)
        require_outside(findings, options.data_dir)
    rows, cases = [], audit(options.data_dir, options.conditioning_dir, parse(ReadOptions, options), options.patients)
    for number, row in enumerate(cases, start=1):
        rows.append(row.as_dict())
        reason = f": {row.reason}" if row.reason else ""
        print(f"[{number}/{len(cases)}] {AUDIT_WORDS[row.status]} {row.key}{reason}", flush=True)
    counts = Counter(row["status"] for row in rows)
    usable = f"{len(rows) - counts['refused']} usable ({counts['warning']} with warnings)"
    print(f"{len(rows)} cases: {usable}, {counts['refused']} rejected")
    if findings:
        write_json(findings, rows)
    return 1 if counts["refused"] else 0


def submission(options: argparse.Namespace) -> int:
    """Check results as the challenge does, and zip them."""
    from ldm_lib.inpainting.submission import check, has_several_masks, pack, require_archive

    output, findings = expand_path(options.output or f"{options.results}/submission.zip"), []
    reading = parse(ReadOptions, options)
    if options.output:
        require_archive(output, options.data)
    for finding in check(options.data, options.results, reading):
        findings.append(finding)
        print(finding, flush=True)
    if invalid := sum(bool(finding.problem) for finding in findings):
        raise InputError(f"{invalid} of {len(findings)} are not valid results", where=options.results, fix="see above")
    if has_several_masks(options.data, reading):
        print("WARNING names carry the number of a mask; the challenge has one mask per case", file=sys.stderr)
    print(f"{output}: {pack(options.data, options.results, output, reading)} results")
    return 0


def score(options: argparse.Namespace) -> int:
    """Print the challenge's scores of one prediction."""
    from ldm_lib.evaluation.metrics import brats_scores
    from ldm_lib.images.grid import on_grid_of
    from ldm_lib.images.masks import read_mask
    from ldm_lib.images.volume import read_image

    reading = parse(ReadOptions, options)
    notes: list[str] = []
    voided = read_image(options.voided, reading)
    volumes = [on_grid_of(read_image(path, reading), voided, notes) for path in (options.prediction, options.target)]
    healthy = read_mask(options.mask_healthy, voided, reading, warnings=notes)
    for note in notes:
        print(f"WARNING {note}", file=sys.stderr)
    if leaked := int((voided.voxels[healthy] != 0).sum()):
        raise InputError(f"{leaked} of {int(healthy.sum())} voxels are not void under the healthy mask",
                         where=options.voided, fix="give the voided image, which sets the intensity range")  # fmt: skip
    prediction, target = (volume.voxels for volume in volumes)
    scores = brats_scores(prediction, target, voided.voxels, healthy, where=options.prediction)
    for name, value in scores.items():
        print(f"{name:8} {value:.6g}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Inpaint cases whose ground truth is known, and score them next to the baselines."""
    from ldm_lib.evaluation.evaluate import evaluate_folder

    table = evaluate_folder(
        options.data_dir,
        options.output,
        parse(InpaintOptions, options),
        read_options=parse(ReadOptions, options),
        patients_file=options.patients,
        model=options.model,
        tissue=options.tissue,
        pictures=options.pictures,
    )
    print(table)
    return 0
