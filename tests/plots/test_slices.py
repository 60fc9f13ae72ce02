"""Slices: orientation, millimetres, the outline of the mask and the errors."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ldm_lib.errors import InputError
from ldm_lib.plots.slices import PLANES, intensity_window, slice_geometry, three_planes

SHAPE, SPACING = (6, 8, 5), (2.0, 1.0, 3.0)
LEFT, POSTERIOR, SUPERIOR = 5, 7, 4  # the high ends of x, y, z in LPS


def rendered(volume, plane, **options):
    """The pixels of a panel as drawn, without letters and ticks, sampled 40 by 40 from top to bottom."""
    geometry = slice_geometry({"v": np.ones(SHAPE)}, SPACING, **options)
    figure, axes = three_planes(geometry, [""])
    ax = axes[0][list(PLANES).index(plane)]
    geometry.draw(ax, volume, plane, vmin=0, vmax=1)
    for artist in (*ax.texts, *ax.lines):
        artist.remove()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, box = np.asarray(canvas.buffer_rgba())[..., 0], ax.get_window_extent()
    rows = np.linspace(pixels.shape[0] - box.y1 + 2, pixels.shape[0] - box.y0 - 3, 40).astype(int)
    return pixels[np.ix_(rows, np.linspace(box.x0 + 2, box.x1 - 3, 40).astype(int))]


@pytest.mark.parametrize(
    ("marker", "plane", "across", "down"),
    [
        ((LEFT, 0, 2), "axial", "right", "top"),  # left and anterior
        ((0, POSTERIOR, 2), "axial", "left", "bottom"),
        ((LEFT, 4, SUPERIOR), "coronal", "right", "top"),
        ((0, 4, 0), "coronal", "left", "bottom"),
        ((3, 0, SUPERIOR), "sagittal", "left", "top"),  # anterior is on the left
        ((3, POSTERIOR, 0), "sagittal", "right", "bottom"),
    ],
)
def test_a_marker_lies_where_a_radiologist_expects_it(marker, plane, across, down):
    volume = np.zeros(SHAPE)
    volume[marker] = 1
    lit = np.argwhere(rendered(volume, plane, centre_vox=(3, 4, 2)) > 128)
    row, column = lit.mean(0)
    assert (row < 10) == (down == "top") and (row > 29) == (down == "bottom")
    assert (column < 10) == (across == "left") and (column > 29) == (across == "right")


def test_orientation_letters_name_the_ends_of_the_axes():
    _, axes = three_planes(geometry := slice_geometry({"v": np.ones(SHAPE)}, SPACING), [""])
    found = {}
    for ax, plane in zip(axes[0], PLANES, strict=True):
        geometry.draw(ax, np.ones(SHAPE), plane)
        places = {text.get_text(): text.get_position() for text in ax.texts}
        by_x, by_y = (sorted(places, key=lambda k, i=i: places[k][i]) for i in (0, 1))
        found[plane] = (by_x[0], by_x[-1], by_y[-1], by_y[0])  # left, right, top, bottom
    assert found == {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}


@pytest.mark.parametrize("plane", PLANES)
def test_extents_are_shape_times_spacing_and_positions_voxel_centres(plane):
    geometry = slice_geometry({"v": np.ones(SHAPE)}, SPACING, centre_vox=(1, 2, 3))
    across, down, through = PLANES[plane]
    left, right, bottom, top = geometry.extent_mm(plane)
    assert (right - left, abs(top - bottom)) == (SHAPE[across] * SPACING[across], SHAPE[down] * SPACING[down])
    assert geometry.position(plane).endswith(f"= {((1, 2, 3)[through] + 0.5) * SPACING[through]:.4g} mm")


@pytest.mark.parametrize("plane", PLANES)
def test_the_outline_surrounds_exactly_the_mask(plane):
    mask = np.random.default_rng(0).random(SHAPE) > 0.6
    geometry = slice_geometry({"v": np.ones(SHAPE)}, SPACING, mask=mask, centre_vox=(3, 4, 2))
    edges = geometry.outline_mm(plane)
    across, down, through = PLANES[plane]
    found = np.zeros((SHAPE[across], SHAPE[down]), bool)
    for i, j in np.ndindex(found.shape):  # even-odd rule: a ray from the voxel's centre to the far left
        x, y = (i + 0.5) * SPACING[across], (j + 0.5) * SPACING[down]
        upright = edges[:, 0, 0] == edges[:, 1, 0]
        crosses = (edges[:, :, 1].min(1) < y) & (y < edges[:, :, 1].max(1)) & (edges[:, 0, 0] < x)
        found[i, j] = np.sum(upright & crosses) % 2
    assert np.array_equal(found, np.take(mask, (3, 4, 2)[through], axis=through))


def test_the_planes_meet_at_the_centroid_of_the_mask():
    mask = np.zeros(SHAPE, bool)
    mask[1:4, 5:8, 2] = True
    assert slice_geometry({"v": np.ones(SHAPE)}, SPACING, mask=mask).centre_vox == (2, 6, 2)
    assert slice_geometry({"v": np.ones(SHAPE)}, SPACING).centre_vox == (3, 4, 2)


def test_of_two_masked_regions_the_planes_cut_the_larger():
    """The centroid of both would lie between them, in neither."""
    mask = np.zeros(SHAPE, bool)
    mask[0, 0, 0] = mask[4:6, 5:8, 1:3] = True
    assert mask[slice_geometry({"v": np.ones(SHAPE)}, SPACING, mask=mask).centre_vox]
    assert slice_geometry({"v": np.ones(SHAPE)}, SPACING, mask=mask).centre_vox[1] == 6


def test_a_margin_surrounds_what_is_not_zero():
    volume = np.zeros((12, 12, 12))
    volume[5:7, 6, 0] = 1
    box = slice_geometry({"v": volume}, SPACING).box_mm
    assert np.array_equal(box, [[4, 20], [0, 12], [0, 9]])


def test_the_window_ends_at_the_995th_percentile_of_the_positive_voxels():
    volume = np.concatenate([np.full(500, -9.0), np.zeros(5000), np.arange(1.0, 1002)])
    assert intensity_window(volume) == (0.0, 996.0)


def test_errors_name_shapes_and_positions():
    with pytest.raises(InputError, match=r"one shape, got .*'b': \(6, 8, 4\)"):
        slice_geometry({"a": np.ones(SHAPE), "b": np.ones((6, 8, 4))}, SPACING)
    with pytest.raises(InputError, match=r"\(6, 8, 0\) lies outside shape \(6, 8, 5\)"):
        slice_geometry({"a": np.ones(SHAPE)}, SPACING, centre_vox=(6, 8, 0))
