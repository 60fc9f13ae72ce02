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
from ldm_lib.plots.figures import BAR_INCHES, GROWTH_LINES, Window, draw_row, with_window
from ldm_lib.plots.slices import (
    PLANES,
    InlineFigure,
    colour_bar,
    intensity_window,
    single_plane,
    slice_geometry,
    three_planes,
)

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


class Result(Protocol):
    """Describe what the plots need of an `Inpainting`."""

    @property
    def mean(self) -> np.ndarray:
        """Mean of the samples, (x, y, z) in the file's voxel order."""

    @property
    def samples(self) -> Sequence[np.ndarray]:
        """Each sample."""


Volumes = Mapping[str, np.ndarray] | Result


def plot(
    case: LoadedCase,
    volumes: Volumes | None = None,
    *,
    centre_on: np.ndarray | None = None,
    window: Window = None,
    across: bool = False,
    title: str = "",
) -> InlineFigure:
    """Plot volumes of a case as rows and three planes through its mask as columns; a notebook displays the Figure.

    Args:
        volumes: by name, or the result of an `Inpainter`; by default the voided image and, if there is one, the ground
            truth. Images share one window.
            Volumes named "std", "standard deviation", "growth" or "tissue" are no images: each has its own colours.
        centre_on: volume in whose largest voxel the planes meet; by default the centre of the mask.
        window: lowest and highest intensity; by default that of the first image.
        across: volumes as columns and planes as rows, without ticks: for many volumes on a page.

    Examples:
        >>> figure = plot(case, {"voided": case.voided, "growth": case.growth})
        >>> [axes.get_ylabel() for axes in figure.axes[::3]][:2]
        ['voided', 'growth']
    """
    turned = _in_lps(case, volumes)
    maps = {name: turned.pop(name) for name in list(turned) if name in MAPS}
    layout = _layout(case, centre_on) | {"window": window, "across": across, "title": title or case.case.key}
    return figures.planes(turned, maps=maps, **layout)


def plot_difference(case: LoadedCase, prediction: np.ndarray, *, title: str = "") -> InlineFigure:
    """Plot the ground truth of a case, a prediction in its units, and their signed difference inside the mask.

    The colour scale of the error is symmetric, to the 99th percentile of its magnitude.

    Raises:
        InputError: the case has no ground truth, or an empty mask.

    Examples:
        >>> figure = plot_difference(case, case.voided)
        >>> figure.axes[6].get_ylabel()
        'error'
    """
    if case.target is None or not np.any(case.mask):
        cause = "has no ground truth, or an empty mask"
        raise InputError(cause, where=case.case.key, fix="give a case with a t1n file and the mask that was inpainted")
    volumes, layout = _in_lps(case, {GROUND_TRUTH: case.target, "prediction": prediction}), _layout(case)
    target, predicted = volumes.values()
    error = np.ma.masked_array(np.subtract(predicted, target, dtype=np.float64), layout["mask"] == 0)
    limit = float(np.percentile(np.abs(error.compressed()), 99)) or 1.0
    geometry = slice_geometry(volumes, **layout)
    low, high = intensity_window(target)
    rows, title = [*volumes, "error"], with_window(title or case.case.key, low, high)
    figure, axes = three_planes(geometry, rows, title=title, bar=BAR_INCHES)
    for row, volume in zip(axes, [target, predicted, target], strict=True):
        draw_row(geometry, row, volume, vmin=low, vmax=high)
    for ax, plane in zip(axes[2], PLANES, strict=True):
        image = geometry.paint(ax, error, plane, cmap="RdBu_r", vmin=-limit, vmax=limit)
    bias, mae = error.mean(), np.abs(error).mean()
    colour_bar(figure, image, axes[2], f"prediction - ground truth\nmean {bias:.3g}, absolute {mae:.3g}")
    return figure


def plot_overlay(case: LoadedCase, *, title: str = "") -> InlineFigure:
    """Plot the tissue labels of a case as colours and its tumour growth as contour lines on top of its image.

    Examples:
        >>> figure = plot_overlay(case)
        >>> [text.get_text() for text in figure.legends[0].get_texts()][:3]
        ['CSF', 'GM', 'WM']
    """
    volumes = {"image": case.voided if case.target is None else case.target}
    volumes |= {name: getattr(case, name) for name in ("tissue", "growth") if getattr(case, name) is not None}
    return figures.overlay(**_in_lps(case, volumes), title=title or case.case.key, **_layout(case))


def plot_samples(case: LoadedCase, samples: Sequence[np.ndarray] | np.ndarray, *, title: str = "") -> InlineFigure:
    """Plot one axial slice of the samples of a case, their mean, the ground truth and the standard deviation.

    Examples:
        >>> figure = plot_samples(case, [case.voided, case.target])
        >>> [axes.get_title() for axes in figure.axes][:5]
        ['sample 0', 'sample 1', 'mean', 'ground truth', 'standard deviation']
    """
    volumes = {f"sample {k}": sample for k, sample in enumerate(samples)} | {"mean": np.mean(samples, axis=0)}
    volumes |= {} if case.target is None else {GROUND_TRUTH: case.target}
    return plot_series(case, volumes, std=np.std(samples, axis=0), title=title)


