"""Browse volumes with sliders in a notebook; a static figure stands above them, and alone in a headless run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython
from IPython.display import display

from ldm_lib.locking import OWNER_VARIABLE
from ldm_lib.plots.figures import planes
from ldm_lib.plots.slices import InlineFigure, intensity_window, slice_geometry

HEADLESS_VARIABLE = "LDM_HEADLESS"  # any value but "0": no widgets, in any kernel


@dataclass(frozen=True)
class Explorer:
    """Hold a static figure and, in an interactive session, the widget below it."""

    figure: InlineFigure  # all volumes through the centre of the mask
    widget: widgets.VBox | None  # one volume through any voxel

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
    along: str = "",
    interactive: bool | None = None,
    title: str = "",
) -> Explorer:
    """Show named volumes on three planes, as `figures.planes` does, with sliders for position and window.

    By default the widget is made only in a Jupyter kernel, and neither in a headless run nor with LDM_HEADLESS set:
    a notebook would store a widget without its kernel. `along` is described in `case_plots.view`.
    """
    centre_vox = slice_geometry(volumes, spacing_mm, mask=mask, centre_vox=centre_vox).centre_vox
    window = intensity_window(next(iter(volumes.values())))
    draw = partial(planes, spacing_mm=spacing_mm, title=title)
    figure = draw(volumes, mask=mask, centre_vox=centre_vox, window=window)
    if not (is_interactive() if interactive is None else interactive):
        return Explorer(figure, None)
    return Explorer(figure, _controls(volumes, mask, centre_vox, window, along, draw))


def is_interactive() -> bool:
    """Return whether this is a Jupyter kernel with a front end: not started by the runner, LDM_HEADLESS not set."""
    headless = os.environ.get(HEADLESS_VARIABLE, "0") not in ("", "0")
    return hasattr(get_ipython(), "kernel") and not headless and OWNER_VARIABLE not in os.environ


def _controls(
    volumes: Mapping[str, np.ndarray],
    mask: np.ndarray | None,
    centre_vox: Sequence[int],
    window: tuple[float, float],
    along: str,
    draw: partial,
) -> widgets.VBox:
    """Build the sliders and the PNG image that is redrawn when one of them changes."""
    shape = next(iter(volumes.values())).shape
    choice = partial(widgets.SelectionSlider, continuous_update=False) if along else widgets.Dropdown
    volume = choice(options=list(volumes), description=along or "volume")
    position = [
        widgets.IntSlider(c, 0, n - 1, description=axis, continuous_update=False)
        for axis, c, n in zip(("x, to left", "y, to back", "z, up"), centre_vox, shape, strict=True)
    ]
    lowest = min(window[0], *(float(np.min(v)) for v in volumes.values()))
    highest = max(window[1], *(float(np.max(v)) for v in volumes.values()))
    limits = {"min": lowest, "max": highest, "step": (highest - lowest) / 200}
    limits["readout_format"] = ".2f" if highest - lowest < 10 else ".0f"  # longer numbers would be cut off
    shown = widgets.FloatRangeSlider(value=window, description="window", continuous_update=False, **limits)
    outline = widgets.Checkbox(mask is not None, description="mask outline", disabled=mask is None)
    image = widgets.Image(format="png")

    def redraw(_change: object = None) -> None:
        outlined, centre_vox = mask if outline.value else None, [slider.value for slider in position]
        chosen = {volume.value: volumes[volume.value]}
        image.value = draw(chosen, mask=outlined, centre_vox=centre_vox, window=shown.value)._repr_png_()

    for control in (volume, *position, shown, outline):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([volume, shown, outline]), widgets.HBox(position), image])
