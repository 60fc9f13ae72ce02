"""Draw slices of volumes: panels with millimetre axes, orientation letters and the outline of the mask.

Volumes are (x, y, z) in LPS order: x to the patient's left, y to the back, z up. Slices follow the radiological
convention: anterior or superior is up, the patient's left is on the right. Axes are millimetres from the first corner
of the volume.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from scipy import ndimage

from ldm_lib.errors import InputError

PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # axes across, down and through
ENDS = ("RL", "AP", "IS")  # directions at the low and at the high end of x, y, z
FONT = 8.5
MARGIN_MM = 6.0  # around the voxels that are not 0
WIDTH = 9.6  # inches: the text width of a notebook at 100 dpi
OUTLINE, CROSS, LETTER = "#00E5FF", "#9AA0A6", "#FFD54F"


class InlineFigure(Figure):
    """Display a matplotlib Figure in any notebook without pyplot, a backend or figures that stay open."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


@dataclass(frozen=True)
class SliceGeometry:
    """Describe where volumes of one shape are sliced, and which part of them is shown; axes are x, y, z."""

    shape: tuple[int, ...]
    spacing_mm: np.ndarray
    centre_vox: tuple[int, ...]  # voxel in which the three planes meet
    box_mm: np.ndarray  # (3, 2), lowest and highest position shown
    mask: np.ndarray | None  # voxels to outline

    def extent_mm(self, plane: str) -> tuple[float, float, float, float]:
        """Return left, right, bottom and top of the whole slice, the `extent` of `imshow`."""
        across, down = (np.asarray(self.shape) * self.spacing_mm)[list(PLANES[plane][:2])]
        return (0.0, across, down, 0.0) if plane == "axial" else (0.0, across, 0.0, down)

    @property
    def panel_sides_mm(self) -> np.ndarray:
        """Return the width and height that are shown of each plane, (3, 2)."""
        return np.array([[np.ptp(self.box_mm[axis]) for axis in axes[:2]] for axes in PLANES.values()])

    def position(self, plane: str) -> str:
        """Describe the position of the plane, such as "axial, z = 77.5 mm"."""
        through = PLANES[plane][2]
        at_mm = (self.centre_vox[through] + 0.5) * self.spacing_mm[through]
        return f"{plane}, {'xyz'[through]} = {at_mm:.4g} mm"

    def picture(self, volume: np.ndarray, plane: str) -> np.ndarray:
        """Return the slice as rows from top to bottom."""
        through = PLANES[plane][2]
        rows = np.take(volume, self.centre_vox[through], axis=through).T
        return rows if plane == "axial" else rows[::-1]

    def outline_mm(self, plane: str) -> np.ndarray:
        """Return the voxel edges between mask and background: (n, 2 ends, 2 coordinates: across, down)."""
        padded = np.pad(self.picture(self.mask, plane) != 0, 1)
        upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
        level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
        edges = [upright[:, None] + [[0, 0], [1, 0]], level[:, None] + [[0, 0], [0, 1]]]
        left, right, bottom, top = self.extent_mm(plane)
        rows, columns = np.subtract(padded.shape, 2)
        pixel_mm = np.array([(right - left) / columns, (bottom - top) / rows])
        return np.concatenate(edges)[..., ::-1] * pixel_mm + [left, top]

    def draw(self, ax: Axes, volume: np.ndarray, plane: str, **style: object) -> AxesImage:
        """Draw a panel: the slice, the outline of the mask, the positions of the other planes, orientation letters."""
        style = {"cmap": "gray", "interpolation": "auto"} | style
        image = self.paint(ax, volume, plane, **style)
        if self.mask is not None:
            ax.add_collection(LineCollection(self.outline_mm(plane), colors=OUTLINE, lw=1.1))
        across, down, _ = PLANES[plane]
        box, cross_mm = self.box_mm[down], (np.asarray(self.centre_vox) + 0.5) * self.spacing_mm
        ax.set(xlim=self.box_mm[across], ylim=box[::-1] if plane == "axial" else box)
        for low, high in ((0, 0.03), (0.97, 1)):
            ax.axvline(cross_mm[across], low, high, color=CROSS, lw=0.9)
            ax.axhline(cross_mm[down], low, high, color=CROSS, lw=0.9)
        _mark_directions(ax, ENDS[across], ENDS[down] if plane != "axial" else ENDS[down][::-1])
        ax.set_facecolor("black")
        ax.tick_params(labelsize=FONT, length=2, pad=1.5)
        ax.locator_params(nbins=5)
        return image

    def paint(self, ax: Axes, volume: np.ndarray, plane: str, **style: object) -> AxesImage:
        """Draw the slice alone, on top of a panel."""
        style = {"interpolation": "nearest"} | style
        return ax.imshow(self.picture(volume, plane), extent=self.extent_mm(plane), **style)

    def contour(self, ax: Axes, volume: np.ndarray, plane: str, lines: Mapping[float, str]) -> None:
        """Draw contour lines of the volume: level -> colour."""
        rows = self.picture(volume, plane)
        if np.ptp(rows) > 0:
            style = {"levels": list(lines), "colors": list(lines.values()), "linewidths": 1.3}
            ax.contour(rows, origin="upper", extent=self.extent_mm(plane), **style)


