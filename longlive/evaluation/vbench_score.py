"""From the JSON files that `vbench` writes to Quality, Semantic and Total (Huang et al. 2024; the leaderboard's `cal_final_score.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)


class Dimension(NamedTuple):
    """How a dimension counts: `low` and `high` are mapped to 0 and 1."""

    part: Literal["quality", "semantic"]
    low: float
    high: float
    weight: float = 1.0

    def normalised(self, value: Number) -> Number:
        return (value - self.low) / (self.high - self.low)


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462, 1.0),
    "background_consistency": Dimension("quality", 0.2615, 1.0),
    "temporal_flickering": Dimension("quality", 0.6293, 1.0),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", 0.0, 1.0, 0.5),
    "aesthetic_quality": Dimension("quality", 0.0, 1.0),
    "imaging_quality": Dimension("quality", 0.0, 1.0),
    "object_class": Dimension("semantic", 0.0, 1.0),
    "multiple_objects": Dimension("semantic", 0.0, 1.0),
    "human_action": Dimension("semantic", 0.0, 1.0),
    "color": Dimension("semantic", 0.0, 1.0),
    "spatial_relationship": Dimension("semantic", 0.0, 1.0),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}


class Result(NamedTuple):
    """A dimension as vbench measured it: its average, and the value of each video by name."""

    average: float
    videos: dict[str, float]


def _published() -> dict[str, dict[str, list[float]]]:
    tables: dict[str, dict[str, list[float]]] = {}
    for line in Path(__file__).with_name("published.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tables.setdefault(row["table"], {})[row["model"]] = row["values"]
    return tables


PUBLISHED = _published()
"""Table -> model -> values as the papers print them.

`vbench` (5 s) and `vbench_long` (30 s): Total, Quality, Semantic, in percent. `interactive` (60 s, table 2 of the LongLive paper): Quality,
and the CLIP score of six prompts of ten seconds. `switch` (10 s, its ablation): background and subject consistency, and the CLIP score.
"""


def check_dimensions(names: Iterable[str], *, where: str = "") -> None:
    """Raises ValueError, which begins with `where`, for a name that is not a dimension of VBench."""
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise ValueError(f"{where}{unknown[0]} is no dimension of VBench; the dimensions are {', '.join(DIMENSIONS)}")


def why_no_total(measured: Collection[str]) -> str | None:
    """Why there is no Total of these dimensions; None when there is."""
    missing = [name for name in DIMENSIONS if name not in measured]
    text = f"{len(missing)} of {len(DIMENSIONS)} dimensions are missing: {', '.join(missing)}; there is no Total without them"
    return text if missing else None


def parts(results: Mapping[str, Number]) -> dict[str, Number]:
    """Total, Quality and Semantic, in percent: the latter two are weighted means of their normalised dimensions."""
    means: dict[str, Number] = {}
    for part in ("quality", "semantic"):
        chosen = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.part == part}
        weighted = [dimension.weight * dimension.normalised(results[name]) for name, dimension in chosen.items()]
        means[part] = 100 * sum(weighted[1:], start=weighted[0]) / sum(dimension.weight for dimension in chosen.values())
    return {"total": (4 * means["quality"] + means["semantic"]) / 5, **means}


def score(results: Mapping[str, float]) -> dict[str, float]:
    """`parts` of all sixteen dimensions as `vbench` gives them, in [0, 1].

    Raises:
        ValueError: when dimensions are missing, unknown or out of range. There is no Total of a part of them.
    """
    if problem := why_no_total(results):
        raise ValueError(problem)
    check_dimensions(results)
    for name, value in results.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value}; dimensions are between 0 and 1 (divide percentages by 100)")
    return parts(results)


def read_result(path: Path) -> dict[str, Result]:
    """The dimensions in a result of vbench, usually one. VBench-Long lists clips: a video's value is the mean over its clips.

    Raises:
        ValueError: when it is not such a result, or not a number.
    """
    results = {}
    try:
        for dimension, (average, *_, listed) in json.loads(path.read_text(encoding="utf-8")).items():
            clips: dict[str, list[float]] = {}
            for clip in listed:
                clips.setdefault(Path(clip["video_path"]).stem, []).append(float(clip["video_results"]))
            results[dimension] = Result(float(average), {name: sum(values) / len(values) for name, values in clips.items()})
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of vbench: {error!r}") from error
    for dimension, (average, videos) in results.items():
        if not math.isfinite(average) or not videos:
            raise ValueError(f"{path}: {dimension} is {average} of {len(videos)} videos; vbench could not measure them")
    return results


def read_results(folder: Path) -> dict[str, float]:
    """Averages by dimension from every `*_eval_results.json` of a folder.

    Raises:
        ValueError: when there is none, one cannot be read, or two disagree on a dimension.
    """
    averages: dict[str, tuple[float, Path]] = {}
    for path in sorted(folder.glob("**/*_eval_results.json")):
        for dimension, (average, _) in read_result(path).items():
            first, where = averages.setdefault(dimension, (average, path))
            if average != first:
                raise ValueError(f"{dimension} is {first} in {where} and {average} in {path}; keep one of them")
    if not averages:
        raise ValueError(f"{folder} contains no results of vbench (*_eval_results.json)")
    return {dimension: average for dimension, (average, _) in averages.items()}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; it ends with a line break."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def normalised(results: Mapping[str, float]) -> dict[str, float]:
    """Every dimension in percent of its range, unclipped."""
    return {name: 100 * DIMENSIONS[name].normalised(value) for name, value in results.items()}


def dimension_table(results: Mapping[str, float]) -> str:
    """Every dimension as Markdown, raw and normalised."""
    rows = []
    for name, dimension in DIMENSIONS.items():
        value = results.get(name)
        shown = ["missing", ""] if value is None else [f"{value:.4f}", f"{100 * dimension.normalised(value):.2f}"]
        rows.append([name, f"{dimension.part} × {dimension.weight:g}", *shown])
    return markdown_table(["dimension", "counts to", "raw", "normalised, %"], rows)


def total_table(results: Mapping[str, float], *, name: str, published: Mapping[str, Sequence[float]]) -> str:
    """Totals as Markdown beside published ones; only the latter while a dimension is missing."""
    own = [] if why_no_total(results) else [[f"**{name}**", *(f"**{value:.2f}**" for value in score(results).values())]]
    others = [[f"{model} (published)", *(f"{value:.2f}" for value in row)] for model, row in published.items()]
    return markdown_table(["model", "Total", "Quality", "Semantic"], own + others)
