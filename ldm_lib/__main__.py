"""The command line: `python -m ldm_lib run | compare | inpaint | validate | score | params | doctor | bench`.

Exit status: 0 done, 1 refused or failed (one line), 2 wrong usage, 143 on SIGTERM. Heavy libraries are imported by the
command that needs them, so that help, validate and score start at once.
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

from ldm_lib.config import SamplingConfig, stage_name
from ldm_lib.errors import ConfigError, InputError, LdmError
from ldm_lib.presets import DEFAULT_PRESET, PRESETS
from ldm_lib.runs import outputs_folder

SAMPLING = SamplingConfig.model_fields  # the sampling options are the parameters of notebook 05


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run one command, and turn a refusal into one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        return options.command(options)
    except LdmError as error:
        if options.debug:
            raise
        print(f"ERROR {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader, such as `head`, has left
        sys.stdout = None
        return 0
    except OSError as error:  # a full disk, a folder without rights
        if options.debug:
            raise
        print(f"ERROR {InputError(error.strerror or str(error), where=error.filename or '')}", file=sys.stderr)
    return 1


def run(options: argparse.Namespace) -> int:
    from ldm_lib import runner

    overrides = _assignments(options.set)
    folder = runner.run(
        [stage_name(text) for text in options.stages],
        name=options.run or overrides.pop("run", options.preset),
        preset=options.preset,
        overrides=overrides | ({"overwrite": True} if options.overwrite else {}),
        command=["python", "-m", "ldm_lib", *sys.argv[1:]],
        say=lambda line: print(line, flush=True),
    )
    print(f"report: {folder / 'index.html'}")
    return 0


def compare(options: argparse.Namespace) -> int:
    from ldm_lib import runner

    print(runner.compare(stage_name(options.stage), options.runs))
    return 0


def inpaint(options: argparse.Namespace) -> int:
    from ldm_lib.inpainter import newest_model
    from ldm_lib.inpainting import inpaint as fill

    if not options.model:
        options.model = newest_model()
        print(f"model: {options.model}", file=sys.stderr)
    written = fill(
        options.t1n_voided,
        options.mask,
        options.output,
        growth=options.growth,
        tissue=options.tissue,
        make_missing=options.make_missing,
        model=options.model,
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        samples=options.samples,
        write_samples=options.write_samples,
        seed=options.seed,
        device=options.device,
    )
    print("\n".join(str(path) for path in written))
    return 0


def validate(options: argparse.Namespace) -> int:
    from ldm_lib.cohort import audit

    if options.json:
        _require_folder(options.json)
    rows = []
    for row in audit(options.data_dir, options.conditioning_dir):
        rows.append(row.as_dict())
        print(f"{row.status.upper():8}{row.key}{': ' if row.reason else ''}{row.reason}", flush=True)
    refused = sum(row["status"] == "refused" for row in rows)
    print(f"{len(rows)} cases: {len(rows) - refused} usable, {refused} refused")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if refused else 0


def score(options: argparse.Namespace) -> int:
    from ldm_lib.metrics import brats_scores
    from ldm_lib.volumes import read_image, read_mask, require_same_grid

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


def params(options: argparse.Namespace) -> int:
    from ldm_lib.runner import describe

    print(describe(stage_name(options.stage), options.preset))
    return 0


def doctor(options: argparse.Namespace) -> int:  # noqa: ARG001 - one signature for all commands
    from ldm_lib.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok' if finding.good else 'BAD':4}{finding.what}: {finding.found}")
    return 0 if all(finding.good for finding in findings) else 1


def bench(options: argparse.Namespace) -> int:
    from ldm_lib.bench import bench as measure

    measure(Path(options.output) if options.output else outputs_folder() / "bench" / "bench.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldm_lib", description="3D brain MRI inpainting by latent diffusion"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    _add_run_options(command(run, "run the notebooks of a run folder, all or the stages named"))
    sub = command(compare, "finished runs side by side: what differs in a stage's parameters, and what came of it")
    sub.add_argument("stage")
    sub.add_argument("runs", nargs="+", metavar="RUN")

    _add_inpaint_options(command(inpaint, "fill the hole of one volume"))

    sub = command(validate, "check every case of a folder in one pass")
    sub.add_argument("data_dir")
    sub.add_argument("--conditioning-dir", default="", help="growth and tissue maps (default: beside the data)")
    sub.add_argument("--json", metavar="F", help="write the findings as JSON too")

    sub = command(score, "the challenge's scores of one prediction")
    for name in ("prediction", "target", "voided", "mask-healthy"):
        sub.add_argument(f"--{name}", required=True)

    sub = command(params, "list a stage's parameters")
    sub.add_argument("stage")
    sub.add_argument("--preset", default=DEFAULT_PRESET)

    command(doctor, "check this installation and machine")

    sub = command(bench, "seconds and memory of the full-size autoencoder beside MONAI's, as ratios")
    sub.add_argument("--output", metavar="F", help="JSON file (default: outputs/bench/bench.json)")
    return parser


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("stages", nargs="*", metavar="STAGE", help="such as 04 or 04_training; none means all six")
    sub.add_argument("--run", default="", help="run folder under outputs/ (default: the preset's name)")
    sub.add_argument("--preset", default=DEFAULT_PRESET, help=f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a parameter; repeatable")
    sub.add_argument("--overwrite", action="store_true", help="replace stages made with other settings")


def _add_inpaint_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--t1n-voided", required=True, help="3D T1n, .nii or .nii.gz")
    sub.add_argument("--mask", required=True, help="1 = fill this, on the same grid")
    sub.add_argument("--output", required=True, help="result; the mean if --samples is above 1")
    sub.add_argument("--growth", help="tumour-cell concentration in [0, 1]; none means healthy")
    sub.add_argument("--tissue", help="labels 1 CSF, 2 GM, 3 WM")
    sub.add_argument("--make-missing", action="store_true", help="make the tissue map from the scan if none is given")
    sub.add_argument("--model", help="folder with weights; none takes the newest finished training")
    sub.add_argument("--sampler", default=SAMPLING["sampler"].default, choices=get_args(SAMPLING["sampler"].annotation))
    steps = SAMPLING["num_inference_steps"].default
    sub.add_argument("--steps", type=int, default=steps, help=f"denoiser calls per sample (default: {steps})")
    guidance = SAMPLING["guidance"].default
    sub.add_argument("--guidance", type=float, default=guidance, help=f"0 ignores the maps (default: {guidance:g})")
    sub.add_argument("--samples", type=int, default=1, help="K; also writes the standard deviation if above 1")
    sub.add_argument("--write-samples", action="store_true", help="write each of the K samples too")
    sub.add_argument("--seed", type=int, default=SAMPLING["seed"].default)
    sub.add_argument("--device", default=SAMPLING["device"].default, choices=get_args(SAMPLING["device"].annotation))


def _assignments(texts: Iterable[str]) -> dict[str, str]:
    """["key=value", ...] -> {key: value}; a key given twice is refused, for one of them would be lost."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(f"--set {text}: not KEY=VALUE", fix="write for example --set max_epochs=10")
        if name in values:
            raise ConfigError(f"--set {name} is given twice, {values[name]!r} and {value!r}", fix="keep one")
        values[name] = value
    return values


def _require_folder(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise InputError("its folder does not exist", where=path, fix="make it first")


if __name__ == "__main__":
    sys.exit(main())
