"""Numbers by metric and video, which every evaluation produces: they can be averaged, drawn and compared.

`results/{kind}.json` for ours, `results/vbench/{dimension}_eval_results.json` as vbench writes them. Knows nothing of their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longlive.evaluation import folder as folders
from longlive.evaluation.folder import PlannedVideo, Prepared
from longlive.evaluation.vbench_run import read_result, result_path
from longlive.evaluation.vbench_score import DIMENSIONS
from longlive.files import read_json, write_json
from longlive.provenance import made_with

Values = dict[str, dict[str, float]]
"""Metric -> name of the video -> value; NaN where it is not defined."""

KINDS = ("measured", "oracle", "clip_score")


def collect(prepared: Prepared, measure: Callable[[PlannedVideo], Mapping[str, float]]) -> Values:
    """What `measure` returns for each video, by metric."""
    found: Values = {}
    for planned in tqdm(prepared.videos, unit="video", mininterval=1):
        for metric, value in measure(planned).items():
            found.setdefault(metric, {})[planned.name] = value
    return found


def measured_on(folder: Path, prepared: Prepared) -> dict[str, Any]:
    """What is recorded beside all values of a folder: a digest of its videos, versions, commit and hardware."""
    return {"videos_digest": folders.digest_of_videos(folder, prepared.names), **made_with()}


def write(folder: Path, kind: str, found: Values, about: Mapping[str, Any]) -> None:
    """Store the values, and how they were measured, in `results/{kind}.json`."""
    content = {name: {video: None if math.isnan(value) else round(value, 6) for video, value in of.items()} for name, of in found.items()}
    write_json(folder / "results" / f"{kind}.json", {**about, "metrics": content})


def read(folder: Path, kind: str) -> tuple[Values, dict[str, Any]]:
    """The values and the rest that `write` stored; both empty when there is nothing. Raises ValueError when it cannot be read."""
    path = folder / "results" / f"{kind}.json"
    if not path.exists():
        return {}, {}
    about = read_json(path)
    try:
        metrics = about.pop("metrics")
        found = {name: {video: math.nan if value is None else float(value) for video, value in of.items()} for name, of in metrics.items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    return found, about


def of_vbench(folder: Path) -> tuple[Values, dict[str, float]]:
    """Values of every dimension that vbench measured, and its averages. Imaging quality is divided by 100, as its average is."""
    found: Values = {}
    averages = {}
    for dimension in DIMENSIONS:
        if (path := result_path(folder, dimension)).exists():
            averages[dimension], videos = read_result(path, dimension)
            scale = 0.01 if dimension == "imaging_quality" else 1.0
            found[dimension] = {name: scale * value for name, value in videos.items()}
    return found, averages


def read_all(folder: Path) -> Values:
    """Everything that was measured on a folder."""
    found = of_vbench(folder)[0]
    for kind in KINDS:
        found |= read(folder, kind)[0]
    return found


def mean(of: Mapping[str, float]) -> float:
    """Over the videos whose value is defined; NaN when there is none."""
    known = np.array([value for value in of.values() if not math.isnan(value)])
    return float(known.mean()) if len(known) else math.nan
