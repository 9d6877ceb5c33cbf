"""Charts of an evaluation: curves over time, radar, bars, differences.

Every function draws with matplotlib's object interface (no pyplot: no global state, no display), writes a PNG, which replaces an older one
in one step, and returns the figure. `charts.mplstyle` is their common style.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.projections.polar import PolarAxes
from matplotlib.style import context

from longlive.files import replacing

# Okabe and Ito (2008), distinguishable by the colour-blind; without their yellow, which cannot be seen on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=COLOURS)  # other dashes at each pass through the colours
INK, GREY, MID, PALE = "#222222", "#6B6B6B", "#8A8A8A", "#E3E3E3"
SMALL, NORMAL = 8, 9  # font sizes in points
DASHED: dict[str, Any] = {"color": MID, "linestyle": (0, (3, 3)), "linewidth": 0.9}
STYLE = Path(__file__).with_name("charts.mplstyle")
MIN_RADAR_AXES = 3
MAX_DOTS = 24  # a longer line has no dot at each point
MAX_LISTED = 16  # marks that the legend spells out
MIN_SPACING = 0.055  # of two numbers of marks, as a share of the x axis

Style = dict[str, Any]  # colour and dashes of a curve


class Line(NamedTuple):
    """A curve, and the interval `low` to `high` around it when given; NaN leaves a gap. One label has one colour in all panels."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Panel(NamedTuple):
    """Axes with lines.

    Attributes:
        y_range: lowest and highest value shown; None: what the lines need.
        marks: x of dashed vertical lines, and their texts. They are numbered, and the legend lists them, unless all texts are the same.
            Marks beyond the ends of the lines are not shown.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    marks: Mapping[float, str] = MappingProxyType({})


class Difference(NamedTuple):
    """A mean difference and its interval, in the unit of the metric."""

    name: str
    mean: float
    low: float
    high: float


def over_time(panels: Sequence[Panel], path: str | Path, *, title: str, columns: int = 2) -> Figure:
    """Draws panels, `columns` side by side, under one title and above one legend."""
    columns = min(columns, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    styles = _styles(line.label for panel in panels for line in panel.lines)
    with _figure(path, max(5.0 * columns, 6.0), 3.1 * num_rows + 0.6, title) as figure:
        numbers: dict[str, int] = {}  # of the marks that are shown, by their text
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, columns, number + 1)
            _draw_lines(axes, panel, styles)
            for text in (panel.marks[x] for x in _marks_shown(axes, panel)):
                numbers.setdefault(text, len(numbers) + 1)
        for axes, panel in zip(figure.axes, panels):
            _draw_marks(axes, panel, numbers)
        legend = _samples(styles) if len(styles) > 1 else {}
        for text, number in list(numbers.items())[:MAX_LISTED]:
            legend[f"{number}  {text}" if len(numbers) > 1 else text] = Line2D([], [], **DASHED)
        if len(numbers) > MAX_LISTED:
            legend[f"… and {len(numbers) - MAX_LISTED} more"] = Patch(visible=False)
        _legend(figure, legend)
    return figure


def _draw_lines(axes: Axes, panel: Panel, styles: Mapping[str, Style]) -> None:
    axes.grid(axis="y")
    for line in panel.lines:
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=styles[line.label]["color"], alpha=0.18, linewidth=0, zorder=2)
        # a dot at each of a few points, and at those that have no neighbour to be joined with
        known = np.pad(np.isfinite(np.asarray(line.y, dtype=float)), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]
        dots = np.flatnonzero(alone if len(line.x) > MAX_DOTS else known[1:-1])
        axes.plot(line.x, line.y, marker="o", markersize=3.5, markevery=dots.tolist(), zorder=3, **styles[line.label])
    axes.margins(x=0.015, y=0.06)
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    elif 0 <= axes.dataLim.y0 < 0.3 * axes.dataLim.y1:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(textwrap.fill(panel.y_label, 36))


def _marks_shown(axes: Axes, panel: Panel) -> list[float]:
    return [x for x in sorted(panel.marks) if axes.dataLim.x0 <= x <= axes.dataLim.x1]


def _draw_marks(axes: Axes, panel: Panel, numbers: Mapping[str, int]) -> None:
    """Dashed lines, with their numbers above the axes; a number that would touch the one before is left out."""
    before, spacing = -math.inf, MIN_SPACING * axes.dataLim.width
    for x in _marks_shown(axes, panel):
        axes.axvline(x, zorder=1, **DASHED)
        if len(numbers) > 1 and x - before >= spacing:
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(x, 1.01, str(numbers[panel.marks[x]]), fontsize=SMALL, color=GREY, **place)
            before = x
    axes.set_title(textwrap.fill(panel.title, 52), pad=16 if before > -math.inf else 6)


def radar(models: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> Figure:
    """Draws model -> axis -> percent as one closed line per model; values beyond 0..100 are drawn at the edge.

    All models have the same axes, `MIN_RADAR_AXES` or more.
    """
    names = list(next(iter(models.values())))
    size = max(4.5, 0.28 * len(names))  # of the circle, in inches
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    around = [*range(len(names)), 0]
    with _figure(path, size + 3.2, size + 1.6, title) as figure:
        axes = figure.add_subplot(projection="polar")
        assert isinstance(axes, PolarAxes)
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        axes.set_ylim(0, 100)
        axes.set_xticks(angles, [])
        axes.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"], color=GREY)
        axes.set_rlabel_position(float(np.degrees(angles[1] / 2)))  # between two axes
        axes.spines["polar"].set(color=PALE, zorder=1)
        for model, style in (styles := _styles(models)).items():
            values = np.clip([models[model][name] for name in names], 0, 100)[around]
            axes.plot(angles[around], values, marker="o", markersize=3, clip_on=False, **style)
        for name, angle in zip(names, angles):
            right, up = math.sin(angle), math.cos(angle)
            across = "center" if abs(right) < 0.1 else "left" if right > 0 else "right"
            along = "center" if abs(up) < 0.5 else "bottom" if up > 0 else "top"
            axes.text(float(angle), 107, textwrap.fill(name.replace("_", " "), 14), ha=across, va=along)
        _legend(figure, _samples(styles))
    return figure


def bars(rows: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str, own: Collection[str] = ()) -> Figure:
    """Draws model -> part -> percent as one group of bars per model; models of `own` are saturated, the others pale.

    A part that a model lacks has no bar. The label of the axis gives its start when that is not zero. Raises ValueError without values.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    values = [value for row in rows.values() for value in row.values() if math.isfinite(value)]
    if not values:
        raise ValueError("no values to draw; give at least one model with a part")
    # the differences between good models are small beside their values
    start = 10.0 * math.floor((min(values) - 5) / 10) if min(values) >= 25 else 0.0
    room = 0.08 * (max(values) - start) or 1.0

    width = 0.8 / len(parts)  # models are 1 apart
    colours = {part: to_rgb(colour) for part, colour in zip(parts, itertools.cycle(COLOURS))}
    with _figure(path, max(5.0, 1.2 + len(rows) * max(1.0, 0.44 * len(parts))), 4.0, title) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for number, part in enumerate(parts):
            for place, (model, row) in enumerate(rows.items()):
                if math.isfinite(row.get(part, math.nan)):
                    face = colours[part] if model in own else tuple(1 - 0.42 * (1 - channel) for channel in colours[part])
                    bar = axes.bar(place + (number - (len(parts) - 1) / 2) * width, row[part], 0.94 * width, color=face, zorder=2)
                    axes.bar_label(bar, fmt="{:.1f}", fontsize=SMALL, padding=1.5, fontweight=_weight(model in own))
        axes.set_ylim(start if min(values) >= 0 else min(values) - room, max(max(values) + room, start + 10))
        axes.set_xlim(-0.55, len(rows) - 0.45)
        axes.set_xticks(range(len(rows)), [textwrap.fill(name, 16) for name in rows])
        axes.tick_params(axis="x", length=0, labelsize=NORMAL)
        for model, label in zip(rows, axes.get_xticklabels()):
            label.set_fontweight(_weight(model in own))
        axes.set_ylabel(f"percent, axis starts at {start:g}" if start else "percent")
        _legend(figure, {part: Patch(color=colour) for part, colour in colours.items()} if len(parts) > 1 else {})
    return figure


