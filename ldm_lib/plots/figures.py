"""What a researcher wants to see: arrays in, matplotlib Figure out, one function per picture.

Volumes are `x y z` in LPS order, spacing is in millimetres, and all panels are drawn by `slices`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ldm_lib.errors import InputError
from ldm_lib.plots.slices import FONT, PLANES, Plate, colour_bar, cut, intensity_window, strip, three_planes

TISSUES = {"CSF": "#0072B2", "GM": "#D55E00", "WM": "#F0E442"}  # Okabe and Ito: colour-blind safe
GROWTH_LINES = {0.2: "#F0E442", 0.25: "#E69F00", 0.675: "#D55E00"}  # cut-off, seen in FLAIR, seen in T1c
CHANNELS = ("growth", "CSF", "GM", "WM")
Window = tuple[float, float] | None


def planes(
    volumes: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> Plate:
    """Named volumes as rows, three planes as columns, one intensity window for all.

    Args:
        volumes: name to `x y z` array in LPS order, all of one shape.
        spacing_mm: size of a voxel along x, y, z.
        mask: outlined along its voxels' edges.
        centre_vox: where the planes meet; by default the mask's centroid, else the middle.
        window: lowest and highest intensity shown; by default 0 to the 99.5th percentile of
            the first volume's voxels above 0. The picture states it.
        margin_mm: show only the mask's box and so many millimetres around it.
        title: usually the case id.

    Raises:
        InputError: shapes are not alike, or the centre lies outside.
    """
    view = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox, margin_mm=margin_mm)
    low, high = intensity_window(next(iter(volumes.values())), window)
    figure, axes = three_planes(view, list(volumes), title=_stated(title, low, high))
    for line, volume in zip(axes, volumes.values(), strict=True):
        for ax, plane in zip(line, PLANES, strict=True):
            view.draw(ax, volume, plane, vmin=low, vmax=high)
    return figure


def overlay(
    image: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    tissue: np.ndarray | None = None,
    growth: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    title: str = "",
) -> Plate:
    """Anatomy on three planes, with tissue as colours and growth as contour lines.

    `tissue` holds CSF 1, GM 2, WM 3 and 0 elsewhere; `growth` a concentration in [0, 1]. The other
    arguments and errors are those of `planes`; without a mask the planes meet where growth peaks.
    """
    given = {"image": image, "tissue": tissue, "growth": growth}
    volumes = {name: volume for name, volume in given.items() if volume is not None}
    if centre_vox is None and mask is None and growth is not None and np.any(growth):
        centre_vox = np.unravel_index(np.argmax(growth), growth.shape)
    view = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox)
    low, high = intensity_window(image, window)
    figure, axes = three_planes(view, [""], title=_stated(title, low, high))
    paint = {"cmap": ListedColormap(list(TISSUES.values())), "vmin": 1, "vmax": 3, "alpha": 0.5}
    for ax, plane in zip(axes[0], PLANES, strict=True):
        view.draw(ax, image, plane, vmin=low, vmax=high)
        if tissue is not None:
            view.paint(ax, np.ma.masked_equal(tissue, 0), plane, **paint)
        if growth is not None:
            view.contour(ax, growth, plane, GROWTH_LINES)
    keys = [Patch(color=c, label=n) for n, c in TISSUES.items() if tissue is not None]
    keys += [
        Line2D([], [], color=c, label=f"growth {level:g}") for level, c in GROWTH_LINES.items() if growth is not None
    ]
    legend = {"loc": "outside lower center", "ncols": len(keys), "fontsize": FONT}
    figure.legend(handles=keys, frameon=False, **legend)
    return figure


def conditioning_channels(
    conditioning: np.ndarray,
    mask_latent: np.ndarray | None = None,
    *,
    spacing_mm: Sequence[float],
    names: Sequence[str] = CHANNELS,
    centre_vox: Sequence[int] | None = None,
    title: str = "",
) -> Plate:
    """What the network sees besides the latent: each channel, cell by cell.

    Args:
        conditioning: `c x y z` at latent resolution.
        mask_latent: `x y z` cells to generate, outlined.
        spacing_mm: size of a cell.
        names: one for each channel.
        centre_vox: the cell where the planes meet; by default the mask's centroid.
        title: usually the case id.
    """
    channels = dict(zip(names, conditioning, strict=True))
    view = cut(channels, spacing_mm, mask=mask_latent, centre_vox=centre_vox)
    figure, axes = three_planes(view, list(channels), title=title, width=7.4, bar=0.9)
    for line, (name, channel) in zip(axes, channels.items(), strict=True):
        high = max(1.0, float(np.max(channel)))
        for ax, plane in zip(line, PLANES, strict=True):
            image = view.draw(ax, channel, plane, vmin=0, vmax=high, cmap="viridis")
        colour_bar(figure, image, line, "concentration" if name == "growth" else "share of cell")
    return figure


def difference(
    prediction: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> Plate:
    """Target, prediction, and prediction minus target inside the hole, in the images' units.

    The error's scale is symmetric, to the 99th percentile of its size. Arguments as in `planes`.
    """
    hole = np.asarray(mask) != 0
    if not hole.any():
        raise InputError("the mask is empty, so there is no error to show", fix="give the hole")
    volumes = {"target": target, "prediction": prediction}
    view = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox, margin_mm=margin_mm)
    error = np.subtract(prediction, target, dtype=np.float64)
    reach = float(np.percentile(np.abs(error[hole]), 99)) or 1.0
    low, high = intensity_window(target, window)
    figure, axes = three_planes(view, [*volumes, "error"], title=_stated(title, low, high), bar=1.1)
    for line, volume in zip(axes, [target, prediction, target], strict=True):
        for ax, plane in zip(line, PLANES, strict=True):
            view.draw(ax, volume, plane, vmin=low, vmax=high)
    inside = np.ma.masked_array(error, ~hole)
    for ax, plane in zip(axes[2], PLANES, strict=True):
        image = view.paint(ax, inside, plane, cmap="RdBu_r", vmin=-reach, vmax=reach)
    bias, mae = error[hole].mean(), np.abs(error[hole]).mean()
    colour_bar(figure, image, axes[2], f"prediction - target\nmean {bias:.3g}, absolute {mae:.3g}")
    return figure


def trajectory(
    frames: Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    spacing_mm: Sequence[float],
    plane: str = "axial",
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    growths: Sequence[np.ndarray] | None = None,
    title: str = "",
) -> Plate:
    """One slice of one case, frame by frame, through sampling or time; the window is the last frame's.

    Args:
        growths: a concentration for each frame, drawn as contour lines at 0.2, 0.25 (seen in FLAIR) and 0.675 (in T1c).
    """
    volumes = dict(enumerate(frames))
    view = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox, margin_mm=margin_mm)
    low, high = intensity_window(frames[-1], window)
    figure, axes = strip(view, plane, labels, title=_stated(title, low, high))
    for ax, frame, growth in zip(axes, frames, growths or [None] * len(frames), strict=True):
        view.draw(ax, frame, plane, vmin=low, vmax=high)
        if growth is not None:
            view.contour(ax, growth, plane, GROWTH_LINES)
    return figure


def samples_grid(
    samples: Sequence[np.ndarray],
    target: np.ndarray | None = None,
    *,
    spacing_mm: Sequence[float],
    plane: str = "axial",
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> Plate:
    """K samples of one case, their mean and population standard deviation, and the target."""
    volumes = {f"sample {k}": sample for k, sample in enumerate(samples)}
    volumes["mean"] = np.mean(samples, axis=0)
    if target is not None:
        volumes["target"] = target
    window = intensity_window(target if target is not None else samples[0], window)
    where = {"spacing_mm": spacing_mm, "mask": mask, "centre_vox": centre_vox, "margin_mm": margin_mm}
    return with_spread(volumes, np.std(samples, axis=0), plane=plane, window=window, title=title, **where)


def with_spread(
    volumes: Mapping[str, np.ndarray],
    spread: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    plane: str = "axial",
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
    window: Window = None,
    margin_mm: float | None = None,
    title: str = "",
) -> Plate:
    """One slice of named volumes in one window, by default the last one's, and of their standard deviation."""
    view = cut(volumes, spacing_mm, mask=mask, centre_vox=centre_vox, margin_mm=margin_mm)
    low, high = intensity_window(list(volumes.values())[-1], window)
    names = [*volumes, "standard deviation"]
    figure, axes = strip(view, plane, names, title=_stated(title, low, high), bar=0.25)
    for ax, volume in zip(axes, volumes.values(), strict=False):
        view.draw(ax, volume, plane, vmin=low, vmax=high)
    image = view.draw(axes[-1], spread, plane, cmap="magma", vmin=0)
    colour_bar(figure, image, axes[-1], "", below=True)
    return figure


def _stated(title: str, low: float, high: float) -> str:
    return f"{title}   window {low:.4g} to {high:.4g}".strip()