def _mark_directions(ax: Axes, left_right: str, bottom_top: str) -> None:
    black = [withStroke(linewidth=2, foreground="black")]
    style = {"color": LETTER, "fontsize": FONT, "fontweight": "bold", "path_effects": black, "transform": ax.transAxes}
    ax.text(0.04, 0.5, left_right[0], ha="left", va="center", **style)
    ax.text(0.96, 0.5, left_right[1], ha="right", va="center", **style)
    ax.text(0.5, 0.04, bottom_top[0], ha="center", va="bottom", **style)
    ax.text(0.5, 0.96, bottom_top[1], ha="center", va="top", **style)


def slice_geometry(
    volumes: Mapping[str, np.ndarray],
    spacing_mm: Sequence[float],
    *,
    mask: np.ndarray | None = None,
    centre_vox: Sequence[int] | None = None,
) -> SliceGeometry:
    """Choose the planes through the largest part of the mask, and show the box of all voxels that are not 0.

    Raises:
        InputError: the volumes are not three-dimensional or differ in shape, or the centre is outside the volume.
    """
    arrays = dict(volumes) if mask is None else {**volumes, "mask": mask}
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    shape = next(iter(shapes.values()), ())
    if len(shape) != 3 or set(shapes.values()) != {shape}:
        raise InputError(f"volumes must be x y z of one shape, got {shapes}", fix="resample or crop them to one grid")
    if centre_vox is None:
        has_mask = mask is not None and np.any(mask)
        centre_vox = mask_centre(mask) if has_mask else np.asarray(shape) // 2
    centre_vox = tuple(int(c) for c in centre_vox)
    if any(not 0 <= c < n for c, n in zip(centre_vox, shape, strict=True)):
        raise InputError(f"centre_vox {centre_vox} lies outside shape {shape}", fix="give a voxel inside the volume")
    spacing = np.asarray(spacing_mm, float)
    corners = np.argwhere(np.logical_or.reduce([np.asarray(array) != 0 for array in arrays.values()]))
    if not len(corners):
        corners = np.array([[0, 0, 0], shape])
    low, high = corners.min(0) * spacing - MARGIN_MM, (corners.max(0) + 1) * spacing + MARGIN_MM
    box_mm = np.stack([np.maximum(low, 0), np.minimum(high, shape * spacing)], axis=1)
    return SliceGeometry(shape, spacing, centre_vox, box_mm, mask)


def mask_centre(mask: np.ndarray) -> np.ndarray:
    """Return the voxel (3,) of the largest connected part of the mask that is nearest to the centroid of that part.

    A mask often has two parts, and the centroid of both lies between them.
    """
    parts, _ = ndimage.label(np.asarray(mask) != 0)
    voxels = np.argwhere(parts == np.bincount(parts.ravel())[1:].argmax() + 1)
    return voxels[np.square(voxels - voxels.mean(0)).sum(1).argmin()]


