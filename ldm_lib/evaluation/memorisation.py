"""Detect samples that copy a training patient.

A patch around the middle of the mask, only its inpainted voxels, is compared with each training patient and its mirror
image at every shift within reach. A copy is far nearer to one patient than to any other, so the score is the ratio of
the nearest distance to the second nearest: a blurred result is near to every patient.

Source: the ratio of Carlini et al. 2023 (arXiv 2301.13188), section 5.1, with patients in place of pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import fftconvolve

from ldm_lib.data.case import Case, CaseData
from ldm_lib.evaluation.case_scores import names
from ldm_lib.images.volume import normalise

EDGE_MM, REACH_MM = 32.0, 12.0  # of a patch, and of the search around its place in another head
COPY = 0.5  # nearest-neighbour distance ratio below which a sample counts as a copy
LEFT_RIGHT = 0  # axis of LPS volumes


@dataclass(frozen=True)
class Patch:
    """Hold a part of an inpainted region; axes are x, y, z in LPS order."""

    about: dict[str, Any]  # columns of its row, such as {"case": key}
    values: np.ndarray  # normalised
    compared: np.ndarray  # bool, the voxels that are compared
    corner: tuple[int, ...]  # position in the whole volume, voxels
    spacing_mm: tuple[float, ...]

    @classmethod
    def of(cls, data: CaseData, volume: np.ndarray, /, **about: Any) -> "Patch":
        """Cut the patch around the middle of a case's scored voxels out of a volume (x, y, z) of the case."""
        mask, spacing = data.lps(data.scored), data.lps_spacing_mm
        half = [max(1, round(EDGE_MM / 2 / s)) for s in spacing]
        middle = np.argwhere(mask).mean(axis=0).round().astype(int)
        box = tuple(slice(max(m - h, 0), min(m + h, n)) for m, h, n in zip(middle, half, mask.shape, strict=True))
        if not mask[box].any():  # the middle of a mask need not be in it
            box = tuple(slice(0, n) for n in mask.shape)
        values = normalise(data.lps(volume)[box], data.scale)
        return cls(
            names(data) | about,
            values,
            mask[box],
            tuple(s.start for s in box),
            spacing,
        )

    def distance(self, image: np.ndarray) -> float:
        """Compute the RMS distance to the most similar place of a normalised LPS volume, or of its mirror image."""
        reach = [round(REACH_MM / s) for s in self.spacing_mm]
        return min(self._distance(side, reach) for side in (image, np.flip(image, LEFT_RIGHT)))

    def _distance(self, image: np.ndarray, reach: Sequence[int]) -> float:
        """Compute sum w (p - q)^2 = sum w p^2 - 2 (w p * q) + (w * q^2) for all shifts at once by FFT."""
        sides = list(zip(self.corner, self.compared.shape, reach, image.shape, strict=True))
        padded = np.pad(image, [(r, r + max(c + n - size, 0)) for c, n, r, size in sides])  # 0 beyond the border
        within = padded[tuple(slice(c, c + n + 2 * r) for c, n, r, _ in sides)]
        weight = self.compared.astype(np.float64)
        own = weight * self.values
        crossed = fftconvolve(within, np.flip(own), mode="valid")
        squared = fftconvolve(np.square(within), np.flip(weight), mode="valid")
        least = float((np.square(own).sum() - 2 * crossed + squared).min())
        return np.sqrt(max(least, 0.0) / weight.sum())


def memorisation_rows(patches: Sequence[Patch], training: Iterable[CaseData]) -> list[dict[str, Any]]:
    """Find the nearest training patient of each patch.

    Args:
        training: one case per patient, with its target, read once each; those of other voxel sizes are skipped.

    Returns:
        rows of `Patch.about`, "nearest" patient, its "distance" (normalised intensity), "distance ratio" of the nearest
        to the second nearest (NaN with fewer than two patients), and the number of "patients" compared.
    """
    found: list[dict[str, float]] = [{} for _ in patches]
    for data in training:
        image = data.lps(normalise(data.target, data.scale)).astype(np.float64)
        for patch, distances in zip(patches, found, strict=True):
            if np.allclose(patch.spacing_mm, data.lps_spacing_mm, rtol=0.02):
                distances[data.case.patient] = patch.distance(image)
    return [patch.about | _nearest(distances) for patch, distances in zip(patches, found, strict=True)]


def one_per_patient(cases: Sequence[Case]) -> list[Case]:
    """Return the first case of each patient that has its full image."""
    return list({case.patient: case for case in reversed(cases) if case.t1n}.values())[::-1]


def _nearest(distances: dict[str, float]) -> dict[str, Any]:
    order = sorted(distances, key=distances.get)
    first, second = (distances[name] for name in order[:2]) if len(order) > 1 else (np.nan, np.nan)
    ratio = first / second if second > 0 else np.nan
    nearest = {"nearest": order[0], "distance": distances[order[0]]} if order else {"nearest": "", "distance": np.nan}
    return nearest | {"distance ratio": ratio, "patients": len(order)}
