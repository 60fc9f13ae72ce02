"""Figures: one window for all rows, inputs unchanged, numbers as computed by hand."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from ldm_lib.anatomy.tumour_growth import GROWTH_THRESHOLD
from ldm_lib.errors import InputError
from ldm_lib.plots import case_plots, figures
from ldm_lib.plots.slices import slice_geometry

RNG = np.random.default_rng(0)
SHAPE, SPACING = (12, 14, 10), (1.0, 1.0, 2.0)
TARGET = RNG.random(SHAPE) * 800
MASK = np.zeros(SHAPE, bool)
MASK[4:8, 5:9, 3:7] = True
OTHER = np.where(MASK, TARGET + RNG.normal(size=SHAPE) * 30, TARGET)
TISSUE = RNG.integers(0, 4, SHAPE)
GROWTH = np.clip(1.2 - np.linalg.norm(np.indices(SHAPE).T - [6, 7, 5], axis=-1).T / 4, 0, 1)


def a_case(target, mask=MASK):
    """A loaded case whose file is in LPS order."""
    layout = {"lps": np.asarray, "lps_spacing_mm": SPACING, "case": SimpleNamespace(key="a case")}
    return SimpleNamespace(target=target, voided=OTHER, mask=mask, growth=None, tissue=None, scale=800.0, **layout)


CASE = a_case(TARGET)
EVERY = {
    "planes": lambda: figures.planes({"voided": OTHER, "target": TARGET}, spacing_mm=SPACING, mask=MASK),
    "across": lambda: figures.planes({"a": OTHER}, maps={"b": TARGET}, spacing_mm=SPACING, mask=MASK, across=True),
    "overlay": lambda: figures.overlay(TARGET, spacing_mm=SPACING, tissue=TISSUE, growth=GROWTH),
    "difference": lambda: case_plots.plot_difference(CASE, OTHER),
    "series": lambda: case_plots.plot_series(CASE, {"t = 1": OTHER, "t = 0": TARGET}, std=OTHER),
}


def shown(ax, k=0):
    return np.ma.filled(ax.get_images()[k].get_array().astype(float), np.nan)


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_displays_itself_in_legible_letters_and_changes_no_input(name):
    inputs = (TARGET, OTHER, MASK, TISSUE, GROWTH)
    before = [array.copy() for array in inputs]
    figure = EVERY[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert all(np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    texts = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text())
    assert min(text.get_fontsize() for text in texts) >= 8


def test_all_images_share_one_window_and_the_title_states_it():
    figure = figures.planes({"dark": TARGET / 5, "bright": TARGET}, spacing_mm=SPACING, title="case 7")
    high = np.percentile(TARGET / 5, 99.5)
    assert {ax.get_images()[0].get_clim() for ax in figure.axes} == {(0.0, high)}
    assert figure.get_suptitle() == f"case 7   window 0 to {high:.4g}"


def test_across_has_the_same_panels_with_volumes_as_columns():
    volumes, maps = {"voided": OTHER, "target": TARGET}, {"std": np.abs(OTHER - TARGET)}
    layout = {"maps": maps, "spacing_mm": SPACING, "mask": MASK}
    down, across = (figures.planes(volumes, across=turned, **layout).axes for turned in (False, True))
    for volume in range(3):
        for plane in range(3):
            first, second = down[3 * volume + plane], across[3 * plane + volume]
            np.testing.assert_array_equal(shown(first), shown(second))
            assert first.get_images()[0].get_clim() == second.get_images()[0].get_clim()
            assert (first.get_xlim(), first.get_ylim()) == (second.get_xlim(), second.get_ylim())
    assert [ax.get_title() for ax in across[:3]] == ["voided", "target", "std"]
    assert [ax.get_ylabel().split("\n")[0] for ax in across[:9:3]] == ["axial", "coronal", "sagittal"]


def test_growth_lines_are_the_three_thresholds_and_have_a_legend():
    figure = figures.overlay(TARGET, spacing_mm=SPACING, growth=GROWTH)
    lines = next(c for c in figure.axes[0].collections if hasattr(c, "levels"))
    assert list(lines.levels) == [GROWTH_THRESHOLD, 0.25, 0.675]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["growth 0.2", "growth 0.25", "growth 0.675"]
    widths = [np.ptp(path.vertices[:, 0]) for path in lines.get_paths()]
    assert all(outer > inner for outer, inner in pairwise(widths))


@pytest.mark.parametrize(("axis", "panel", "coordinate"), [(0, 0, 0), (1, 0, 1), (2, 1, 1), (1, 2, 0), (2, 2, 1)])
def test_growth_lines_run_through_voxel_centres_in_millimetres(axis, panel, coordinate):
    ramp = np.indices(SHAPE)[axis] / 40  # 0.2 at the centre of voxel 8
    figure = figures.overlay(TARGET, spacing_mm=SPACING, growth=ramp, centre_vox=(5, 6, 4))
    lines = next(c for c in figure.axes[panel].collections if hasattr(c, "levels"))
    np.testing.assert_allclose(lines.get_paths()[0].vertices[:, coordinate], 8.5 * SPACING[axis], atol=1e-9)


def test_each_tissue_has_a_colour_and_the_background_is_transparent():
    figure = figures.overlay(TARGET, spacing_mm=SPACING, tissue=TISSUE, centre_vox=(5, 6, 4))
    image, labels = figure.axes[0].get_images()[1], TISSUE[:, :, 4].T
    rgba = image.to_rgba(image.get_array())
    assert set(rgba[labels == 0][:, 3]) == {0.0}
    assert len({tuple(np.unique(rgba[labels == k], axis=0)[0]) for k in (1, 2, 3)}) == 3
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["CSF", "GM", "WM"]


def test_maps_are_rows_with_a_colour_scale_of_their_own():
    figure = figures.planes({"mean": TARGET}, maps={"growth": GROWTH}, spacing_mm=SPACING, centre_vox=(5, 6, 4))
    assert [ax.get_ylabel() for ax in figure.axes[:6:3]] == ["mean", "growth"]
    assert figure.axes[3].get_images()[0].get_clim() == (0, GROWTH.max())
    np.testing.assert_array_equal(shown(figure.axes[3]), GROWTH[:, :, 4].T)


def test_growth_lines_are_drawn_on_the_panel_of_their_series():
    (young, old), volumes = (np.zeros(SHAPE), GROWTH), {"young": OTHER, "old": TARGET, "no": OTHER}
    figure = case_plots.plot_series(CASE, volumes, growths={"young": young, "old": old})
    lines = [[c for c in ax.collections if hasattr(c, "levels")] for ax in figure.axes]
    assert [len(found) for found in lines] == [0, 1, 0]
    np.testing.assert_array_equal(lines[1][0].levels, list(figures.GROWTH_LINES))


def test_the_difference_is_signed_symmetric_and_only_inside_the_mask():
    figure = case_plots.plot_difference(CASE, OTHER)
    z = slice_geometry({"mask": MASK}, SPACING, mask=MASK).centre_vox[2]
    axial = np.where(MASK, OTHER - TARGET, np.nan)[:, :, z].T
    np.testing.assert_allclose(shown(figure.axes[6], 1), axial, rtol=0, atol=1e-12)
    low, high = figure.axes[6].get_images()[1].get_clim()
    assert low == -high == -np.percentile(np.abs(OTHER - TARGET)[MASK], 99)


def test_unsigned_inputs_do_not_wrap_in_the_difference():
    figure = case_plots.plot_difference(a_case(np.full(SHAPE, 5, np.uint16)), np.full(SHAPE, 3, np.uint16))
    assert np.nanmax(shown(figure.axes[6], 1)) == np.nanmin(shown(figure.axes[6], 1)) == -2


def test_an_empty_mask_has_no_error():
    with pytest.raises(InputError, match="an empty mask"):
        case_plots.plot_difference(a_case(TARGET, mask=np.zeros(SHAPE)), OTHER)