def three_planes(
    geometry: SliceGeometry, rows: Sequence[str], *, title: str = "", bar: float = 0.0
) -> tuple[InlineFigure, np.ndarray]:
    """Create empty axes, one row per name and one column per plane, all panels at one scale.

    Of its width, `bar` inches at the right are for a colour bar.
    """
    sides = geometry.panel_sides_mm
    height = sides[:, 1].max() * (WIDTH - 1.4 - bar) / sides[:, 0].sum() + 0.1
    figure = InlineFigure(figsize=(WIDTH, height * len(rows) + 0.9))
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.08, hspace=0.01, wspace=0.0))
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=sides[:, 0])
    for ax, plane in zip(axes[0], PLANES, strict=True):
        ax.set_title(geometry.position(plane), fontsize=FONT + 1)
    for line, name in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=FONT + 1.5, fontweight="bold")
    for ax in axes[:-1].flat:
        ax.tick_params(labelbottom=False)
    for ax in axes[-1]:
        ax.set_xlabel("mm", fontsize=FONT)
    figure.suptitle(title, fontsize=FONT + 2.5)
    return figure, axes


def volumes_across(
    geometry: SliceGeometry, names: Sequence[str], *, title: str = ""
) -> tuple[InlineFigure, np.ndarray]:
    """Create empty axes without ticks, one row per plane and one column per name, all panels at one scale."""
    sides = geometry.panel_sides_mm
    height = sides[:, 1].sum() * (WIDTH - 0.3) / (len(names) * sides[:, 0].max())
    figure = InlineFigure(figsize=(WIDTH, height + 0.9))
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.02, hspace=0.0, wspace=0.0))
    axes = figure.subplots(3, len(names), squeeze=False, height_ratios=sides[:, 1])
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=FONT)
    for ax, plane in zip(axes[:, 0], PLANES, strict=True):
        ax.set_ylabel(geometry.position(plane).replace(", ", "\n"), fontsize=FONT)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=FONT + 1)
    return figure, axes


def single_plane(
    geometry: SliceGeometry, names: Sequence[str], *, title: str = "", bar: float = 0.0
) -> tuple[InlineFigure, list[Axes]]:
    """Create empty axes for an axial slice of several volumes, five a row, with `bar` inches for a colour bar below."""
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    ratio = np.ptp(geometry.box_mm[1]) / np.ptp(geometry.box_mm[0])
    height = rows * ((WIDTH - 0.7) / columns * ratio + 0.25) + 0.75 + bar
    figure = InlineFigure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for k, (ax, name) in enumerate(zip(axes, names, strict=False)):
        ax.set_title(name, fontsize=FONT + 0.5)
        ax.set_anchor("N")
        lowest = k + columns >= len(names)
        ax.tick_params(labelleft=k % columns == 0, labelbottom=lowest)
        ax.set_xlabel("mm" if lowest else "", fontsize=FONT)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.suptitle(f"{title}   {geometry.position('axial')}".strip(), fontsize=FONT + 2.5)
    return figure, list(axes[: len(names)])


def intensity_window(volume: np.ndarray) -> tuple[float, float]:
    """Return 0 and the 99.5th percentile of the positive voxels."""
    bright = np.asarray(volume)[np.asarray(volume) > 0]
    return 0.0, float(np.percentile(bright, 99.5)) if bright.size else 1.0


def colour_bar(figure: Figure, image: AxesImage, axes: np.ndarray | Axes, label: str, *, below: bool = False) -> None:
    """Draw a colour bar at the right of its axes, or below them."""
    side = {"location": "bottom", "pad": 0.1} if below else {"location": "right", "pad": 0.02}
    bar = figure.colorbar(image, ax=axes, aspect=20, fraction=0.06, panchor=False, **side)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
