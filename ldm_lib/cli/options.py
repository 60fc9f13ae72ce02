"""What the command line understands: commands, their options, and how their values are read."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from ldm_lib.data.options import ReadOptions
from ldm_lib.errors import ConfigError
from ldm_lib.experiment.presets import DEFAULT_PRESET, PRESETS
from ldm_lib.experiment.stages import AuditConfig, SamplingConfig
from ldm_lib.files import PRETRAINED

Command = Callable[[argparse.Namespace], int]
RATES = {"diffusion": 0.2, "ratio": 10.0, "proliferation": 0.05}  # `growth.Rates`, which loads torch; a test compares
SAMPLING = SamplingConfig.model_fields  # the sampling options are the parameters of notebook 05


def build_parser(functions: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser of the command line; each command is the function of its name."""
    named = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(
        prog="python -m ldm_lib", description="3D brain MRI inpainting by latent diffusion"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=named[name])
        return sub

    _add_run_options(command("run", "run the notebooks of a run folder, all or the stages named"))
    _add_sweep_options(command("sweep", "the runs of a grid file, a few at a time, then a table and a figure of them"))
    sub = command("compare", "finished runs side by side: what differs in a stage's parameters, and what came of it")
    sub.add_argument("stage")
    sub.add_argument("runs", nargs="+", metavar="RUN")

    _add_inpaint_options(command("inpaint", "fill the hole of one volume, or of every case of a folder"))
    _add_prior_options(command("prior", "make tissue and growth maps from a scan and its mask"))

    _add_validate_options(command("validate", "check every case of a folder in one pass"))
    _add_submission_options(command("submission", "check results as the challenge would, and zip them"))
    sub = command("score", "the challenge's scores of one prediction")
    for name in ("prediction", "target", "voided", "mask-healthy"):
        sub.add_argument(f"--{name}", required=True)

    _add_ship_options(command("ship", "write a trained model as it comes with the library: in float16, with its log"))
    _add_evaluate_options(command("evaluate", "fill cases whose truth is known, and score them beside the baselines"))

    sub = command("params", "list a stage's parameters")
    sub.add_argument("stage")
    sub.add_argument("--preset", default=DEFAULT_PRESET)

    command("doctor", "check this installation and machine")

    _add_bench_options(command("bench", "seconds and memory at full size beside what is commonly done, as ratios"))
    return parser


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("stages", nargs="*", metavar="STAGE", help="such as 04 or 04_training; none means all six")
    sub.add_argument("--run", default="", help="run folder under outputs/ (default: the preset's name)")
    sub.add_argument("--preset", default=DEFAULT_PRESET, help=f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a parameter; repeatable")
    sub.add_argument("--overwrite", action="store_true", help="replace stages made with other settings")


def _add_sweep_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("grid", metavar="GRID", help="YAML: name, preset, stages, set, grid, runs; see docs/sweep.yaml")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    part = sub.add_mutually_exclusive_group()
    part.add_argument("--only", type=int, metavar="K", help="the K-th run alone, from 0, for array jobs; no table")
    part.add_argument("--count", action="store_true", help="print how many runs there are, and do nothing")
    part.add_argument("--table", action="store_true", help="only gather table and figure from what is done")


def _add_inpaint_options(sub: argparse.ArgumentParser) -> None:
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--t1n-voided", metavar="F", help="3D T1n, .nii or .nii.gz; needs --mask")
    what.add_argument("--data", metavar="DIR", help="a folder of cases in either layout, instead of one file")
    sub.add_argument("--mask", metavar="F", help="1 = fill this, on the same grid")
    sub.add_argument("--output", required=True, help="result, the mean if --samples is above 1; of --data a folder")
    sub.add_argument("--growth", metavar="F", help="tumour-cell concentration in [0, 1]; none means healthy")
    sub.add_argument("--tissue", metavar="F", help="labels 1 CSF, 2 GM, 3 WM")
    sub.add_argument("--conditioning-dir", default="", metavar="DIR", help="maps of --data (default: beside the data)")
    text = "make the tissue map from the scan if none is given (default: if the model needs one)"
    sub.add_argument("--make-missing", action=argparse.BooleanOptionalAction, help=text)
    sub.add_argument("--model", help="folder with weights; none takes those that are shipped")
    sub.add_argument("--sampler", default=SAMPLING["sampler"].default, choices=get_args(SAMPLING["sampler"].annotation))
    steps = SAMPLING["num_inference_steps"].default
    sub.add_argument("--steps", type=int, default=steps, help=f"denoiser calls per sample (default: {steps})")
    guidance = SAMPLING["guidance"].default
    sub.add_argument("--guidance", type=float, default=guidance, help=f"0 ignores the maps (default: {guidance:g})")
    reach = SAMPLING["blend_mm"].default
    sub.add_argument(
        "--blend-mm", type=float, default=reach, help=f"reach of the edge's fit; 0: none (default: {reach:g})"
    )
    heat = SAMPLING["temperature"].default
    sub.add_argument("--temperature", type=float, default=heat, help="of the first noise; 0: the model's own (default)")
    sub.add_argument("--samples", type=int, default=1, help="K; above 1 also spread and the sample nearest to the mean")
    sub.add_argument("--write-samples", action="store_true", help="write each of the K samples too")
    sub.add_argument("--seed", type=int, default=SAMPLING["seed"].default)
    sub.add_argument("--device", default=SAMPLING["device"].default, choices=get_args(SAMPLING["device"].annotation))
    _add_allowances(sub)
    sub.add_argument("--scrub-header", action="store_true", help="results without their source's free text, extensions")
    sub.set_defaults(misused=sub.error)


def _add_ship_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="DIR", help="model folder of a stage 04")
    sub.add_argument("--output", default=str(PRETRAINED), metavar="DIR", help="default: the library's own folder")
    sub.add_argument("--temperature", type=float, default=0.0, help="that sampling is to start from by default")


