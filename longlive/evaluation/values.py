"""Numbers by metric and video, as every evaluation leaves them: what can be averaged, drawn and compared.

`results/{kind}.json` for ours, `results/vbench/{dimension}_eval_results.json` as vbench writes them. Knows nothing of their meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive.evaluation import folder as folders
from longlive.evaluation.vbench_run import read_result, results_folder
from longlive.evaluation.vbench_score import DIMENSIONS

Values = dict[str, dict[str, float]]
"""Metric -> name of the video -> value; NaN where it cannot be said."""

KINDS = ("measured", "oracle", "clip_score")


def write(folder: Path, kind: str, found: Values, about: Mapping[str, Any]) -> None:
    """Leave the values, and how they were found, in `results/{kind}.json`."""
    content = {name: {video: None if math.isnan(value) else round(value, 6) for video, value in of.items()} for name, of in found.items()}
    folders.write_json(folder / "results" / f"{kind}.json", {**about, "metrics": content})


def read(folder: Path, kind: str) -> tuple[Values, dict[str, Any]] | None:
    """What `write` left, and how it was found; None. Raises ValueError when it cannot be read."""
    path = folder / "results" / f"{kind}.json"
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        metrics = about.pop("metrics")
        found = {name: {video: math.nan if value is None else float(value) for video, value in of.items()} for name, of in metrics.items()}
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    return found, about


def of_vbench(folder: Path) -> tuple[Values, dict[str, float]]:
    """Values of every dimension that vbench measured, and its averages. Imaging quality is divided by 100, as its average is."""
    found: Values = {}
    averages = {}
    for dimension in DIMENSIONS:
        path = results_folder(folder) / f"{dimension}_eval_results.json"
        if not path.exists():
            continue
        averages[dimension], videos = read_result(path, dimension)
        scale = 0.01 if dimension == "imaging_quality" else 1.0
        found[dimension] = {name: scale * value for name, value in videos.items()}
    return found, averages


def read_all(folder: Path) -> Values:
    """Everything that was measured on a folder."""
    found = of_vbench(folder)[0]
    for kind in KINDS:
        if (mine := read(folder, kind)) is not None:
            found |= mine[0]
    return found


def mean(of: Mapping[str, float]) -> float:
    """Over the videos of which it can be said."""
    values = np.array([value for value in of.values() if not math.isnan(value)])
    return float(values.mean()) if len(values) else math.nan
