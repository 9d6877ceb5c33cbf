"""From VBench's sixteen dimensions to Quality, Semantic and Total (Huang et al. 2024; the leaderboard's `cal_final_score.py`).

Knows nothing of how a dimension is measured: it reads the JSON files that `vbench` writes.
"""

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


class Row(NamedTuple):
    """Totals in percent."""

    total: float
    quality: float
    semantic: float


def _published() -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for line in Path(__file__).with_name("published.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["table"], {})[row["model"]] = row["values"]
    return found


PUBLISHED = _published()
"""Table -> model -> values as the papers print them.

`vbench` (5 s) and `vbench_long` (30 s): Total, Quality, Semantic, in percent. `interactive` (60 s, table 2 of the LongLive paper): Quality,
and the CLIP score of six stretches of ten seconds. `switch` (10 s, its ablation): background and subject consistency, and the CLIP score.
"""


def check_dimensions(names: Iterable[str], *, where: str = "") -> None:
    """Raises ValueError, which begins with `where`, for a name that is not a dimension of VBench."""
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise ValueError(f"{where}{unknown[0]} is no dimension of VBench; known are {', '.join(DIMENSIONS)}")


def missing_dimensions(measured: Collection[str]) -> str | None:
    """Why there is no Total of these dimensions; None when there is."""
    missing = [name for name in DIMENSIONS if name not in measured]
    text = f"{len(missing)} of {len(DIMENSIONS)} dimensions are missing: {', '.join(missing)}; there is no Total without them"
    return text if missing else None


def total(quality: Number, semantic: Number) -> Number:
    """Total = (4 Quality + Semantic) / 5."""
    return (4 * quality + semantic) / 5


def parts(results: Mapping[str, Number]) -> dict[str, Number]:
    """Total, Quality and Semantic, in percent: the latter two are weighted means of their normalised dimensions."""
    found: dict[str, Number] = {}
    for name in ("quality", "semantic"):
        chosen = {dimension: one for dimension, one in DIMENSIONS.items() if one.part == name}
        weighted = [one.weight * one.normalised(results[dimension]) for dimension, one in chosen.items()]
        found[name] = 100 * sum(weighted[1:], start=weighted[0]) / sum(one.weight for one in chosen.values())
    return {"total": total(found["quality"], found["semantic"]), **found}


def score(results: Mapping[str, float]) -> Row:
    """Quality, Semantic and Total, in percent, of all sixteen dimensions as `vbench` gives them, in [0, 1].

    Raises:
        ValueError: when dimensions are missing, unknown or out of range. There is no Total of a part of them.
    """
    if problem := missing_dimensions(results):
        raise ValueError(problem)
    check_dimensions(results)
    for name, value in results.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value}; dimensions are between 0 and 1 (divide percentages by 100)")
    return Row(**parts(results))


def read_results(folder: str | Path) -> dict[str, float]:
    """Averages by dimension from every `*_eval_results.json` of a folder.

    Raises:
        ValueError: when there is none, one cannot be read, or two disagree on a dimension.
    """
    found: dict[str, tuple[float, Path]] = {}
    for file in sorted(Path(folder).glob("**/*_eval_results.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            values = {name: float(result[0]) for name, result in content.items()}
        except (json.JSONDecodeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{file} is no result of vbench: {error}") from error
        for name, value in values.items():
            if name in found and found[name][0] != value:
                raise ValueError(f"{name} is {found[name][0]} in {found[name][1]} and {value} in {file}; keep one of them")
            found[name] = value, file
    if not found:
        raise ValueError(f"{folder} holds no results of vbench (*_eval_results.json)")
    return {name: value for name, (value, _) in found.items()}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; it ends with a line break."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def normalised(results: Mapping[str, float]) -> dict[str, float]:
    """Every dimension in percent of its range, unclipped."""
    return {name: 100 * DIMENSIONS[name].normalised(value) for name, value in results.items()}


def table(results: Mapping[str, float], *, name: str = "this run", published: Mapping[str, Sequence[float]]) -> str:
    """Markdown: every dimension, raw and normalised, and the totals beside published ones; without own totals while any is missing."""
    dimensions = []
    for dimension, how in DIMENSIONS.items():
        value = results.get(dimension)
        shown = ["missing", ""] if value is None else [f"{value:.4f}", f"{100 * how.normalised(value):.2f}"]
        dimensions.append([dimension, f"{how.part} × {how.weight:g}", *shown])
    own = [] if missing_dimensions(results) else [[f"**{name}**", *(f"**{value:.2f}**" for value in score(results))]]
    others = [[f"{model} (published)", *(f"{value:.2f}" for value in row)] for model, row in published.items()]
    first = markdown_table(["dimension", "counts to", "raw", "normalised, %"], dimensions)
    return f"{first}\n{markdown_table(['model', 'Total', 'Quality', 'Semantic'], own + others)}"
