"""Pictures of an evaluation: curves over time, radar, bars, differences. Knows nothing of how the numbers were made.

Drawn by matplotlib without pyplot, so nothing is global and no display is needed. Texts are shown as they are: a `$` in a
prompt begins no formula. A picture replaces an older one at its path in one step.
"""

from __future__ import annotations

import bisect
import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.projections.polar import PolarAxes
from matplotlib.text import Text
from matplotlib.typing import LineStyleType

# Okabe and Ito (2008), told apart by the colour-blind too; their yellow is left out, it cannot be seen on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.")  # the next one begins where the colours begin anew
INK, GREY, PALE = "#222222", "#6B6B6B", "#E3E3E3"
FEWEST_AXES = 3  # of a radar
DPI = 150
SMALL, NORMAL, LARGE = 8.0, 9.0, 12.0  # sizes of letters, in points
GAP = 0.03  # inches between a mark and its words
MOST_DOTS = 24  # longer lines are drawn without a dot at each point


class Line(NamedTuple):
    """A curve, and the interval `low` to `high` around it when given; NaN leaves a gap. One label is one colour in all panels."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Panel(NamedTuple):
    """Axes with lines.

    Attributes:
        y_range: lowest and highest value shown; None: what the lines need, and room for the words of the marks.
        marks: x of dashed vertical lines, and what they say; those beyond the lines' ends are not shown.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    marks: Mapping[float, str] = MappingProxyType({})


class Difference(NamedTuple):
    """A mean difference and its interval, in the unit of what is compared."""

    name: str
    mean: float
    low: float
    high: float


def over_time(panels: Sequence[Panel], path: str | Path, *, title: str, columns: int = 2) -> None:
    """Draws panels, `columns` side by side, under one title and over one legend, as PNG.

    Raises:
        ValueError: when there is nothing to draw, a line's sequences differ in length, or a range has no length.
    """
    _write(_over_time(panels, title=title, columns=columns), path)


def radar(models: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> None:
    """Draws model -> axis -> percent as one closed line a model, as PNG; what is beyond 0..100 is drawn at the edge.

    Raises:
        ValueError: when there is no model, a model lacks an axis that another has, or there are fewer than three.
    """
    _write(_radar(models, title=title), path)


def bars(rows: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str, own: Collection[str] = ()) -> None:
    """Draws model -> part -> percent as a group of bars a model, as PNG; models of `own` are saturated, the others pale.

    A part that a model lacks has no bar. The label of the axis says where it starts when that is not zero.

    Raises:
        ValueError: when there is nothing to draw, or `own` names a model that is not there.
    """
    _write(_bars(rows, title=title, own=own), path)


def differences(rows: Sequence[Difference], path: str | Path, *, title: str, x_label: str) -> None:
    """Draws a forest plot, the first row on top, as PNG; rows whose interval excludes zero are stressed.

    Raises:
        ValueError: when there is no row, or one whose `low`, `mean` and `high` are not in this order.
    """
    _write(_differences(rows, title=title, x_label=x_label), path)


def _write(figure: Figure, path: str | Path) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches; its canvas is needed to measure text."""
    figure = Figure(
        (width, height), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)
    )
    FigureCanvasAgg(figure)
    figure.suptitle(_title(title, width), fontsize=LARGE, fontweight="bold", color=INK)
    return figure


def _title(title: str, width: float) -> str:
    """On as many lines as it needs in a figure of so many inches."""
    return textwrap.fill(title, round(9 * width))


def _finished(figure: Figure) -> Figure:
    """The figure with its artists where they will be; to be called before anything else measures or draws it."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.draw_without_rendering()
    return figure


def _plain(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Two spines, small ticks and pale lines across the `grid` axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    axes.grid(axis=grid, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _width(figure: Figure, text: str, size: float) -> float:
    """Of a line of text, in pixels."""
    assert isinstance(figure.canvas, FigureCanvasAgg)
    return figure.canvas.get_renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0]


def _shortened(figure: Figure, text: str, size: float, room: float) -> str:
    """The text on one line of at most `room` pixels, with an ellipsis where it was cut; nothing when not even a letter fits."""
    text = " ".join(text.split())
    if _width(figure, text, size) <= room:
        return text
    first = [text[: length + 1].rstrip() + "…" for length in range(len(text))]
    fitting = bisect.bisect_right(first, room, key=lambda words: _width(figure, words, size))
    return first[fitting - 1] if fitting else ""


def _styles(labels: Sequence[str]) -> dict[str, tuple[str, LineStyleType]]:
    """Colour and dashes of each label."""
    return {
        label: (COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)])
        for number, label in enumerate(dict.fromkeys(labels))
    }


