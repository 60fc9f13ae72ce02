"""Describe the options of every command."""

import argparse

from ldm_lib.anatomy.options import GrowthRates
from ldm_lib.cli.options import Argument, arg, parameters
from ldm_lib.data.options import MadeCohortOptions
from ldm_lib.experiment.presets import DEFAULT_PRESET, PRESETS
from ldm_lib.files import PRETRAINED
from ldm_lib.images.options import ReadOptions
from ldm_lib.inpainting.options import InpaintOptions, ResultOptions

SCAN = "3D T1n, .nii, .nii.gz, .mgh or .mgz; a whole head needs --skull-strip"
CASES = "folder of cases: several masks per patient, or the BraTS challenge's layout"
MODEL = arg("--model", "model folder (default: the pretrained weights)", metavar="DIR")
MAPS = arg(
    "--conditioning-dir", "folder of growth and tissue maps (default: next to the data)", default="", metavar="DIR"
)
PATIENTS = arg("--patients", "CSV file of case,patient, for names that do not say the patient", default="", metavar="F")
STAGE = arg("stage", "such as 04 or 04_training", metavar="STAGE")
SAMPLING = ("sampler", "num_inference_steps", "temperature", "seed", "device", "precision")
READING = ("assume_orientation", "nan_as_zero", "mask_labels", "resample_mask")
CASE_READING = (*READING, "skull_strip")
# Command -> its options; a list of several options holds those of which only one may be given.
ARGUMENTS: dict[str, list[Argument | list[Argument]]] = {
    "run": [
        arg("stages", "such as 04 or 04_training (default: all six)", nargs="*", metavar="STAGE"),
        arg("--run", "run folder in the outputs folder (default: named as the preset)", default="", metavar="NAME"),
        arg("--preset", f"{', '.join(PRESETS)} (default: that of the run, else {DEFAULT_PRESET})", default=""),
        arg("--set", "set a parameter; repeatable", action="append", default=[], metavar="KEY=VALUE"),
        arg("--overwrite", "replace stages that were run with other settings", action="store_true"),
        PATIENTS,
        *parameters(ReadOptions, *CASE_READING),
    ],
    "sweep": [
        arg("grid", "YAML file: name, preset, stages, set, grid, runs", metavar="GRID"),
        arg("--jobs", "runs at a time (default: 1)", type=int, default=1, metavar="N"),
        [arg("--only", "run number K alone, from 0, for array jobs; no table", type=int, metavar="K"),
         arg("--count", "print the number of runs and stop", action="store_true"),
         arg("--table", "write table and figure of the finished runs only", action="store_true")],
    ],
    "compare": [STAGE, arg("runs", "run folders in the outputs folder", nargs="+", metavar="RUN")],
    "inpaint": [
        [arg("--t1n-voided", f"{SCAN} or --brain-mask; needs --mask", metavar="F"),
         arg("--data", f"{CASES}, or a BIDS data set; instead of one file", metavar="DIR")],
        arg("--mask", "mask on the same grid: 1 = inpaint", metavar="F", also="--lesion-mask"),
        arg("--output", "result file (mean of several samples); a folder with --data", required=True, metavar="OUT"),
        arg("--growth", "tumour-cell concentration in [0, 1] (default: 0, healthy)", metavar="F"),
        arg("--tissue", "tissue labels: 1 CSF, 2 GM, 3 WM", metavar="F"),
        arg("--brain-mask", "of a whole head: the brain is above 0", metavar="F"),
        MAPS,
        arg("--make-missing", "make missing tissue maps from the scans (default: if the model needs them)",
            action=argparse.BooleanOptionalAction),
        MODEL,
        *parameters(ResultOptions, "estimate", *SAMPLING, "guidance", "blend_mm", "detail", "samples", "dilate"),
        arg("--write-samples", "write each sample, too", action="store_true"),
        arg("--summary", "write tissue labels (-dseg) and volumes (-summary.json) of the result, too",
            action="store_true"),
        arg("--page", "write an HTML page of the case next to the result, for any browser", action="store_true"),
        *parameters(ReadOptions, *CASE_READING, "scrub_header"),
    ],
    "submission": [
        arg("--data", CASES, required=True, metavar="DIR"),
        arg("--results", "folder of their <ID>-t1n-inference.nii.gz", required=True, metavar="DIR"),
        arg("--output", "zip file to write (default: submission.zip in the results)", metavar="OUT"),
        *parameters(ReadOptions, *CASE_READING),
    ],
    "prior": [
        arg("--t1n-voided", SCAN, required=True, metavar="F"),
        arg("--mask", "mask on the same grid: 1 = unknown", required=True, metavar="F"),
        arg("--tissue", "tissue labels to write: 1 CSF, 2 GM, 3 WM", required=True, metavar="OUT"),
        arg("--growth", "tumour-cell concentration to write, in [0, 1]", metavar="OUT"),
        arg("--seed-mm", "start of the tumour in world coordinates of the file (RAS, mm)", metavar="X,Y,Z"),
        arg("--segmentation", "binary tumour segmentation, instead of a start", metavar="F"),
        arg("--days", "age of the tumour, days (default: 100)", type=float, default=100.0),
        *parameters(GrowthRates, *GrowthRates.model_fields),
        arg("--lesion", "binary lesion mask (visible but abnormal tissue)", metavar="F"),
        arg("--refine", "labelling of visible tissue: intensity and atlas, or the atlas alone (default: mixture)",
            default="mixture", choices=["mixture", "none"]),
        *parameters(ReadOptions, *CASE_READING),
    ],
    "validate": [
        arg("data_dir", CASES, metavar="DATA_DIR"),
        MAPS,
        PATIENTS,
        arg("--json", "JSON file of the findings to write", metavar="OUT"),
        *parameters(ReadOptions, *CASE_READING),
    ],
    "cohort": [
        arg("--from", "skull-stripped T1w of healthy people: a folder of scans, or a BIDS data set",
            required=True, dest="source", metavar="DIR"),
        arg("--output", "folder to write: data, conditioning_data, cohort.csv, exclusions.csv, pictures", required=True,
            metavar="DIR"),
        *parameters(MadeCohortOptions, "masks_per_patient", "seed", "spacing_mm", "workers", spacing_mm=1.0),
        *parameters(ReadOptions, "assume_orientation", "nan_as_zero"),
    ],
    "score": [
        *(arg(f"--{name}", text, required=True, metavar="F") for name, text in
          (("prediction", "inpainted volume"), ("target", "true volume"), ("voided", "voided volume"),
           ("mask-healthy", "mask of the healthy tissue that is scored"))),
        *parameters(ReadOptions, *READING),
    ],
    "evaluate": [
        arg("data_dir", f"{CASES}, with their t1n", metavar="DATA_DIR"),
        arg("--output", "folder for maps, results, metrics.csv and table.md", required=True, metavar="DIR"),
        MODEL,
        arg("--tissue", "source of the tissue maps: each voided scan, or given maps, which may leak the hidden region "
            "(default: atlas)", default="atlas", choices=["atlas", "given"]),
        *parameters(InpaintOptions, *SAMPLING, "detail", "samples", samples=16),
        PATIENTS,
        arg("--pictures", "number of cases to draw, as PNG and as HTML page (default: 0)", type=int, default=0,
            metavar="N"),
        *parameters(ReadOptions, *CASE_READING),
    ],
    "export": [
        arg("model", "model folder of a stage 04 (default: the pretrained weights)", nargs="?", default=str(PRETRAINED),
            metavar="DIR"),
        arg("--to", "form: a model folder with a card that Hugging Face reads, or a MONAI bundle (default: folder)",
            default="folder", choices=["folder", "monai-bundle"]),
        arg("--output", "folder to write", required=True, metavar="DIR"),
        arg("--temperature", "default scale of the initial noise, for config.json", type=float, default=0.0),
    ],
    "params": [STAGE, arg("--preset", f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})", default=DEFAULT_PRESET)],
}  # fmt: skip
