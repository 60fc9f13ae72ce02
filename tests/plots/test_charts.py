"""Charts show the numbers that they are given."""

import numpy as np
import pytest

from ldm_lib.plots import charts


def test_curves_leave_out_nan_rows_and_have_the_scales_asked_for():
    nan = np.nan
    table = {"epoch": [0, 1, 2, 3], "train_loss": [4, 3, 2, 1], "val_loss": [nan, 3.5, nan, 1.5], "lr": [1, 2, 3, 4]}
    figure = charts.curves(table, x="epoch", ys=[["train_loss", "val_loss"], "lr"], log=["lr"])
    losses, rate = figure.axes
    assert [line.get_label() for line in losses.lines] == ["train_loss", "val_loss"]
    assert np.array_equal(losses.lines[1].get_xydata(), [[1, 3.5], [3, 1.5]])
    assert (losses.get_yscale(), rate.get_yscale()) == ("linear", "log")


def test_histograms_are_densities_over_one_set_of_bins_in_each_channel():
    rng = np.random.default_rng(0)
    groups = {"train": rng.normal(0, 1, (2, 5000)), "sampled": rng.normal(3, 2, (2, 900))}
    figure = charts.histograms(groups, channels=["c0", "c1"], normal=True)
    for c, ax in enumerate(figure.axes):
        first, second = (patch.get_data() for patch in ax.patches)
        assert np.array_equal(first.edges, second.edges)
        expected = np.histogram(groups["sampled"][c], first.edges, density=True)[0]
        np.testing.assert_allclose(second.values, expected)
        assert np.isclose(np.sum(first.values * np.diff(first.edges)), 1)
        assert f"train: {groups['train'][c].mean():.3g}" in ax.get_legend().get_texts()[0].get_text()


def test_score_dots_show_every_case_and_the_given_mean_and_interval_of_every_method():
    table = {
        "case": ["a", "b", "a", "b"],
        "method": ["zero", "zero", "proposed", "proposed"],
        "ssim": [0.2, 0.4, 0.9, 0.7],
    }
    means = {"ssim": {"mean": {"zero": 0.31, "proposed": 0.8}, "low": {"zero": 0.25, "proposed": 0.75},
                      "high": {"zero": 0.4, "proposed": 0.85}}}  # fmt: skip
    (ax,) = charts.score_dots(table, means, scores=["ssim"]).axes
    bars = [ends[:, 0].tolist() for bar in ax.collections[1:] for ends in bar.get_segments()]
    assert bars == [[0.25, 0.4], [0.75, 0.85]], "the intervals are those given"
    dots = ax.collections[0].get_offsets()
    assert {tuple(dot) for dot in np.asarray(dots)} == {(0.2, 0), (0.4, 0), (0.9, 1), (0.7, 1)}
    joins = [line.get_xydata().tolist() for line in ax.lines if len(set(line.get_xdata())) == 2]
    assert joins == [[[0.2, 0], [0.9, 1]], [[0.4, 0], [0.7, 1]]]
    assert [text.get_text() for text in ax.texts] == ["0.31", "0.8"]
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["zero", "proposed"]


def test_a_score_that_a_method_lacks_leaves_its_row_empty():
    table = {"case": ["a", "a"], "method": ["zero", "proposed"], "psnr_01": [np.nan, 20.0]}
    nothing = {"zero": np.nan, "proposed": np.nan}
    means = {"psnr_01": {"mean": {"zero": np.nan, "proposed": 20.0}, "low": nothing, "high": nothing}}
    (ax,) = charts.score_dots(table, means, scores=["psnr_01"]).axes
    assert [text.get_text() for text in ax.texts] == ["", "20"]


def test_a_power_law_is_a_straight_line_on_logarithmic_axes():
    frequency = np.array([0.01, 0.02, 0.04, 0.08])
    table = {"cycles_per_mm": frequency, "image": frequency**-3, "error": frequency**-1}
    (ax,) = charts.curves(table, x="cycles_per_mm", ys=[["image", "error"]], log=["cycles_per_mm", "image"]).axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    for line, exponent in zip(ax.lines, (-3, -1), strict=True):
        drawn = ax.transScale.transform(line.get_xydata())
        np.testing.assert_allclose(np.diff(drawn[:, 1]) / np.diff(drawn[:, 0]), exponent)


def test_about_a_decade_or_less_is_labelled_with_plain_numbers():
    (ax,) = charts.curves(
        {"steps": [2, 20], "seconds": [0.35, 0.47]}, x="steps", ys=["seconds"], log=["steps", "seconds"]
    ).axes
    ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        labels = [label.get_text() for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]
        low, high = axis.get_view_interval()
        assert sum(low <= float(text) <= high for text in labels) >= 3


@pytest.mark.parametrize("count", [1, 7])
def test_interval_dots_show_each_value_on_its_bar_and_nothing_for_nan(count):
    values = np.linspace(10, 20, count)
    groups = {"one": [(v, v - 1, v + 2) for v in values], "mean": [(v + 1, np.nan, np.nan) for v in values]}
    groups["one"][-1] = groups["mean"][-1] = (np.nan, np.nan, np.nan)
    names = [f"run {k}" for k in range(count)]
    figure = charts.interval_dots(groups, names=names, unit="dB", notes=["done"] * (count - 1) + ["failed"])
    (ax,) = figure.axes
    bars, dots, no_bars, means = ax.collections
    finite = slice(count - 1)
    drawn = [(ends[0, 0], ends[1, 0]) for ends in bars.get_segments() if len(ends)]
    assert drawn == [(v - 1, v + 2) for v in values[finite]]
    for drawn, expected in ((dots, values), (means, values + 1)):
        shown = np.ma.filled(drawn.get_offsets(), np.nan)
        assert np.array_equal(shown[finite, 0], expected[finite]) and np.isnan(shown[-1, 0])
        assert np.array_equal(np.rint(shown[finite, 1]), np.arange(count)[finite]), "in the row of the run"
    assert not any(map(len, no_bars.get_segments()))
    assert [text.get_text() for text in ax.texts] == ["failed"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names and ax.yaxis_inverted()
    assert figure._repr_png_().startswith(b"\x89PNG")
