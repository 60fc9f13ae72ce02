"""Run each command with its options and return the exit status.

Heavy libraries are imported by the command that needs them, so that help, validate and score start at once.
"""

import argparse
import sys
from collections import Counter

from ldm_lib.anatomy.options import GrowthRates
from ldm_lib.cli.options import assignments, parse, point
from ldm_lib.data.options import MadeCohortOptions, ReadOptions
from ldm_lib.errors import InputError
from ldm_lib.experiment.presets import DEFAULT_PRESET
from ldm_lib.experiment.stages import stage_name
from ldm_lib.files import expand_path, require_writable, write_json
from ldm_lib.inpainting.options import InpaintOptions, ResultOptions


def run(options: argparse.Namespace) -> int:
    """Run the notebooks of a run folder, all of them or the stages that are named."""
    from ldm_lib.experiment import runner

    overrides = assignments(options.set)
    name = options.run or overrides.pop("run", options.preset or DEFAULT_PRESET)
    folder = runner.run_stages(
        options.stages,
        run=name,
        preset=options.preset or runner.preset_of(name),
        overrides=overrides | ({"overwrite": True} if options.overwrite else {}),
        command=["python", "-m", "ldm_lib", *sys.argv[1:]],
        progress=_say,
    )
    print(f"report: {folder / 'index.html'}")
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Run the parameter sets of a grid file, a few at a time, and write a table and a figure."""
    from ldm_lib.experiment.sweep import run_sweep
    from ldm_lib.experiment.sweep_file import read_sweep
    from ldm_lib.experiment.sweep_table import write_results

    described, failed = read_sweep(options.grid), {}
    if options.count:
        print(len(described.runs))
        return 0
    if not options.table:
        failed = run_sweep(described, jobs=options.jobs, only=options.only, progress=_say)
    if options.only is None:  # each task of an array job would write the table of all
        print(write_results(described))
    for name, reason in failed.items():
        print(f"ERROR {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def compare(options: argparse.Namespace) -> int:
    """Compare finished runs: parameters of a stage that differ, and the results."""
    from ldm_lib.experiment import runner

    print(runner.compare(stage_name(options.stage), options.runs))
    return 0


def inpaint(options: argparse.Namespace) -> int:
    """Inpaint one volume, or every case of a folder."""
    maps = {name: getattr(options, name) for name in ("mask", "growth", "tissue")}
    if options.data and any(maps.values()):
        options.misused("--mask, --growth and --tissue go with --t1n-voided; with --data goes --conditioning-dir")
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
        **settings,
    )
    print("\n".join(str(path) for path in written))
    return 0


def _inpaint_folder(options: argparse.Namespace, sampling: InpaintOptions, reading: ReadOptions) -> int:
    from ldm_lib.inpainting.folder import REFUSED, inpaint_folder

    rows = inpaint_folder(
        options.data,
        options.output,
        sampling,
        conditioning_dir=options.conditioning_dir,
        read_options=reading,
        model=options.model,
        make_missing=options.make_missing,
        each=options.write_samples,
        say=_say,
    )
    counts = Counter(row["status"] for row in rows)
    _say(f"{len(rows)} cases: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    return 1 if counts[REFUSED] else 0


def prior(options: argparse.Namespace) -> int:
    """Make tissue and growth maps from a scan and its mask."""
    rates, seed_mm = parse(GrowthRates, options), point(options.seed_mm) if options.seed_mm else None
    from ldm_lib.data.conditioning_maps import make_conditioning_maps
    from ldm_lib.data.nifti import stem
    from ldm_lib.plots.figures import planes

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
    settings["masks"] = settings.pop("masks_per_patient")
    people, exclusions = make_scan_cohort(options.source, output, **settings, draw=save_planes, say=_say)
    _say(
        f"{len(people)} people in {output}, {len(exclusions)} scans excluded; see cohort.csv, exclusions.csv, pictures/"
    )
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
    rows, cases = [], audit(options.data_dir, options.conditioning_dir, parse(ReadOptions, options))
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
    if options.output:
        require_archive(output, options.data)
    for finding in check(options.data, options.results):
        findings.append(finding)
        print(finding, flush=True)
    if invalid := sum(bool(finding.problem) for finding in findings):
        raise InputError(f"{invalid} of {len(findings)} are not valid results", where=options.results, fix="see above")
    if has_several_masks(options.data):
        print("WARNING names carry the number of a mask; the challenge has one mask per case", file=sys.stderr)
    print(f"{output}: {pack(options.data, options.results, output)} results")
    return 0


def score(options: argparse.Namespace) -> int:
    """Print the challenge's scores of one prediction."""
    from ldm_lib.data.masks import read_mask
    from ldm_lib.data.volume import read_image, require_same_grid
    from ldm_lib.evaluation.metrics import brats_scores

    voided = read_image(options.voided)
    volumes = [read_image(path) for path in (options.prediction, options.target)]
    for volume in volumes:
        require_same_grid(volume, voided)
    healthy = read_mask(options.mask_healthy, voided)
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
        model=options.model,
        tissue=options.tissue,
        pictures=options.pictures,
        say=_say,
    )
    print(table)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a trained model in float16 with its training log, as the pretrained weights are."""
    from ldm_lib.training.export import export_model

    files = export_model(options.model, expand_path(options.output), temperature=options.temperature)
    print("\n".join(f"{path}: {path.stat().st_size / 1e6:.2f} MB" for path in files))
    return 0


def params(options: argparse.Namespace) -> int:
    """List the parameters of a stage."""
    from ldm_lib.experiment.runner import describe

    print(describe(stage_name(options.stage), options.preset))
    return 0


def doctor(options: argparse.Namespace) -> int:  # noqa: ARG001 - one signature for all commands
    """Check the installation and this machine."""
    from ldm_lib.cli.doctor import examine

    checks = examine()
    for check in checks:
        print(f"{'ok' if check.good else 'BAD':4}{check.what}: {check.found}")
    return 0 if all(check.good for check in checks) else 1


def _say(line: str) -> None:
    """Print a line of work that continues when its reader, such as `head`, has left."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = None


COMMANDS = (run, sweep, compare, inpaint, submission, prior, cohort, validate, score, evaluate, export, params, doctor)