def _legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Below the axes, in as many columns as fit, each as long as the others."""
    sample, page = 0.6 * DPI, 0.95 * figure.bbox.width  # what stands beside a label, and all there is, in pixels
    labels = [_shortened(figure, label, NORMAL, page - sample) for label in handles]
    fitting = max(1, int(page // (sample + max(_width(figure, label, NORMAL) for label in labels))))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / fitting))
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(list(handles.values()), labels, **place, frameon=False, fontsize=NORMAL, labelcolor=INK)


def _samples(styles: Mapping[str, tuple[str, LineStyleType]]) -> dict[str, Artist]:
    return {label: Line2D([], [], color=colour, linestyle=dash, linewidth=1.7) for label, (colour, dash) in styles.items()}


def _over_time(panels: Sequence[Panel], *, title: str, columns: int) -> Figure:
    if not panels:
        raise ValueError("no panels to draw; give at least one")
    if columns < 1:
        raise ValueError(f"{columns} columns: panels stand in at least one")
    for panel in panels:
        _check(panel)
    columns = min(columns, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    figure = _figure(max(5.0 * columns, 6.0), 3.1 * num_rows + 0.8, title)
    styles = _styles([line.label for panel in panels for line in panel.lines])
    for number, panel in enumerate(panels):
        _draw(figure.add_subplot(num_rows, columns, number + 1), panel, styles)
    if len(styles) > 1:
        _legend(figure, _samples(styles))
    _finished(figure)

    # words can only be placed where the size of the axes is known; their room changes the ticks, and these the size
    counts = [_num_lines(axes, panel) for axes, panel in zip(figure.axes, panels)]
    for axes, panel, count in zip(figure.axes, panels, counts):
        if panel.y_range is None and count:
            low, high = axes.get_ylim()
            share = (count * _line_height() + 0.04 * DPI) / axes.bbox.height
            axes.set_ylim(low, low + (high - low) / (1 - share))
    figure.draw_without_rendering()
    for axes, panel, count in zip(figure.axes, panels, counts):
        _write_marks(axes, panel, count)
    return figure


def _check(panel: Panel) -> None:
    if not panel.lines:
        raise ValueError(f"panel {panel.title!r} has no lines; give at least one")
    if panel.y_range is not None and not panel.y_range[0] < panel.y_range[1]:
        raise ValueError(f"panel {panel.title!r}: an axis from {panel.y_range[0]} to {panel.y_range[1]} has no length")
    for line in panel.lines:
        if not len(line.x) or not np.isfinite(np.asarray(line.x, dtype=float)).all():
            raise ValueError(f"line {line.label!r} of panel {panel.title!r}: x has no values, or some that are not finite")
        if (line.low is None) != (line.high is None):
            raise ValueError(f"line {line.label!r} of panel {panel.title!r}: an interval needs both low and high")
        for name, values in (("y", line.y), ("low", line.low), ("high", line.high)):
            if values is not None and len(values) != len(line.x):
                raise ValueError(f"line {line.label!r} of panel {panel.title!r}: {len(values)} values in {name}, {len(line.x)} in x")


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, tuple[str, LineStyleType]]) -> None:
    _plain(axes, grid="y")
    for line in panel.lines:
        colour, dash = styles[line.label]
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        # a dot at each of a few points, and at those that have no neighbour to be joined with
        known = np.pad(np.isfinite(np.asarray(line.y, dtype=float)), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]
        dots = np.flatnonzero(alone if len(line.x) > MOST_DOTS else known[1:-1])
        axes.plot(
            line.x, line.y, color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=3.5, markevery=dots.tolist(), zorder=3
        )
    first, last = _ends(panel)
    room = 0.015 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    axes.set_ylim(*(panel.y_range or _y_range(panel)))
    axes.set_title(textwrap.fill(panel.title, 52), fontsize=NORMAL + 1, color=INK)
    axes.set_xlabel(panel.x_label, fontsize=NORMAL, color=INK)
    axes.set_ylabel(textwrap.fill(panel.y_label, 36), fontsize=NORMAL, color=INK)


def _ends(panel: Panel) -> tuple[float, float]:
    xs = np.concatenate([np.asarray(line.x, dtype=float) for line in panel.lines])
    return float(xs.min()), float(xs.max())


def _y_range(panel: Panel) -> tuple[float, float]:
    drawn = [values for line in panel.lines for values in (line.y, line.low, line.high) if values is not None]
    values = np.concatenate([np.asarray(one, dtype=float) for one in drawn])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or max(1e-3, 0.1 * abs(high))
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def _shown(panel: Panel) -> dict[float, str]:
    first, last = _ends(panel)
    return {x: panel.marks[x] for x in sorted(panel.marks) if first <= x <= last}


def _line_height() -> float:
    """Of the words of a mark, in pixels."""
    return 1.45 * SMALL / 72 * DPI


class _Words(NamedTuple):
    x: float
    text: str
    row: int  # from above
    to_the_left: bool
    whole: bool


def _placed(axes: Axes, panel: Panel, count: int) -> Iterator[_Words]:
    """Words of the marks on `count` lines in turn, each beside its mark and as long as the next one of its line allows."""
    figure, gap, enough = axes.figure, GAP * DPI, 0.5 * DPI
    assert isinstance(figure, Figure)
    marks = [(x, axes.transData.transform((x, 0.0))[0] - axes.bbox.x0, text) for x, text in _shown(panel).items()]
    ends = [0.0] * count
    for number, (x, at, text) in enumerate(marks):
        row = number % count
        after = marks[number + count][1] if number + count < len(marks) else axes.bbox.width
        right, left = after - at - 2 * gap, at - ends[row] - 2 * gap
        needed = _width(figure, " ".join(text.split()), SMALL)
        to_the_left = right < min(needed, enough) and left > right
        shown = _shortened(figure, text, SMALL, left if to_the_left else right)
        ends[row] = at if to_the_left else at + gap + _width(figure, shown, SMALL)
        yield _Words(x, shown, row, to_the_left, needed <= (left if to_the_left else right))


def _num_lines(axes: Axes, panel: Panel) -> int:
    """As few lines as show all words whole, at most three."""
    if not _shown(panel):
        return 0
    return next((count for count in (1, 2) if all(words.whole for words in _placed(axes, panel, count))), 3)


def _write_marks(axes: Axes, panel: Panel, count: int) -> None:
    box = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for words in _placed(axes, panel, count) if count else ():
        # as high as its own words, so that it crosses few others
        down = words.row * _line_height()
        axes.axvline(words.x, ymax=1 - down / axes.bbox.height, color="#8A8A8A", linestyle=(0, (3, 3)), linewidth=0.9, zorder=1)
        text = axes.annotate(
            words.text,
            (words.x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=((-1 if words.to_the_left else 1) * GAP * 72, -(0.02 * DPI + down) * 72 / DPI),
            textcoords="offset points",
            ha="right" if words.to_the_left else "left",
            va="top",
            fontsize=SMALL,
            color=GREY,
            zorder=4,
            bbox=box,
            parse_math=False,
        )
        text.set_in_layout(False)


def _radar(models: Mapping[str, Mapping[str, float]], *, title: str) -> Figure:
    if not models:
        raise ValueError("no models to draw; give at least one")
    names = list(dict.fromkeys(name for values in models.values() for name in values))
    for model, values in models.items():
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{model} has no value for {', '.join(missing)}; all models need the same axes")
    if len(names) < FEWEST_AXES:
        raise ValueError(f"{len(names)} axes ({', '.join(names)}) are no radar; give at least three, or draw bars")

    # in inches, by hand: the layout engine does not see how far labels stand out of a circle
    size, left, bottom = max(4.5, 0.28 * len(names)), 1.5, 0.85
    width = size + 5.3
    height = size + 1.8 + 0.2 * _title(title, width).count("\n")
    figure = _figure(width, height, title)
    figure.set_layout_engine("none")
    axes = figure.add_axes((left / width, bottom / height, size / width, size / height), projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 100)
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    axes.set_xticks(angles, [])
    axes.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"], fontsize=SMALL, color=GREY)
    axes.set_rlabel_position(float(np.degrees(angles[1] / 2)))  # between two axes
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["polar"].set(color=PALE, zorder=1)

    styles = _styles(list(models))
    around = [*range(len(names)), 0]
    for model, (colour, dash) in styles.items():
        values = np.clip([models[model][name] for name in names], 0, 100)
        axes.plot(angles[around], values[around], color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=3, clip_on=False)
    for name, angle in zip(names, angles):
        right, up = math.sin(angle), math.cos(angle)
        across = "center" if abs(right) < 0.1 else "left" if right > 0 else "right"
        along = "center" if abs(up) < 0.5 else "bottom" if up > 0 else "top"
        words = textwrap.fill(name.replace("_", " "), 14)
        axes.text(float(angle), 107, words, ha=across, va=along, fontsize=NORMAL, color=INK)
    place = {"loc": "upper left", "bbox_to_anchor": ((left + size + 1.35) / width, (bottom + size) / height)}
    labels = [textwrap.fill(model, 20) for model in styles]
    figure.legend(list(_samples(styles).values()), labels, **place, frameon=False, fontsize=NORMAL, labelcolor=INK)
    return _finished(figure)


def _bars(rows: Mapping[str, Mapping[str, float]], *, title: str, own: Collection[str]) -> Figure:
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    values = [value for row in rows.values() for value in row.values() if math.isfinite(value)]
    if not values:
        raise ValueError("no values to draw; give at least one model with a part")
    if unknown := [name for name in own if name not in rows]:
        raise ValueError(f"{unknown[0]!r} of own is none of the models: {', '.join(rows)}")
    # the differences between good models are small beside their values
    start = 10.0 * math.floor((min(values) - 5) / 10) if min(values) >= 25 else 0.0
    room = 0.08 * (max(values) - start) or 1.0

    width = 0.8 / len(parts)  # models are 1 apart
    figure = _figure(max(5.0, 1.2 + len(rows) * max(1.0, 0.44 * len(parts))), 4.2, title)
    axes = figure.add_subplot()
    _plain(axes, grid="y")
    for number, part in enumerate(parts):
        for place, (model, row) in enumerate(rows.items()):
            if not math.isfinite(row.get(part, math.nan)):
                continue
            colour = COLOURS[number % len(COLOURS)] if model in own else _paler(COLOURS[number % len(COLOURS)])
            bar = axes.bar(place + (number - (len(parts) - 1) / 2) * width, row[part], 0.94 * width, color=colour, zorder=2)
            weight = "bold" if model in own else "normal"
            axes.bar_label(bar, fmt="{:.1f}", fontsize=SMALL, color=INK, padding=1.5, fontweight=weight)
    axes.set_ylim(start if min(values) >= 0 else min(values) - room, max(max(values) + room, start + 10))
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.set_xticks(range(len(rows)), [textwrap.fill(name, 16) for name in rows])
    axes.tick_params(axis="x", length=0, labelsize=NORMAL)
    for model, label in zip(rows, axes.get_xticklabels()):
        label.set_fontweight("bold" if model in own else "normal")
    axes.set_ylabel(f"percent, axis starts at {start:g}" if start else "percent", fontsize=NORMAL, color=INK)
    if len(parts) > 1:
        _legend(figure, {part: Patch(color=COLOURS[number % len(COLOURS)]) for number, part in enumerate(parts)})
    return _finished(figure)


def _paler(colour: str) -> str:
    red, green, blue = (1 - 0.42 * (1 - channel) for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def _differences(rows: Sequence[Difference], *, title: str, x_label: str) -> Figure:
    if not rows:
        raise ValueError("no differences to draw; give at least one row")
    for row in rows:
        if not (row.low <= row.mean <= row.high and math.isfinite(row.high - row.low)):
            raise ValueError(f"{row.name}: a mean of {row.mean} in an interval from {row.low} to {row.high}; want low <= mean <= high")

    figure = _figure(7.6, 1.3 + 0.32 * len(rows), title)
    axes = figure.add_subplot()
    _plain(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
    for place, row in enumerate(rows):
        sure = row.low > 0 or row.high < 0
        colour = COLOURS[0] if sure else "#8A8A8A"
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2 if sure else 1.3, solid_capstyle="butt", zorder=2)
        axes.plot([row.mean], [place], color=colour, marker="o", markersize=6.5 if sure else 5, linestyle="none", zorder=3)
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    room = 0.05 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.name, 36, max_lines=2, placeholder=" …") for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=NORMAL)
    for row, label in zip(rows, axes.get_yticklabels()):
        label.set_fontweight("bold" if row.low > 0 or row.high < 0 else "normal")
    axes.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    return _finished(figure)
