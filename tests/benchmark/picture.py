"""The drawings: the same numbers give the same bytes of SVG, 900 pixels wide, on white."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

WIDTH = 9.375  # inches: 675 points, 900 pixels
COLUMNS = 3  # of the drawing of growth
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart with any kind of colour vision
MARKERS = "os^"
GREY = "#b8bec4"
_STYLE = {
    "font.size": 8.5,
    "svg.hashsalt": "benchmark",  # else the names inside the file are drawn by chance
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": [
        "DejaVu Sans"
    ],  # comes with matplotlib; a reader without it has a narrower one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Bar:
    """One peer on one proxy."""

    label: str
    speeds: list[float]  # lowest, median, highest of the repeats; target tokens a second
    ratio: float | None  # to the Trainer as it comes
    ours: bool
    other_update: str = ""


@dataclass(frozen=True)
class Panel:
    """One proxy."""

    title: str
    bars: list[Bar]
    limit: (
        float  # the speed at which every operation would run at the rate of a large matrix product
    )


@dataclass(frozen=True)
class Curve:
    """One line of a small plot: its points, ascending in x, and the lowest and highest of the
    repeats at each."""

    name: str
    xs: list[float]
    ys: list[float]
    lows: list[float]
    highs: list[float]


@dataclass(frozen=True)
class Plot:
    """One small plot; those of one `row` stand side by side under its title."""

    row: str
    title: str
    axis: str
    curves: list[Curve]


def draw_speed(panels: list[Panel], heading: str, path: Path) -> None:
    """Horizontal bars, a panel a proxy."""
    heights = [len(panel.bars) for panel in panels]
    with _drawing(sum(heights) * 0.42 + len(panels) * 0.75 + 0.3, path) as figure:
        grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
        for place, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(grid[place, 0]), panel)
        figure.supxlabel(textwrap.fill(heading, 140), fontsize=8, color="#555555")


def _draw_panel(axes: Axes, panel: Panel) -> None:
    places = range(len(panel.bars))
    for place, bar in zip(places, panel.bars):
        low, median, high = bar.speeds
        fill = {"color": COLOURS[0] if bar.ours else GREY}
        if bar.other_update:
            fill = {"facecolor": "white", "edgecolor": "#80868b", "hatch": "////"}
        axes.barh(place, median, height=0.62, **fill)
        axes.errorbar(
            median,
            place,
            xerr=[[median - low], [high - median]],
            color="black",
            capsize=2.5,
            linewidth=0.9,
        )
        ratio = "" if bar.ratio is None else f"  {bar.ratio:.2f} x"
        words = axes.text(
            high,
            place,
            f"  {number(median)}{ratio}",
            va="center",
            fontweight="bold" if bar.ours else None,
        )
        words.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    axes.axvline(panel.limit, color="black", linestyle="--", linewidth=1)
    axes.text(
        panel.limit,
        -0.72,
        " 100 % of the rate of a matrix product",
        ha="right",
        va="bottom",
        fontsize=7.5,
    )
    axes.set_yticks(places, [f"{bar.label}\n{bar.other_update}".strip() for bar in panel.bars])
    axes.set_ylim(len(panel.bars) - 0.5, -0.6)
    axes.set_xlim(0, max([panel.limit, *(bar.speeds[2] for bar in panel.bars)]) * 1.12)
    axes.set_title(
        panel.title, loc="right", fontsize=9, fontweight="bold", pad=14
    )  # longer than the axes
    axes.set_xlabel(
        "real target tokens a second; x: times the Trainer as it comes; hatched: trains another"
        " update"
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def draw_growth(plots: list[Plot], heading: str, path: Path) -> None:
    """Small plots, COLUMNS beside each other; those with one `row` begin a line of their own."""
    rows = list(dict.fromkeys(plot.row for plot in plots))
    with _drawing(2.35 * len(rows) + 0.3, path) as figure:
        for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows):
            part.suptitle(row, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
            for axes, plot in zip(
                part.subplots(1, COLUMNS, squeeze=False)[0],
                [plot for plot in plots if plot.row == row],
            ):
                if plot.curves:
                    _draw_plot(axes, plot)
            for axes in part.axes:
                axes.set_visible(axes.has_data())
        figure.supxlabel(textwrap.fill(heading, 140), fontsize=8, color="#555555")


def _draw_plot(axes: Axes, plot: Plot) -> None:
    ys = [y for curve in plot.curves for y in curve.ys]
    steep = min(ys) > 0 and max(ys) > 4 * min(ys)
    axes.set_xscale("log")
    axes.set_yscale("log" if steep else "linear")
    for curve, colour, marker in zip(plot.curves, COLOURS, MARKERS):
        spread = [
            [y - low for y, low in zip(curve.ys, curve.lows)],
            [high - y for y, high in zip(curve.ys, curve.highs)],
        ]
        axes.errorbar(
            curve.xs, curve.ys, yerr=spread, label=curve.name, color=colour, marker=marker, markersize=3.5,
            linewidth=1.2, capsize=2,
        )  # fmt: skip
    axes.set_ylim(*((min(ys) / 1.6, max(ys) * 1.6) if steep else (min(0, *ys), max(ys) * 1.25)))
    if steep:  # how a cost that is in proportion would grow, from the first curve's last point back
        xs, last = plot.curves[0].xs, plot.curves[0].ys[-1]
        axes.plot(
            xs,
            [last * x / xs[-1] for x in xs],
            color=GREY,
            linestyle=":",
            label="in proportion",
            zorder=0,
        )
    axes.set_title(plot.title, loc="left", fontsize=8.5)
    axes.set_xlabel(plot.axis)
    axes.set_xticks(plot.curves[0].xs, [f"{x:,}" for x in plot.curves[0].xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    if steep:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e8eaed", linewidth=0.6)
    axes.legend(fontsize=6.5, frameon=False)


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@contextmanager
def _drawing(height: float, path: Path) -> Iterator[Figure]:
    """A figure that is written when it is left."""
    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's own settings
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
        yield figure
        figure.savefig(
            path, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
        )