def _add_evaluate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data_dir", help="a folder of cases in either layout, with their t1n")
    sub.add_argument(
        "--output", required=True, metavar="DIR", help="takes maps, results, metrics.csv, table.md, pictures"
    )
    sub.add_argument("--model", help="folder with weights; none takes those that are shipped")
    sub.add_argument("--samples", type=int, default=16, help="K: one sample and the mean of K are scored (default: 16)")
    text = "tissue maps: made from each voided scan (default), or those that came with the cases"
    sub.add_argument("--tissue", default="atlas", choices=["atlas", "given"], help=text)
    for name in ("sampler", "device"):
        field = SAMPLING[name]
        sub.add_argument(f"--{name}", default=field.default, choices=get_args(field.annotation))
    steps, heat = (SAMPLING[name].default for name in ("num_inference_steps", "temperature"))
    sub.add_argument("--steps", type=int, default=steps, help=f"denoiser calls per sample (default: {steps})")
    sub.add_argument("--temperature", type=float, default=heat, help="of the first noise; 0: the model's own (default)")
    sub.add_argument("--seed", type=int, default=SAMPLING["seed"].default)
    sub.add_argument("--pictures", type=int, default=0, metavar="N", help="draw the first N cases")


def _add_validate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data_dir")
    sub.add_argument("--conditioning-dir", default="", help="growth and tissue maps (default: beside the data)")
    sub.add_argument("--json", metavar="F", help="write the findings as JSON too")
    _add_allowances(sub)


def _add_allowances(sub: argparse.ArgumentParser) -> None:
    """The parameters of notebook 01 that let pass what would be refused."""
    for name, how in (("assume_orientation", {"metavar": "LPS"}), ("nan_as_zero", {"action": "store_true"}),
                      ("mask_labels", {"metavar": "1,2,4"})):  # fmt: skip
        field = AuditConfig.model_fields[name]
        sub.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=field.description, **how)


def allowances(options: argparse.Namespace) -> ReadOptions:
    """What the options let pass.

    Raises:
        ConfigError: an orientation or labels that cannot be read.
    """
    asked = {name: getattr(options, name) for name in ("assume_orientation", "nan_as_zero", "mask_labels")}
    AuditConfig.parse(asked)
    return ReadOptions(**asked, scrub_header=getattr(options, "scrub_header", False))


def _add_prior_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--t1n-voided", required=True, help="skull-stripped 3D T1n, .nii or .nii.gz")
    sub.add_argument("--mask", required=True, help="1 = not known, on the same grid")
    sub.add_argument("--tissue", required=True, metavar="OUT", help="labels 1 CSF, 2 GM, 3 WM, with a JSON beside it")
    sub.add_argument("--growth", metavar="OUT", help="concentration in [0, 1], with a JSON beside it")
    sub.add_argument("--seed-mm", metavar="X,Y,Z", help="the tumour's start in the file's world (RAS, mm)")
    sub.add_argument("--segmentation", metavar="F", help="the tumour as it is, instead of a start: binary")
    sub.add_argument("--days", type=float, default=100.0, help="the tumour's age (default: 100)")
    for name, text in (("diffusion", "D in white matter, mm^2 a day"), ("ratio", "D in white over D in grey matter"),
                       ("proliferation", "rho, per day")):  # fmt: skip
        sub.add_argument(f"--{name}", type=float, default=RATES[name], help=f"{text} (default: {RATES[name]:g})")
    sub.add_argument("--lesion", metavar="F", help="what is seen but no healthy tissue: binary")
    text = "how what is seen is labelled: mixture of intensity and place (default), hmrf, or none, the atlas alone"
    sub.add_argument("--refine", default="mixture", choices=["mixture", "hmrf", "none"], help=text)


def _add_submission_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", required=True, metavar="DIR", help="the cases that were filled")
    sub.add_argument("--results", required=True, metavar="DIR", help="<ID>-t1n-inference.nii.gz of each")
    sub.add_argument("--output", metavar="F", help="zip file (default: submission.zip among the results)")


def _add_bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--only", choices=["case", "autoencoder", "training"], help="one part; others are not in the file")
    sub.add_argument("--full", action="store_true", help="run all 50 steps of the common stack, not 3 of them")
    sub.add_argument("--output", metavar="F", help="JSON file (default: outputs/bench/bench.json)")


def point(text: str) -> tuple[float, ...]:
    """ "x,y,z" -> three numbers."""
    try:
        x, y, z = (float(part) for part in text.split(","))
        if not all(map(math.isfinite, (x, y, z))):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seed-mm {text}: not three numbers", fix="write for example --seed-mm=-30,12,45") from None
    return x, y, z


def joined(arguments: Sequence[str]) -> list[str]:
    """The words with --seed-mm -30,12,45 as one word: argparse would take the minus for an option."""
    words = list(arguments)
    for k in reversed([k for k, word in enumerate(words[:-1]) if word == "--seed-mm"]):
        words[k : k + 2] = [f"{words[k]}={words[k + 1]}"]
    return words


def assignments(texts: Iterable[str]) -> dict[str, str]:
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
