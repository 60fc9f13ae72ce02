"""One case's candidates for the hole, each scored as the challenge scores. No network library is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lib.baselines import BASELINES
from ldm_lib.cases import CaseData
from ldm_lib.metrics import brats_scores, hole_size_class, scores_by_tissue
from ldm_lib.volumes import read_volume

ONE_SAMPLE, CEILING = "one sample", "ceiling"


def mean_of(samples: int) -> str:
    """Names the mean of K samples in tables."""
    return f"mean of {samples}"


def sample_path(results: Path, data: CaseData, k: int) -> Path:
    """Where stage 05 wrote the k-th sample of a case."""
    return results / data.case.result_name.replace(".nii.gz", f"-sample-{k:04d}.nii.gz")


def candidates(data: CaseData, results: Path, samples: int, *, baselines: bool = True) -> dict[str, np.ndarray]:
    """Method -> filled volume (x, y, z) in the file's order: ours, the autoencoder's ceiling and the baselines."""
    files = {
        ONE_SAMPLE: sample_path(results, data, 0),
        mean_of(samples): results / data.case.result_name,
        CEILING: results / "ceiling" / data.case.result_name,
    }
    volumes = {name: read_volume(path).voxels for name, path in files.items()}
    usable = [n for n in BASELINES if n != "tissue paint" or data.tissue is not None] if baselines else []
    fills = {
        n: BASELINES[n](data.voided, data.mask, tissue=data.tissue, lateral_axis=data.lateral_axis) for n in usable
    }
    return volumes | fills


def score_rows(data: CaseData, volumes: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores on the healthy mask: a row per method, and a row per method and tissue (none without a tissue map)."""
    hole_mm3 = float(data.scored.sum()) * float(np.prod(data.source.spacing_mm))
    about = {
        "case": data.case.key,
        "patient": data.case.patient,
        "hole": hole_size_class(hole_mm3),
        "tissue_map": "none" if data.tissue is None else "given",
    }
    rows, by_tissue = [], []
    for method, volume in volumes.items():
        scored = (volume, data.target, data.voided, data.scored)
        rows.append(about | {"method": method} | brats_scores(*scored, where=data.case.key))
        if data.tissue is not None:
            found = scores_by_tissue(*scored, data.tissue, where=data.case.key)
            by_tissue += [about | {"method": method} | row for row in found]
    return rows, by_tissue
