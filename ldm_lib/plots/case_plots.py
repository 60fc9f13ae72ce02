"""Plot volumes of one case, given in the voxel order of its file, with the outline of its mask.

Every function takes a loaded case (`data.case.load_case`) and arrays (x, y, z) on the grid of its file, turns them to
LPS order, millimetres and the radiological convention, and raises InputError for an array of another shape. `title` is
by default the key of the case. In the examples `case` is a loaded case and `np` is numpy.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ldm_lib.errors import InputError
from ldm_lib.plots import figures
from ldm_lib.plots.figures import Window
from ldm_lib.plots.slices import InlineFigure, intensity_window

if TYPE_CHECKING:
    from ldm_lib.plots.viewer import Explorer

# Volumes of these names are no images: they have their own colours in `plot`; the largest values of those with limits.
MAPS = {"growth": 1.0, "tissue": 3.0, "std": None, "standard deviation": None}
GROUND_TRUTH = "ground truth"


class LoadedCase(Protocol):
    """Describe what a plot reads from a case; `data.case.CaseData` provides it."""

    case: Any  # its `key` is the default title
    voided: np.ndarray
    target: np.ndarray | None
    mask: np.ndarray
    scale: float
    growth: np.ndarray | None
    tissue: np.ndarray | None
    lps_spacing_mm: tuple[float, ...]

    def lps(self, array: np.ndarray) -> np.ndarray:
        """Reorder an array of the case to LPS."""


def plot(
    case: LoadedCase,
    volumes: Mapping[str, np.ndarray] | None = None,
    *,
    centre_on: np.ndarray | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> InlineFigure:
    """Plot volumes of a case as rows and three planes through its mask as columns; a notebook displays the Figure.

    Args:
        volumes: by name; by default the voided image and, if there is one, the ground truth. Images share one window.
            Volumes named "std", "standard deviation", "growth" or "tissue" are no images: each has its own colours.
        centre_on: volume in whose largest voxel the planes meet; by default the centre of the mask.
        window: lowest and highest intensity; by default that of the first image.
        margin_mm: crop to the bounding box of the mask and this margin.

    Examples:
        >>> figure = plot(case, {"voided": case.voided, "growth": case.growth})
        >>> [axes.get_ylabel() for axes in figure.axes[::3]][:2]
        ['voided', 'growth']
    """
    turned = _in_lps(case, volumes)
    maps = {name: turned.pop(name) for name in list(turned) if name in MAPS}
    layout = _layout(case, centre_on, title)
    return figures.planes(turned, maps=maps, window=window, margin_mm=margin_mm, **layout)


def plot_difference(
    case: LoadedCase, prediction: np.ndarray, *, window: Window = None, margin_mm: float | None = None, title: str = ""
) -> InlineFigure:
    """Plot the ground truth of a case, a prediction, and their difference inside the mask.

    Args:
        prediction: in the image's units.
        window, margin_mm: as in `plot`.

    Raises:
        InputError: the case has no ground truth.

    Examples:
        >>> figure = plot_difference(case, case.voided)
        >>> figure.axes[6].get_ylabel()
        'error'
    """
    if case.target is None:
        raise InputError("no ground truth to compare with", where=case.case.key, fix="give a case with a t1n file")
    volumes = _in_lps(case, {"prediction": prediction, GROUND_TRUTH: case.target})
    return figures.difference(*volumes.values(), window=window, margin_mm=margin_mm, **_layout(case, None, title))


def plot_overlay(
    case: LoadedCase,
    image: np.ndarray | None = None,
    *,
    tissue: np.ndarray | None = None,
    growth: np.ndarray | None = None,
    window: Window = None,
    title: str = "",
) -> InlineFigure:
    """Plot the tissue labels of a case as colours and its tumour growth as contour lines on top of an image.

    Args:
        image: by default the ground truth, or the voided image without one.
        tissue: labels 0 none, 1 CSF, 2 GM, 3 WM; by default those of the case, if it has any.
        growth: concentration in [0, 1]; by default that of the case, if it has any.
        window: as in `plot`.

    Examples:
        >>> figure = plot_overlay(case)
        >>> [text.get_text() for text in figure.legends[0].get_texts()][:3]
        ['CSF', 'GM', 'WM']
    """
    if image is None:
        image = case.voided if case.target is None else case.target
    maps = {"tissue": case.tissue if tissue is None else tissue, "growth": case.growth if growth is None else growth}
    volumes = _in_lps(case, {"image": image} | {name: m for name, m in maps.items() if m is not None})
    return figures.overlay(volumes.pop("image"), **volumes, window=window, **_layout(case, None, title))


def plot_samples(
    case: LoadedCase,
    samples: Sequence[np.ndarray] | np.ndarray,
    *,
    plane: str = "axial",
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> InlineFigure:
    """Plot one slice of the samples of a case, their mean, the ground truth and the standard deviation.

    Args:
        plane: "axial", "coronal" or "sagittal".
        window: by default that of the ground truth, or of the first sample without one.
        margin_mm: as in `plot`.

    Examples:
        >>> figure = plot_samples(case, [case.voided, case.target])
        >>> [axes.get_title() for axes in figure.axes][:5]
        ['sample 0', 'sample 1', 'mean', 'ground truth', 'standard deviation']
    """
    volumes = {f"sample {k}": sample for k, sample in enumerate(samples)} | {"mean": np.mean(samples, axis=0)}
    volumes |= {} if case.target is None else {GROUND_TRUTH: case.target}
    window = intensity_window(samples[0] if case.target is None else case.target, window)
    std = np.std(samples, axis=0)
    return plot_series(case, volumes, std=std, plane=plane, window=window, margin_mm=margin_mm, title=title)


def plot_series(
    case: LoadedCase,
    volumes: Mapping[str, np.ndarray],
    *,
    std: np.ndarray | None = None,
    growths: Mapping[str, np.ndarray] | None = None,
    plane: str = "axial",
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> InlineFigure:
    """Plot one slice of several volumes of a case side by side, such as sampling steps, epochs or tumour ages.

    Args:
        volumes: by name; the window is by default that of the last one.
        std: a standard deviation, which becomes the last panel, in colours of its own.
        growths: name of the volume to its tumour cell concentration, drawn as contour lines; the slice then runs
            through the peak of the last one.
        plane: "axial", "coronal" or "sagittal".
        window, margin_mm: as in `plot`.

    Examples:
        >>> figure = plot_series(case, {"step 1": case.voided, "step 2": case.target}, plane="coronal")
        >>> [axes.get_title() for axes in figure.axes]
        ['step 1', 'step 2']
    """
    lines = [case.lps(growths[name]) if name in growths else None for name in volumes] if growths else None
    layout = _layout(case, list(growths.values())[-1] if growths else None, title)
    layout |= {"std": None if std is None else case.lps(std), "growths": lines, "plane": plane}
    return figures.series(_in_lps(case, volumes), window=window, margin_mm=margin_mm, **layout)


def view(
    case: LoadedCase,
    volumes: Mapping[str, np.ndarray] | None = None,
    *,
    along: str = "",
    centre_on: np.ndarray | None = None,
    window: Window = None,
    interactive: bool | None = None,
    title: str = "",
) -> "Explorer":
    """Browse volumes of a case with sliders: position, intensity window and outline of the mask.

    A notebook displays the Explorer; it has a `figure`, and a `widget` or None.

    Args:
        volumes: as in `plot`; "growth" and "tissue" are scaled to the window of the images.
        along: quantity that the volumes are ordered by, such as "age": a slider selects the volume instead of a list.
        centre_on, window: as in `plot`.
        interactive: make the sliders; by default only in a Jupyter kernel that is not headless.

    Examples:
        >>> explorer = view(case, interactive=False)
        >>> [axes.get_ylabel() for axes in explorer.figure.axes[::3]]
        ['voided', 'ground truth']
    """
    from ldm_lib.plots.viewer import explore

    turned = _in_lps(case, volumes)
    turned |= {name: turned[name] * (case.scale / MAPS[name]) for name in turned if MAPS.get(name)}
    layout = _layout(case, centre_on, title)
    return explore(turned, along=along, window=window, interactive=interactive, **layout)


def _in_lps(case: LoadedCase, volumes: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Turn volumes to LPS order; without any, the voided image and the ground truth."""
    if not hasattr(case, "lps"):
        raise InputError("is not loaded", where=getattr(case, "key", str(case)), fix="call load_case first")
    if volumes is None:
        volumes = {"voided": case.voided} | ({} if case.target is None else {GROUND_TRUTH: case.target})
    for name, volume in volumes.items():
        if np.shape(volume) != case.mask.shape:
            cause = f"{name!r} has shape {np.shape(volume)}, the case {case.mask.shape}"
            raise InputError(cause, where=case.case.key, fix="give arrays (x, y, z) on the grid of the file")
    return {name: case.lps(np.asarray(volume)) for name, volume in volumes.items()}


def _layout(case: LoadedCase, centre_on: np.ndarray | None, title: str) -> dict[str, Any]:
    """Return the arguments that all figures share."""
    centre_vox = None
    if centre_on is not None and np.any(centre_on):
        peak = case.lps(np.asarray(centre_on))
        centre_vox = np.unravel_index(np.argmax(peak), peak.shape)
    layout = {"spacing_mm": case.lps_spacing_mm, "mask": case.lps(case.mask)}
    return layout | {"centre_vox": centre_vox, "title": title or case.case.key}
