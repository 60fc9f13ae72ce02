"""Read a scan together with its mask, and count its intensities from the dark end of the brain if they are z-scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.images.masks import read_mask
from ldm_lib.images.options import ReadOptions
from ldm_lib.images.volume import Volume, read_image

MOST_NEGATIVE = 0.1  # fraction of a brain; interpolation leaves up to 0.01
DARKEST_PERCENT = 0.1  # percentile of the brain from which its intensities count if it is partly negative


def read_masked_scan(
    scan: Path, mask: Path, read_options: ReadOptions, warnings: list[str]
) -> tuple[Volume, np.ndarray]:
    """Read a scan and its mask, bool (x, y, z); what is odd but usable is appended to `warnings`.

    Raises:
        InputError: a file is rejected, or they have different grids.
    """
    source = read_image(scan, read_options)
    warnings += source.warnings
    voxels = read_mask(mask, source, read_options, warnings=warnings)
    return from_darkest(source, voxels, warnings), voxels


def from_darkest(volume: Volume, mask: np.ndarray, warnings: list[str]) -> Volume:
    """Shift the intensities of a brain that is partly negative while air is 0, as z-scoring in the brain leaves it.

    They count from the darkest voxels outside the mask (x, y, z), and air stays 0. Only the intercept changes.
    """
    seen = volume.voxels[(volume.voxels != 0) & ~mask]
    if volume.background or np.count_nonzero(seen < 0) <= MOST_NEGATIVE * seen.size:
        return volume
    darkest, air = float(np.percentile(seen, DARKEST_PERCENT)), volume.raw[volume.voxels == 0]
    warnings.append(f"air is 0, the brain begins at {darkest:g}: shifted for the model, and back in results")
    stored = air[0] if air.size else None
    return replace(volume, intercept=volume.intercept - darkest, background=darkest, air=stored)


def void_under(source: Volume, mask: np.ndarray, *, hidden: bool, scored: bool, warnings: list[str]) -> np.ndarray:
    """Return the image (x, y, z) with 0 under the mask.

    Args:
        hidden: the file is said to be void there already; if it is not, that is a warning,
        scored: or an InputError, because the region can be scored.
    """
    under = source.voxels[mask]
    void = (0, source.intercept, source.voxels.min()) if under.any() else (0,)
    if hidden and (shown := int(np.count_nonzero(~np.isin(under, void)))):
        cause = f"{shown} of {under.size} voxels under the mask were not void"
        if scored:
            raise InputError(f"{cause}: it shows the ground truth", where=source.path, fix="void it under its own mask")
        warnings.append(f"{cause}; voided here")
    voided = source.voxels.copy()
    voided[mask] = 0
    return voided