def plot_series(
    case: LoadedCase,
    volumes: Mapping[str, np.ndarray],
    *,
    std: np.ndarray | None = None,
    growths: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> InlineFigure:
    """Plot one axial slice of several volumes of a case side by side, such as sampling steps, epochs or tumour ages.

    Args:
        volumes: by name; all have the intensity window of the last one.
        std: a standard deviation, which becomes the last panel, in colours of its own.
        growths: name of the volume to its tumour cell concentration, drawn as contour lines; the slice then runs
            through the peak of the last one.

    Examples:
        >>> figure = plot_series(case, {"step 1": case.voided, "step 2": case.target})
        >>> [axes.get_title() for axes in figure.axes]
        ['step 1', 'step 2']
    """
    growths, shown = growths or {}, _in_lps(case, volumes)
    geometry = slice_geometry(shown, **_layout(case, list(growths.values())[-1] if growths else None))
    low, high = intensity_window(list(shown.values())[-1])
    names, bar = ([*shown], 0.0) if std is None else ([*shown, "standard deviation"], 0.25)
    figure, axes = single_plane(geometry, names, title=with_window(title or case.case.key, low, high), bar=bar)
    for ax, (name, volume) in zip(axes, shown.items(), strict=False):
        geometry.draw(ax, volume, "axial", vmin=low, vmax=high)
        if name in growths:
            geometry.contour(ax, case.lps(growths[name]), "axial", GROWTH_LINES)
    if std is not None:
        image = geometry.draw(axes[-1], case.lps(std), "axial", cmap="magma", vmin=0)
        colour_bar(figure, image, axes[-1], "", below=True)
    return figure


def view(
    case: LoadedCase,
    volumes: Volumes | None = None,
    *,
    along: str = "",
    centre_on: np.ndarray | None = None,
    interactive: bool | None = None,
    title: str = "",
) -> "Explorer":
    """Browse volumes of a case with sliders: position, intensity window and outline of the mask.

    A notebook displays the Explorer; it has a `figure`, and a `widget` or None.

    Args:
        volumes, centre_on: as in `plot`; "growth" and "tissue" are scaled to the window of the images.
        along: quantity that the volumes are ordered by, such as "age": a slider selects the volume instead of a list.
        interactive: make the sliders; by default only in a Jupyter kernel that is not headless.

    Examples:
        >>> explorer = view(case, interactive=False)
        >>> [axes.get_ylabel() for axes in explorer.figure.axes[::3]]
        ['voided', 'ground truth']
    """
    from ldm_lib.plots.viewer import explore

    turned = _in_lps(case, volumes)
    turned |= {name: turned[name] * (case.scale / MAPS[name]) for name in turned if MAPS.get(name)}
    layout = _layout(case, centre_on)
    return explore(turned, along=along, interactive=interactive, title=title or case.case.key, **layout)


def _in_lps(case: LoadedCase, volumes: Volumes | None) -> dict[str, np.ndarray]:
    """Turn volumes to LPS order; without any, the voided image and the ground truth."""
    if not hasattr(case, "lps"):
        raise InputError("is not loaded", where=getattr(case, "key", str(case)), fix="call load_case first")
    if volumes is None:
        volumes = {"voided": case.voided} | ({} if case.target is None else {GROUND_TRUTH: case.target})
    elif hasattr(volumes, "samples"):  # an `Inpainting`
        volumes = {"voided": case.voided, "inpainted": volumes.mean}
    elif not isinstance(volumes, Mapping):
        cause = f"volumes are a {type(volumes).__name__}"
        raise InputError(cause, where=case.case.key, fix='give them by name, such as {"mean": result.mean}')
    for name, volume in volumes.items():
        if np.shape(volume) != case.mask.shape:
            cause = f"{name!r} has shape {np.shape(volume)}, the case {case.mask.shape}"
            raise InputError(cause, where=case.case.key, fix="give arrays (x, y, z) on the grid of the file")
    return {name: case.lps(np.asarray(volume)) for name, volume in volumes.items()}


def _layout(case: LoadedCase, centre_on: np.ndarray | None = None) -> dict[str, Any]:
    """Return the arguments of `slice_geometry`."""
    centre_vox = None
    if centre_on is not None and np.any(centre_on):
        peak = case.lps(np.asarray(centre_on))
        centre_vox = np.unravel_index(np.argmax(peak), peak.shape)
    return {"spacing_mm": case.lps_spacing_mm, "mask": case.lps(case.mask), "centre_vox": centre_vox}
