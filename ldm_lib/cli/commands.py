"""Run the commands that work on experiments and models: run, sweep, compare, export, params, doctor.

Heavy libraries are imported by the command that needs them, so that help starts at once.
"""

import argparse
import sys

from ldm_lib.cli.arguments import CASE_READING
from ldm_lib.cli.case_commands import cohort, evaluate, inpaint, prior, score, submission, validate
from ldm_lib.experiment.presets import DEFAULT_PRESET
from ldm_lib.experiment.stages import stage_name
from ldm_lib.files import expand_path
from ldm_lib.options import assignments
from ldm_lib.progress import report


def run(options: argparse.Namespace) -> int:
    """Run the notebooks of a run folder, all of them or the stages that are named."""
    from ldm_lib.experiment import runner

    # Parameters that messages of the notebooks name as the options that they are in other commands.
    named = {name: getattr(options, name) for name in CASE_READING} | {"patients_file": options.patients}
    overrides = assignments(options.set) | {name: value for name, value in named.items() if value}
    name = options.run or overrides.pop("run", options.preset or DEFAULT_PRESET)
    folder = runner.run_stages(
        options.stages,
        run=name,
        preset=options.preset or runner.preset_of(name),
        overrides=overrides | ({"overwrite": True} if options.overwrite else {}),
        command=["python", "-m", "ldm_lib", *sys.argv[1:]],
        progress=report,
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
        failed = run_sweep(described, jobs=options.jobs, only=options.only, progress=report)
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


def export(options: argparse.Namespace) -> int:
    """Write a model in float16 with its training log and a card, as a model folder or a MONAI bundle."""
    from ldm_lib.training.export import export_model

    files = export_model(options.model, expand_path(options.output), to=options.to, temperature=options.temperature)
    print("\n".join(f"{path}: {path.stat().st_size / 1e6:.3g} MB" for path in files))
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


COMMANDS = (run, sweep, compare, inpaint, submission, prior, cohort, validate, score, evaluate, export, params, doctor)
