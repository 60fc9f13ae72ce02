"""Plot curves, histograms and scores: tables in, matplotlib Figure out."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from ldm_lib.plots.slices import FONT, WIDTH, InlineFigure

GROUPS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
AXIS_LABELS = {"ssim": "SSIM (higher is better)", "psnr_01": "PSNR, dB (higher is better)"}


def curves(
    table: Mapping[str, Sequence[float]],
    *,
    x: str,
    ys: Sequence[str | Sequence[str]],
    log: Collection[str] = (),
    title: str = "",
) -> InlineFigure:
    """Plot curves over a common axis: one panel per item of `ys`; names grouped in a list share a panel.

    Args:
        table: column name to numbers, such as a pandas DataFrame; rows that are NaN are left out.
        x: column of the horizontal axis.
        ys: columns to plot, such as `[["train_loss", "val_noise_loss"], "learning_rate"]`.
        log: columns whose panel has a logarithmic axis; with `x` among them the horizontal axis is logarithmic.
    """
    panels = [[y] if isinstance(y, str) else list(y) for y in ys]
    figure = InlineFigure(figsize=(WIDTH, 1.9 * len(panels) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, names in zip(axes, panels, strict=True):
        for name, colour in zip(names, GROUPS, strict=False):
            along, values = np.asarray(table[x], float), np.asarray(table[name], float)
            finite = np.isfinite(along) & np.isfinite(values)
            marker = "o" if finite.sum() < 40 else ""
            style = {"color": colour, "lw": 1.4, "marker": marker, "ms": 3}
            ax.plot(along[finite], values[finite], label=name, **style)
        if set(names) & set(log):
            ax.set_yscale("log")
            _label(ax.yaxis)
        if x in log:
            ax.set_xscale("log")
            _label(ax.xaxis)
        ax.legend(fontsize=FONT, frameon=False)
        _plain(ax)
    axes[-1].set_xlabel(x, fontsize=FONT + 0.5)
    figure.suptitle(title, fontsize=FONT + 2.5)
    return figure


def _label(axis: Axis) -> None:
    """Label a logarithmic axis of about a decade or less with plain numbers, such as 0.4 instead of 4 times a power."""
    low, high = axis.get_view_interval()
    if high < 20 * low:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())


def histograms(
    groups: Mapping[str, np.ndarray],
    *,
    channels: Sequence[str] = ("",),
    unit: str = "intensity",
    normal: bool = False,
    bins: int = 80,
    title: str = "",
) -> InlineFigure:
    """Plot the densities of several groups of values, one panel per channel.

    Args:
        groups: name to values (c, n), or (n,) for one channel.
        channels: names of the channels.
        unit: name of the values' axis.
        normal: add the standard normal density, the sampler's starting point.
        bins: number of bins between the 0.1st and 99.9th percentiles of all groups.
    """
    columns = min(len(channels), 3)
    rows = -(-len(channels) // columns)
    figure = InlineFigure(figsize=(WIDTH, 2.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    values = {name: np.reshape(v, (len(channels), -1)) for name, v in groups.items()}
    for c, (ax, channel) in enumerate(zip(axes, channels, strict=False)):
        edges = _densities(ax, {name: v[c] for name, v in values.items()}, bins)
        if normal:
            bell = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
            ax.plot(edges, bell, color="0.45", lw=1, ls="--", label="standard normal")
        ax.set_title(channel, fontsize=FONT + 1)
        ax.set_ylim(0, ax.get_ylim()[1] * (1.15 + 0.15 * len(values)))
        ax.legend(fontsize=8, frameon=False, loc="upper right")
        _plain(ax)
    for ax in axes[len(channels) :]:
        ax.set_axis_off()
    figure.supxlabel(unit, fontsize=FONT + 0.5)
    figure.suptitle(title, fontsize=FONT + 2.5)
    return figure


def _densities(ax: Axes, values: Mapping[str, np.ndarray], bins: int) -> np.ndarray:
    """Draw the density of each group over common bins and return their edges."""
    low, high = np.percentile(np.concatenate(list(values.values())), [0.1, 99.9])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for (name, v), colour in zip(values.items(), GROUPS, strict=False):
        density = np.histogram(v, edges, density=True)[0]
        ax.stairs(density, edges, color=colour, lw=1.4, label=f"{name}: {v.mean():.3g} ± {v.std():.3g}")
    return edges


def score_dots(
    table: Mapping[str, Sequence[object]],
    means: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    scores: Sequence[str],
    title: str = "",
) -> InlineFigure:
    """Plot scores by method: a dot per case, a line that joins the methods of a case, the mean with its interval.

    Args:
        table: columns `case`, `method` and the scores, one row per pair, such as a DataFrame.
        means: score -> "mean", "low", "high" -> method -> value, such as `evaluation.summary.summarise` returns.
        scores: columns to plot, one panel each.
    """
    case, method = np.asarray(table["case"], str), np.asarray(table["method"], str)
    methods = list(dict.fromkeys(method))
    figure = InlineFigure(figsize=(WIDTH, 0.42 * len(methods) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for ax, score in zip(axes, scores, strict=True):
        values = np.asarray(table[score], float)
        height = np.array([methods.index(name) for name in method])
        for name in dict.fromkeys(case):
            rows = np.flatnonzero(case == name)[np.argsort(height[case == name])]
            ax.plot(values[rows], height[rows], color="0.85", lw=0.8, zorder=1)
        ax.scatter(values, height, s=16, color=GROUPS[0], alpha=0.6, lw=0, zorder=2)
        for k, name in enumerate(methods):
            mean, low, high = (means[score][part][name] for part in ("mean", "low", "high"))
            ax.plot([mean, mean], [k - 0.28, k + 0.28], color=GROUPS[1], lw=2.5, zorder=3)
            ax.hlines(k, low, high, color=GROUPS[1], lw=1.5, zorder=3)
            text = "" if np.isnan(mean) else f"{mean:.3g}"
            ax.text(1.01, k, text, transform=ax.get_yaxis_transform(), fontsize=FONT, va="center")
        ax.set_xlabel(AXIS_LABELS.get(score, score), fontsize=FONT + 0.5)
        _plain(ax)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(
        f"{title}   dots: {len(set(case))} cases, bar: mean over patients, 95 % interval".strip(), fontsize=FONT + 2.5
    )
    return figure


def interval_dots(
    groups: Mapping[str, Sequence[Sequence[float]]],
    *,
    names: Sequence[str],
    unit: str,
    notes: Sequence[str] = (),
    title: str = "",
) -> InlineFigure:
    """Plot values with their intervals: one row per name, a dot per group on a bar from the low to the high end.

    Args:
        groups: name of a group, which has a colour of its own -> (value, low, high) of each row; NaN is not drawn.
        names: of the rows, from the top down.
        notes: texts of rows that have no value.
    """
    figure = InlineFigure(figsize=(WIDTH, max(0.34 * len(names), 0.6) + 1.5), layout="constrained")
    ax, rows, step = figure.subplots(), np.arange(len(names)), 0.3 if len(groups) > 1 else 0.0
    values = {group: np.asarray(found, float).reshape(-1, 3) for group, found in groups.items()}
    for k, (group, colour) in enumerate(zip(groups, GROUPS, strict=False)):
        value, low, high = values[group].T
        height = rows + step * (k - (len(groups) - 1) / 2)
        ax.hlines(height, low, high, color=colour, lw=2.2, alpha=0.45, zorder=2)
        ax.scatter(value, height, s=26, color=colour, lw=0, zorder=3, label=group)
    has_value = np.isfinite(np.stack(list(values.values()))[..., 0]).any(axis=0)
    for row in rows[~has_value] if notes else ():
        ax.text(0.01, row, notes[row], transform=ax.get_yaxis_transform(), color="0.5", fontsize=FONT, va="center")
    ax.set_yticks(rows, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(unit, fontsize=FONT + 0.5)
    _plain(ax)
    ax.legend(fontsize=FONT, frameon=False, ncols=len(groups), loc="lower left", bbox_to_anchor=(-0.01, 1.0))
    figure.suptitle(title, fontsize=FONT + 2.5)
    return figure


def _plain(ax: Axes) -> None:
    """Draw a light grid and no box."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=FONT, which="both")