def differences(rows: Sequence[Difference], path: str | Path, *, title: str, x_label: str) -> Figure:
    """Draws a forest plot, the first row on top; rows whose interval excludes zero are emphasised."""
    with _figure(path, 7.6, 1.3 + 0.32 * len(rows), title) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
        axes.set_yticks(range(len(rows)), [textwrap.fill(row.name, 36, max_lines=2, placeholder=" …") for row in rows])
        for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels())):
            sure = row.low > 0 or row.high < 0
            colour = COLOURS[0] if sure else MID
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2 if sure else 1.3, solid_capstyle="butt", zorder=2)
            axes.plot([row.mean], [place], color=colour, marker="o", markersize=6.5 if sure else 5, linestyle="none", zorder=3)
            label.set_fontweight(_weight(sure))
        axes.margins(x=0.05)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.tick_params(axis="y", length=0, labelsize=NORMAL)
        axes.set_xlabel(x_label)
    return figure


@contextmanager
def _figure(path: str | Path, width: float, height: float, title: str) -> Iterator[Figure]:
    """An empty figure of so many inches, to be drawn on in our style; it is written to `path` when the block ends."""
    with context(STYLE):
        figure = Figure((width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(textwrap.fill(title, round(9 * width)))
        yield figure
        with replacing(path) as partial:
            figure.savefig(partial, format="png")


def _styles(labels: Iterable[str]) -> dict[str, Style]:
    """Colour and dashes of the curves with each label."""
    return dict(zip(dict.fromkeys(labels), itertools.cycle(CURVES)))


def _samples(styles: Mapping[str, Style]) -> dict[str, Artist]:
    return {label: Line2D([], [], **style) for label, style in styles.items()}


def _weight(stressed: bool) -> str:
    return "bold" if stressed else "normal"


def _legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Below the axes, in as many columns as fit; the figure grows by the legend's height. Long labels have up to three lines."""
    if not handles:
        return
    room = round(11 * figure.get_figwidth())  # characters
    labels = [textwrap.fill(label, room - 8, max_lines=3, placeholder=" …") for label in handles]
    columns = max(1, room // (max(map(len, labels)) + 6))
    num_rows = math.ceil(len(labels) / columns) if columns > 1 else sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.2 * num_rows + 0.1)
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns)
