"""Line plots with shaded intervals, drawn with Pillow. Knows nothing of what the lines mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FINE = 3  # everything is drawn this much larger, then scaled down: smooth lines
WIDTH, HEIGHT = 560, 380  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 40, 56  # from a panel's edge to its axes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#8C5A2B")  # told apart by the colour-blind too
INK, PALE = "#222222", "#E3E3E3"


@dataclass(frozen=True)
class Line:
    """A curve and its interval; lines of one label have one colour in all panels."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Axes with lines.

    Attributes:
        y_range: lowest and highest value shown; None: what the lines need.
        marks: x of vertical lines, and what they say; those beyond the lines' ends are not shown.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None
    marks: dict[float, str] = field(default_factory=dict)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`.

    Raises:
        ValueError: when there is nothing between them.
    """
    if not high > low:
        raise ValueError(f"an axis from {low} to {high} has no length")
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((unit * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(round(FINE * size))


def _shade(color: str) -> tuple[int, int, int, int]:
    return (*(int(color[i : i + 2], 16) for i in (1, 3, 5)), 46)  # type: ignore[return-value]


class _Axes:
    """Where a panel's values lie in the picture."""

    def __init__(self, panel: Panel, left: float, top: float) -> None:
        self.box = (left + LEFT, top + TOP, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM)
        xs = [x for line in panel.lines for x in line.x]
        self.x = (min(xs), max(xs))
        if panel.y_range is not None:
            self.y = panel.y_range
        else:
            low, high = min(y for line in panel.lines for y in line.low), max(y for line in panel.lines for y in line.high)
            room = 0.06 * (high - low) or max(1e-3, 0.1 * abs(high))
            self.y = (0.0 if 0 <= low < 0.3 * high else low - room, high + room)

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        y = min(max(y, self.y[0]), self.y[1])
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return FINE * (left + across * (right - left)), FINE * (bottom - up * (bottom - top))


def draw(panels: Sequence[Panel], path: Path, *, title: str, columns: int = 2) -> None:
    """Write the panels, `columns` side by side, under one title and one legend, as PNG."""
    columns = min(columns, len(panels))
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
    rows, places = _legend(labels, columns * WIDTH)
    head = 44 + 22 * rows
    size = (columns * WIDTH, head + math.ceil(len(panels) / columns) * HEIGHT)
    picture = Image.new("RGB", (FINE * size[0], FINE * size[1]), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((FINE * 20, FINE * 12), title, font=_font(18), fill=INK)
    for label, (x, y) in zip(labels, places, strict=True):
        pen.line([FINE * x, FINE * (y + 9), FINE * (x + 26), FINE * (y + 9)], fill=colors[label], width=FINE * 3)
        pen.text((FINE * (x + 33), FINE * y), label, font=_font(14), fill=INK)
    for number, panel in enumerate(panels):
        _panel(picture, panel, WIDTH * (number % columns), head + HEIGHT * (number // columns), colors)
    picture.resize(size, Image.Resampling.LANCZOS).save(path, optimize=True)


def _legend(labels: Sequence[str], width: int) -> tuple[int, list[tuple[float, float]]]:
    """How many rows the labels need, and where each begins."""
    x, y, rows, places = 20.0, 42.0, 1, []
    for label in labels:
        room = 33 + _font(14).getlength(label) / FINE + 28
        if x + room > width and x > 20:
            x, y, rows = 20.0, y + 22, rows + 1
        places.append((x, y))
        x += room
    return rows, places


def _panel(picture: Image.Image, panel: Panel, left: float, top: float, colors: dict[str, str]) -> None:
    axes = _Axes(panel, left, top)
    pen, small = ImageDraw.Draw(picture), _font(12.5)
    x0, y0, x1, y1 = (FINE * edge for edge in axes.box)
    for y in ticks(*axes.y):
        _, height = axes.at(axes.x[0], y)
        pen.line([x0, height, x1, height], fill=PALE, width=FINE)
        pen.text((x0 - FINE * 7, height), f"{y:g}", font=small, fill=INK, anchor="rm")
    for x in ticks(*axes.x, about=6) if axes.x[1] > axes.x[0] else [axes.x[0]]:
        across, _ = axes.at(x, axes.y[0])
        pen.line([across, y1, across, y1 + FINE * 4], fill=INK, width=FINE)
        pen.text((across, y1 + FINE * 7), f"{x:g}", font=small, fill=INK, anchor="ma")
    for x, words in panel.marks.items():
        if not axes.x[0] <= x <= axes.x[1]:
            continue
        across, _ = axes.at(x, axes.y[0])
        for part in range(int(y0), int(y1), FINE * 8):
            pen.line([across, part, across, min(part + FINE * 4, y1)], fill="#888888", width=FINE)
        right = x > sum(axes.x) / 2  # there is more room on the left
        pen.text(
            (across + FINE * (-4 if right else 4), y0 + FINE * 2), words, font=_font(11.5), fill="#666666", anchor="ra" if right else "la"
        )

    shades = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    for line in panel.lines:
        one = Image.new("RGBA", picture.size, (0, 0, 0, 0))
        edge = [axes.at(x, y) for x, y in zip(line.x, line.low)] + [axes.at(x, y) for x, y in zip(line.x, line.high)][::-1]
        if len(line.x) > 1:
            ImageDraw.Draw(one).polygon(edge, fill=_shade(colors[line.label]))
        shades = Image.alpha_composite(shades, one)
    picture.paste(Image.alpha_composite(picture.convert("RGBA"), shades).convert("RGB"))
    pen = ImageDraw.Draw(picture)
    for line in panel.lines:
        points = [axes.at(x, y) for x, y in zip(line.x, line.y)]
        pen.line(points, fill=colors[line.label], width=round(FINE * 2.2), joint="curve")
        for px, py in points if len(points) <= 24 else []:
            dot = FINE * 2.6
            pen.ellipse([px - dot, py - dot, px + dot, py + dot], fill=colors[line.label])
    pen.line([x0, y0, x0, y1, x1, y1], fill=INK, width=FINE)
    pen.text((x0, FINE * (top + 14)), panel.title, font=_font(15), fill=INK)
    pen.text(((x0 + x1) / 2, y1 + FINE * 28), panel.x_label, font=small, fill=INK, anchor="ma")
    _upright(picture, panel.y_label, FINE * (left + 14), (y0 + y1) / 2)


def _upright(picture: Image.Image, text: str, x: float, middle: float) -> None:
    """Text that is read from below."""
    font = _font(12.5)
    box = font.getbbox(text)
    flat = Image.new("L", (math.ceil(box[2]) + 2, math.ceil(box[3]) + 2), 0)
    ImageDraw.Draw(flat).text((0, 0), text, font=font, fill=255)
    mask = flat.rotate(90, expand=True)
    picture.paste(Image.new("RGB", mask.size, INK), (round(x), round(middle - mask.size[1] / 2)), mask)
