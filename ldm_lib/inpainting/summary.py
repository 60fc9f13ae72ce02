"""Summarise what a mask was filled with: tissue labels of the result, and their volumes with how they were made."""

from pathlib import Path

import numpy as np

from ldm_lib.anatomy.tissue import CSF, GM, WM
from ldm_lib.anatomy.tissue_segmentation import nearest_tissue
from ldm_lib.files import write_json
from ldm_lib.images.volume import write_map
from ldm_lib.inpainting.derivatives import provenance, write_sidecars
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.inpainting.options import InpaintOptions
from ldm_lib.inpainting.result import Inpainting, result_path, summary_path

NO_LABELS = "no tissue map: the mask's tissue is not labelled"
_NAMES = {"None": 0, "CSF": CSF, "GM": GM, "WM": WM}


def write_summary(inpainter: Inpainter, options: InpaintOptions, result: Inpainting, output: Path) -> list[Path]:
    """Write the labels and the summary of a result, and return the files; without a tissue map there are no labels.

    Outside the mask the labels are those of the tissue map. Inside it they are those of the filled intensities
    (`nearest_tissue`). Volumes are in mL; those of CSF, GM, WM and of no tissue add up to that of the mask.
    """
    data, labels_path = result.data, result_path(output, "dseg")
    warnings, voxel_ml = list(data.warnings), abs(np.linalg.det(data.affine[:3, :3])) / 1000
    volumes = {"Mask": int(data.mask.sum()) * voxel_ml}
    written = []
    if data.tissue is None:
        warnings.append(NO_LABELS)
        labels_path.unlink(missing_ok=True)  # of an earlier call
    else:
        labels = nearest_tissue(result.mean, data.tissue, data.mask, data.source.spacing_mm)
        counts = np.bincount(labels[data.mask], minlength=4)
        volumes |= {name: int(counts[label]) * voxel_ml for name, label in _NAMES.items()}
        written = [write_map(labels_path, labels, data.source.affine)]
        written += write_sidecars(inpainter, options, result, written) if data.case.derivative else []
    summary = {"Result": output.name, "VolumesML": volumes, "Dilation": data.case.dilate}
    made = provenance(inpainter, options, result) | {"Guidance": options.guidance, "BlendMM": inpainter.blend_mm}
    made |= {"Detail": inpainter.detail, "Temperature": inpainter.model.temperature}
    write_json(summary_path(output), summary | made | {"Warnings": warnings})
    return [*written, summary_path(output)]
