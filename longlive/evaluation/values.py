"""Numbers by metric and video, which every evaluation produces: they can be averaged, drawn and compared.

They are stored in `results/{kind}.json`, and in `results/vbench/{dimension}_eval_results.json` as vbench writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longlive.evaluation.prepared import PlannedVideo, Prepared, digest_of_videos
from longlive.evaluation.vbench_run import result_path
from longlive.evaluation.vbench_score import DIMENSIONS, read_result
from longlive.files import read_json, write_json
from longlive.provenance import made_with

Values = dict[str, dict[str, float]]
"""Metric -> name of the video -> value; NaN where it is not defined."""

KINDS = ("measured", "oracle", "clip_score")


def collect(prepared: Prepared, measure: Callable[[PlannedVideo], Mapping[str, float]]) -> Values:
    """The numbers that `measure` returns for each video, by metric."""
    collected: Values = {}
    for planned in tqdm(prepared.videos, unit="video", mininterval=1):
        for metric, value in measure(planned).items():
            collected.setdefault(metric, {})[planned.name] = value
    return collected


def measured_on(folder: Path, prepared: Prepared) -> dict[str, Any]:
    """Facts to record beside all values of a folder: a digest of its videos, versions, commit and hardware."""
    return {"videos_digest": digest_of_videos(folder, prepared.names), **made_with()}


def none_if_nan(value: Any) -> Any:
    """`value` for a JSON file, which has no NaN."""
    return None if value != value else value


def write(folder: Path, kind: str, measured: Values, about: Mapping[str, Any]) -> None:
    """Store the values, and how they were measured, in `results/{kind}.json`."""
    content = {metric: {video: none_if_nan(round(value, 6)) for video, value in by_video.items()} for metric, by_video in measured.items()}
    write_json(folder / "results" / f"{kind}.json", {**about, "metrics": content})


def read(folder: Path, kind: str) -> tuple[Values, dict[str, Any]]:
    """The values and the rest that `write` stored; both empty without a file. Raises ValueError when it cannot be read."""
    path = folder / "results" / f"{kind}.json"
    if not path.exists():
        return {}, {}
    about = read_json(path)
    try:
        metrics = about.pop("metrics")
        measured = {
            metric: {video: math.nan if value is None else float(value) for video, value in by_video.items()}
            for metric, by_video in metrics.items()
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    return measured, about


def read_vbench(folder: Path) -> tuple[Values, dict[str, float]]:
    """Values of every dimension that vbench measured, and its averages. Imaging quality is divided by 100, as its average is."""
    measured: Values = {}
    averages = {}
    for dimension in DIMENSIONS:
        if (path := result_path(folder, dimension)).exists():
            averages[dimension], by_video = read_result(path)[dimension]
            scale = 0.01 if dimension == "imaging_quality" else 1.0
            measured[dimension] = {video: scale * value for video, value in by_video.items()}
    return measured, averages


def read_all(folder: Path) -> Values:
    """All values of a folder."""
    measured = read_vbench(folder)[0]
    for kind in KINDS:
        measured |= read(folder, kind)[0]
    return measured


def mean(by_video: Mapping[str, float]) -> float:
    """Over the videos whose value is defined; NaN when there is none."""
    defined = np.array([value for value in by_video.values() if not math.isnan(value)])
    return float(defined.mean()) if len(defined) else math.nan
