"""Charts show what they were given: curves where they belong, gaps as gaps, words that can be read, and files that are whole."""

import inspect
import itertools
import math
import os
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from longlive.evaluation import charts
from longlive.evaluation.charts import Difference, Line, Panel
from longlive.evaluation.vbench_score import DIMENSIONS

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a layout or a letter fails

OUT = Path(tempfile.mkdtemp()) / "picture.png"
SECONDS = np.arange(0.0, 61.0)
PROMPTS = (
    "A grey cat walks along a harbour wall at dawn",
    "The cat jumps into a small fishing boat",
    "Rain begins; it costs $5 and $6",
    "Night, lanterns are lit on the quay",
    "The boat sails out to sea",
)
SWITCHES = {10.0 * (number + 1): prompt for number, prompt in enumerate(PROMPTS)}
MODELS = {
    model: {name: 90 - 7 * number - 2 * place for place, name in enumerate(DIMENSIONS)}
    for number, model in enumerate(("LongLive", "Self-Forcing", "a_b", "_hidden", "$x", "FramePack"))
}
ROWS = {
    "LongLive": {"Total": 84.87, "Quality": 86.97, "Semantic": 76.47},
    "CausVid": {"Total": 81.2, "Quality": 84.05, "Semantic": 69.8},
}


def panel(*lines: Line, **settings) -> Panel:
    return Panel("CLIP score", "seconds", "percent", lines or (Line("LongLive", SECONDS, 30 + 0 * SECONDS),), **settings)


def over_time(*panels: Panel, columns: int = 2) -> Figure:
    return charts.over_time(panels, OUT, title="Six prompts", columns=columns)


def radar(models) -> Figure:
    return charts.radar(models, OUT, title="Dimensions")


def bars(rows, own=()) -> Figure:
    return charts.bars(rows, OUT, title="Totals", own=own)


def difference(mean: float, low: float, high: float, name: str = "motion") -> Difference:
    return Difference(name, mean, low, high)


def forest(*rows: Difference) -> Figure:
    return charts.differences(rows, OUT, title="A minus B", x_label="percent")


