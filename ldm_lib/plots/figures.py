"""Draw volumes as figures: arrays (x, y, z) in LPS order in, matplotlib Figure out.

`case_plots` does the same for arrays in the voxel order of a case's file. Slices and panels are drawn by `slices`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ldm_lib.plots.slices import (
    FONT,
    PLANES,
    InlineFigure,
    SliceGeometry,
    colour_bar,
    intensity_window,
    slice_geometry,
    three_planes,
    volumes_across,
)

TISSUE_COLOURS = {"CSF": "#0072B2", "GM": "#D55E00", "WM": "#F0E442"}  # Okabe and Ito: colour-blind safe
# The threshold of growth, and where a tumour is visible in FLAIR and in T1c (Lipkova et al. 2019, IEEE TMI 38:1875).
GROWTH_LINES = {0.2: "#F0E442", 0.25: "#E69F00", 0.675: "#D55E00"}
BAR_INCHES = 1.1  # width of a colour bar with its label
Window = tuple[float, float] | None


def planes(
    volumes: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    maps: Mapping[str, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    across: bool = False,
    title: str = "",
) -> InlineFigure:
    """Plot named volumes as rows and three planes as columns, with one intensity window for all.

    Args:
        volumes: name to (x, y, z) in LPS order, all of one shape.
        spacing_mm: voxel size along x, y, z.
        maps: volumes of other units than the images, such as standard deviations: further rows, each with its own
            colour scale and a colour bar.
        mask: voxels to outline along their edges.
        centre_vox: voxel in which the planes meet; by default the centre of the mask's largest part, else the middle.
        window: lowest and highest intensity; by default 0 to the 99.5th percentile of the positive voxels of the
            first volume. The title states it.
        across: volumes as columns and planes as rows, without ticks: for many volumes on a page.
        title: usually the case id.

    Raises:
        InputError: the shapes differ, or the centre is outside the volume.
    """
    maps = maps or {}
    geometry = slice_geometry({**volumes, **maps}, spacing_mm, mask=mask, centre_vox=centre_vox)
    if volumes:
        low, high = window or intensity_window(next(iter(volumes.values())))
        title = with_window(title, low, high)
    names = [*volumes, *maps]
    if across:
        figure, axes = volumes_across(geometry, names, title=title)
        axes = axes.T
    else:
        figure, axes = three_planes(geometry, names, title=title, bar=BAR_INCHES if maps else 0.0)
    for row, volume in zip(axes, volumes.values(), strict=False):
        draw_row(geometry, row, volume, vmin=low, vmax=high)
    for row, volume in zip(axes[len(volumes) :], maps.values(), strict=True):
        image = draw_row(geometry, row, volume, vmin=0, vmax=float(np.max(volume)) or 1.0, cmap="viridis")
        colour_bar(figure, image, row[-1] if across else row, "", below=across)
    return figure


def save_planes(path: Path, **planes_kwargs: Any) -> None:
    """Write the figure that `planes` draws to a file."""
    planes(**planes_kwargs).savefig(path)


def draw_row(geometry: SliceGeometry, row: Sequence[Axes], volume: np.ndarray, **style: Any) -> AxesImage:
    """Draw a volume on its three planes, and return one of the images for a colour bar."""
    return [geometry.draw(ax, volume, plane, **style) for ax, plane in zip(row, PLANES, strict=True)][-1]


def overlay(
    image: np.ndarray,
    *,
    tissue: np.ndarray | None = None,
    growth: np.ndarray | None = None,
    title: str = "",
    **placement: Any,
) -> InlineFigure:
    """Plot an image on three planes, with tissue labels as colours and tumour growth as contour lines.

    Args:
        tissue: labels 0 none, 1 CSF, 2 GM, 3 WM.
        growth: tumour cell concentration in [0, 1]; lines at 0.2, 0.25 (visible in FLAIR) and 0.675 (in T1c).
        placement: `spacing_mm`, `mask` and `centre_vox` of `planes`; without a mask the planes meet where growth is
            largest.
    """
    given = {"image": image, "tissue": tissue, "growth": growth}
    volumes = {name: volume for name, volume in given.items() if volume is not None}
    if placement.get("centre_vox") is None and placement.get("mask") is None and growth is not None and np.any(growth):
        placement["centre_vox"] = np.unravel_index(np.argmax(growth), growth.shape)
    geometry = slice_geometry(volumes, **placement)
    low, high = intensity_window(image)
    figure, axes = three_planes(geometry, [""], title=with_window(title, low, high))
    draw_row(geometry, axes[0], image, vmin=low, vmax=high)
    colours = {"cmap": ListedColormap(list(TISSUE_COLOURS.values())), "vmin": 1, "vmax": 3, "alpha": 0.5}
    for ax, plane in zip(axes[0], PLANES, strict=True):
        if tissue is not None:
            geometry.paint(ax, np.ma.masked_equal(tissue, 0), plane, **colours)
        if growth is not None:
            geometry.contour(ax, growth, plane, GROWTH_LINES)
    keys = [Patch(color=c, label=n) for n, c in TISSUE_COLOURS.items() if tissue is not None]
    lines = GROWTH_LINES.items() if growth is not None else ()
    keys += [Line2D([], [], color=c, label=f"growth {level:g}") for level, c in lines]
    figure.legend(handles=keys, frameon=False, loc="outside lower center", ncols=max(len(keys), 1), fontsize=FONT)
    return figure


def with_window(title: str, low: float, high: float) -> str:
    """Return the title with the intensity window."""
    return f"{title}   window {low:.4g} to {high:.4g}".strip()
