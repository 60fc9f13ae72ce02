"""Look around in volumes with sliders; always beside a static picture, which is all that a headless run shows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython
from IPython.display import display

from ldm_lib.locking import OWNER_VARIABLE
from ldm_lib.plots.figures import planes
from ldm_lib.plots.slices import Plate, cut, intensity_window

HEADLESS_VARIABLE = "LDM_HEADLESS"  # any value but "0": no widgets, whatever the kernel


@dataclass(frozen=True)
class Explorer:
    """A static picture and, where someone can move a slider, the widget below it.

    Attributes:
        figure: all volumes through the mask's centroid.
        widget: one volume through any voxel, or None.
    """

    figure: Plate
    widget: widgets.VBox | None

    def _ipython_display_(self) -> None:
        display(self.figure)
        if self.widget is not None:
            display(self.widget)


def explore(
    volumes: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: tuple[float, float] | None = None,
    along: str = "",
    title: str = "",
) -> Explorer:
    """Show named volumes on three planes; arguments and errors are those of `figures.planes`.

    `along` says what the volumes follow, such as "age": a slider then moves through them instead of a list.
    No widget is made in a headless run, so that no notebook keeps the state of one that nobody can move.
    """
    centre_vox = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox).centre_vox
    window = intensity_window(next(iter(volumes.values())), window)
    where = {"spacing_mm": spacing_mm, "title": title}
    figure = planes(volumes, mask=mask, centre_vox=centre_vox, window=window, **where)
    widget = _controls(volumes, mask, centre_vox, window, along, **where) if interactive() else None
    return Explorer(figure, widget)


def interactive() -> bool:
    """Whether this is a Jupyter kernel that was not started by the runner or told to be headless."""
    told = os.environ.get(HEADLESS_VARIABLE, "0") not in ("", "0")
    return hasattr(get_ipython(), "kernel") and not told and OWNER_VARIABLE not in os.environ


def _controls(
    volumes: Mapping[str, np.ndarray],
    mask: np.ndarray | None,
    centre_vox: Sequence[int],
    window: tuple[float, float],
    along: str,
    **where: object,
) -> widgets.VBox:
    """Volume, three positions in voxels, window and outline; the picture is PNG bytes, redrawn when one changes."""
    shape = next(iter(volumes.values())).shape
    volume = (
        widgets.SelectionSlider(options=list(volumes), description=along, continuous_update=False)
        if along
        else widgets.Dropdown(options=list(volumes), description="volume")
    )
    position = [
        widgets.IntSlider(c, 0, n - 1, description=axis, continuous_update=False)
        for axis, c, n in zip(("x, to left", "y, to back", "z, up"), centre_vox, shape, strict=True)
    ]
    shown = _window_slider(volumes, window)
    outline = widgets.Checkbox(mask is not None, description="mask outline", disabled=mask is None)
    image = widgets.Image(format="png")

    def redraw(_change: object = None) -> None:
        plate = planes(
            {volume.value: volumes[volume.value]},
            mask=mask if outline.value else None,
            centre_vox=[slider.value for slider in position],
            window=shown.value,
            **where,
        )
        image.value = plate._repr_png_()

    for control in (volume, *position, shown, outline):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([volume, shown, outline]), widgets.HBox(position), image])


def _window_slider(volumes: Mapping[str, np.ndarray], window: tuple[float, float]) -> widgets.FloatRangeSlider:
    lowest = min(window[0], *(float(np.min(v)) for v in volumes.values()))
    highest = max(window[1], *(float(np.max(v)) for v in volumes.values()))
    return widgets.FloatRangeSlider(
        value=window,
        min=lowest,
        max=highest,
        step=(highest - lowest) / 200,
        description="window",
        continuous_update=False,
    )