def pixels(figure: Figure) -> np.ndarray:
    """Colours in 0..1, `[H, W, 3]`, the lowest row first, as matplotlib counts."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255


def seen(image: np.ndarray, axes, x: float, y: float, colour: str, reach: int = 2) -> bool:
    """Whether the colour is within some pixels of a place in the axes."""
    across, up = np.round(axes.transData.transform((x, y))).astype(int)
    patch = image[up - reach : up + reach + 1, across - reach : across + reach + 1]
    return bool((np.abs(patch - to_rgb(colour)).max(axis=-1) < 0.1).any())


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text) if text.get_visible()}


DRAWERS = {
    "over_time": lambda path: charts.over_time([panel(), panel(marks=SWITCHES)], path, title="Over time"),
    "radar": lambda path: charts.radar(MODELS, path, title="Dimensions"),
    "bars": lambda path: charts.bars(ROWS, str(path), title="Totals", own=["LongLive"]),
    "differences": lambda path: charts.differences([difference(1, 0, 2)], path, title="A minus B", x_label="percent"),
}
BUILDERS = {
    "over_time": lambda: over_time(panel(marks=SWITCHES), panel(Line("a", [0, 1], [1, 2]), Line("$b_$", [0, 1], [2, 1]))),
    "radar": lambda: radar(MODELS),
    "bars": lambda: bars(ROWS),
    "differences": lambda: forest(*(difference(0, -1, 1, name) for name in DIMENSIONS)),
}


@pytest.mark.parametrize("kind", DRAWERS)
def test_a_whole_png_in_a_new_folder(tmp_path, kind):
    path = tmp_path / "new" / "folder" / "picture.png"
    DRAWERS[kind](path)
    assert [item.name for item in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and 700 <= picture.width <= 2000 and 200 <= picture.height <= 1400
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert 5_000 < path.stat().st_size < 500_000


def test_a_failure_leaves_the_older_picture_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    path = tmp_path / "picture.png"
    path.write_bytes(b"older")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        DRAWERS["bars"](path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_nothing_global_is_touched(tmp_path):
    before = dict(matplotlib.rcParams)
    for kind, drawer in DRAWERS.items():
        drawer(tmp_path / kind)
    assert dict(matplotlib.rcParams) == before
    assert "import matplotlib.pyplot" not in (source := inspect.getsource(charts)) and "import pyplot" not in source


@pytest.mark.parametrize("kind", BUILDERS)
def test_words_can_be_read_and_lie_within_the_picture(kind):
    figure = BUILDERS[kind]()
    figure.canvas.draw()
    for text in figure.findobj(Text):
        if text.get_text():
            assert text.get_fontsize() >= 8
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_dollars_are_no_formulas(tmp_path):
    bad = r"$\no$"  # matplotlib raises where it reads this as a formula
    line, other = Line(bad, [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])
    charts.over_time([Panel(bad, bad, bad, [line, other], marks={0.5: bad})], tmp_path / "1.png", title=bad)
    charts.radar({bad: dict.fromkeys((bad, "y", "z"), 1.0)}, tmp_path / "2.png", title=bad)
    charts.bars({bad: {bad: 1.0, "b": 2.0}}, tmp_path / "3.png", title=bad, own=[bad])
    charts.differences([difference(1, 0, 2, bad)], tmp_path / "4.png", title=bad, x_label=bad)
    assert bad in texts(over_time(Panel(bad, bad, bad, [line])))


def test_a_curve_is_where_its_values_are_and_nan_is_a_gap():
    y = np.where((SECONDS >= 20) & (SECONDS <= 30), np.nan, 10 + SECONDS)
    figure = over_time(panel(Line("LongLive", SECONDS, y)))
    image, (axes,) = pixels(figure), figure.axes
    for x in (5, 19, 31, 55):
        assert seen(image, axes, x, 10 + x, charts.COLOURS[0])
        assert not seen(image, axes, x, 15 + x, charts.COLOURS[0])
    for x in (21, 25, 29):
        assert not seen(image, axes, x, 10 + x, charts.COLOURS[0])


def test_a_value_between_gaps_is_seen():
    y = np.full(61, np.nan)
    y[[0, 30, 60]] = 1, 2, 3
    figure = over_time(panel(Line("LongLive", SECONDS, y)))
    image = pixels(figure)
    assert [seen(image, figure.axes[0], x, 2, charts.COLOURS[0]) for x in (29, 30, 31)] == [False, True, False]


def test_one_label_is_one_colour():
    one, two = Line("a", [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])
    left, right = over_time(panel(one, two), panel(two, one)).axes
    a, b = left.lines
    assert same_color(a.get_color(), right.lines[1].get_color()) and same_color(b.get_color(), right.lines[0].get_color())
    assert not same_color(a.get_color(), b.get_color())


def test_more_labels_than_colours_can_be_told_apart():
    lines = [Line(str(number), [0, 1], [number, 1]) for number in range(20)]
    drawn = over_time(panel(*lines)).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 20


def test_an_interval_is_shaded():
    y = 10 + SECONDS
    figure = over_time(panel(Line("a", SECONDS, y, y - 8, y + 8)), panel(Line("b", SECONDS, y)))
    image, (with_interval, without) = pixels(figure), figure.axes
    assert [len([one for one in axes.collections if isinstance(one, PolyCollection)]) for axes in figure.axes] == [1, 0]
    blue = tuple(1 - 0.18 * (1 - channel) for channel in to_rgb(charts.COLOURS[0]))
    for up, inside in ((5, True), (-5, True), (11, False)):
        assert seen(image, with_interval, 33, 43 + up, blue, reach=0) == inside  # type: ignore[arg-type]
    assert not seen(image, without, 33, 48, blue)  # type: ignore[arg-type]


def test_one_legend_and_only_where_it_says_something():
    lines = Line("_a", [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])
    assert not over_time(panel(lines[0]), panel(lines[0])).legends
    figure = over_time(panel(*lines), panel(*lines))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_a", "b"]
    figure.canvas.draw()
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_a_legend_of_many_long_labels_lies_within_the_picture():
    figure = over_time(panel(*(Line(f"{'a long name of a model ' * 9 ** (number == 3)}{number}", [0, 1], [0, 1]) for number in range(8))))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and not box.overlaps(figure.axes[0].get_tightbbox())


@pytest.mark.parametrize(
    "marks",
    [
        SWITCHES,
        {0.0: "at the start", 60.0: "at the end"},
        {57.0: "one", 58.0: "two", 59.0: PROMPTS[0]},
        {x / 2: f"switch {x}" for x in range(120)},
        {10.0: "word " * 100, 20.0: "other"},
    ],
    ids=["prompts", "ends", "crowd", "many", "long"],
)
def test_marks_are_numbered_and_listed(marks):
    """Numbers meet neither each other nor the title; the legend says what each means, and lies within the picture."""
    figure = over_time(panel(Line("LongLive", SECONDS, SECONDS), marks=marks), panel())
    figure.canvas.draw()
    axes, (legend,) = figure.axes[0], figure.legends
    listed = [text.get_text() for text in legend.get_texts()]
    for number, text in enumerate(list(marks.values())[: charts.MAX_LISTED], 1):
        assert any(one.startswith(f"{number}  {text[:20]}") for one in listed)
    assert ("… and 104 more" in listed) == (len(marks) == 120)
    numbers = {text.get_text(): text.get_window_extent() for text in axes.texts}
    closest = min(b - a for a, b in itertools.pairwise(marks))
    assert "1" in numbers and (len(numbers) == len(marks)) == (closest > 60 * charts.MIN_SPACING)
    assert sum(line.get_linestyle() == "--" for line in axes.lines) == len(marks)
    boxes = [*numbers.values(), axes.title.get_window_extent()]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and not any(box.overlaps(one.get_tightbbox()) for one in figure.axes)


def test_long_words_of_marks_are_shortened():
    figure = over_time(panel(marks={20.0: "short", 30.0: "word " * 300}))
    short, long = (text.get_text() for text in figure.legends[0].get_texts())
    assert short == "1  short" and long.startswith("2  word word") and long.endswith("…") and long.count("\n") == 2


def test_marks_that_all_say_the_same_need_no_numbers():
    figure = over_time(panel(marks={20.0: "next prompt", 40.0: "next prompt"}), panel())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["next prompt"] and not figure.axes[0].texts


def test_marks_beyond_the_lines_are_not_shown():
    figure = over_time(panel(marks={-5.0: "before", 30.0: "within", 70.0: "after"}))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["within"]
    assert figure.axes[0].get_xlim()[0] > -5 and figure.axes[0].get_xlim()[1] < 70


def test_the_range_is_what_was_asked_for_or_holds_all_values():
    line = Line("a", [0, 1, 2], [40.0, math.nan, 60.0], [30.0, 40.0, 50.0], [50.0, 95.0, 70.0])
    asked, found = over_time(panel(line, y_range=(20, 120)), panel(line, marks={1.0: "switch"})).axes
    assert asked.get_ylim() == (20, 120)
    assert found.get_ylim()[0] <= 30 and found.get_ylim()[1] >= 95


def test_columns():
    figure = over_time(*[panel()] * 3, columns=2)
    assert len({round(axes.get_position().x0, 2) for axes in figure.axes}) == 2
    assert len({round(axes.get_position().y0, 2) for axes in figure.axes}) == 2


@pytest.mark.parametrize("num_axes", [3, 4, 7, 16, 24])
def test_radar_labels_meet_neither_the_circle_nor_each_other(num_axes):
    names = [f"overall_consistency_{number}" for number in range(num_axes)]
    figure = radar({"LongLive": dict.fromkeys(names, 50.0)})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [" ".join(text.get_text().split()) for text in axes.texts] == [name.replace("_", " ") for name in names]
    boxes = [text.get_window_extent() for text in axes.texts]
    centre, radius = axes.transData.transform((0, 0)), axes.bbox.width / 2
    for box in boxes:
        nearest = np.clip(centre, box.min, box.max)
        assert np.hypot(*(nearest - centre)) > radius
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert not any(legend.get_window_extent().overlaps(box) for legend in figure.legends for box in boxes)


def test_radar_lines_are_closed_and_stay_within_the_circle():
    figure = radar({"a": {"x": -20, "y": 50, "z": 130}, "b": {"z": 1, "y": 2, "x": 3}})
    one, two = figure.axes[0].lines
    assert one.get_ydata().tolist() == [0, 50, 100, 0]
    assert two.get_ydata().tolist() == [3, 2, 1, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_bars_say_their_values_and_where_they_start():
    figure = bars(ROWS, own=["LongLive"])
    assert {f"{value:.1f}" for row in ROWS.values() for value in row.values()} <= texts(figure)
    assert {*ROWS, "Total", "Quality", "Semantic", "Totals"} <= texts(figure)
    (axes,) = figure.axes
    assert axes.get_ylabel() == f"percent, axis starts at {axes.get_ylim()[0]:g}" and 0 < axes.get_ylim()[0] < 69.8
    low = bars({"a": {"Total": 2.0, "Quality": 99.0}}).axes[0]
    assert low.get_ylabel() == "percent" and low.get_ylim()[0] == 0


def test_own_bars_are_saturated():
    def saturation(bar) -> float:
        return max(bar.get_facecolor()[:3]) - min(bar.get_facecolor()[:3])

    axes = bars(ROWS, own=["LongLive"]).axes[0]
    ours, others = axes.patches[0::2], axes.patches[1::2]
    assert len(ours) == len(others) == 3
    assert all(saturation(one) > 1.5 * saturation(two) for one, two in zip(ours, others))


def test_a_missing_part_has_no_bar():
    assert len(bars({"a": {"Total": 80.0}, "b": {"Total": 81.0, "Quality": math.nan}}).axes[0].patches) == 2


@pytest.mark.parametrize("count", [1, 40])
def test_differences_have_a_row_each(count):
    figure = forest(*(difference(number - 5, number - 7, number - 4, f"row {number}") for number in range(count)))
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    heights = [label.get_window_extent().y0 for label in labels]
    assert [label.get_text() for label in labels] == [f"row {number}" for number in range(count)]
    assert heights == sorted(heights, reverse=True)
    assert not any(one.get_window_extent().overlaps(two.get_window_extent()) for one, two in itertools.pairwise(labels))
    assert axes.get_xlim()[0] < -7 and axes.get_xlim()[1] > max(0, count - 5)
    assert figure.get_figheight() > 0.25 * count


def test_intervals_without_zero_are_stressed():
    figure = forest(difference(2, 1, 3), difference(1, -1, 3), difference(-2, -3, -1), difference(1, 0, 2))
    image, (axes,) = pixels(figure), figure.axes
    blue = charts.COLOURS[0]
    assert [seen(image, axes, mean, row, blue) for row, mean in enumerate((2, 1, -2, 1))] == [True, False, True, False]
    assert seen(image, axes, 1.2, 0, blue) and seen(image, axes, 2.8, 0, blue) and not seen(image, axes, 0.7, 0, blue)
    assert all(seen(image, axes, 0, between, charts.INK) for between in (-0.4, 0.5, 2.5))


@pytest.mark.parametrize("rows", [{}, {"a": {}}])
def test_bars_without_values_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"no values to draw; give at least one"):
        charts.bars(rows, tmp_path / "new" / "picture.png", title="t")
    assert not (tmp_path / "new").exists()
