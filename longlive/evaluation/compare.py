"""Two models on the same prompts and seeds: paired differences, with confidence intervals that account for videos of the same prompt.

The mean difference over videos, and its 95 % interval by a Bayesian bootstrap over prompts (Rubin 1981): every prompt gets an exponential
weight, the same for all of its videos, in both folders and in all metrics, so that Quality, Semantic and Total have intervals too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longlive.evaluation import charts, report, values, vbench_run
from longlive.evaluation.prepared import Prepared, load_prepared
from longlive.evaluation.suites import names_of
from longlive.evaluation.values import Values
from longlive.evaluation.vbench_score import DIMENSIONS, markdown_table, normalised, parts
from longlive.files import write_json, write_text

LOWER_IS_BETTER = {"block_flicker", "switch_flicker", "size_drift", "switch_seconds"}
# these depend on the prompt
NEITHER_IS_BETTER = {"temporal_flickering_of_all", "motion", "colour_drift", "sink_similarity", "loop_similarity"}
OF_SOME_VIDEOS = {"color", "temporal_flickering"}  # those with the object, or that stand still; what both folders have is compared
MIN_PROMPTS = 5  # for a verdict
MUST_AGREE = ("suite", "prompt_list", "entries", "num_latent_frames", "temporal_stride", "fps", "seed")


class Compared(NamedTuple):
    """A metric: means of both; second minus first with its 95 % interval; standard deviation over videos; how many prompts and videos."""

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    spread: float
    prompts: int
    videos: int

    @property
    def verdict(self) -> str:
        """Which is better, where the interval excludes zero and the metric has a better side."""
        if self.prompts < MIN_PROMPTS:
            return "of too few prompts"
        if self.low <= 0 <= self.high:
            return "not told apart"
        if self.metric in NEITHER_IS_BETTER:
            return "more" if self.difference > 0 else "less"
        return "better" if (self.difference > 0) != (self.metric in LOWER_IS_BETTER) else "worse"


def check_paired(first: Prepared, second: Prepared, both: Sequence[Path]) -> None:
    """Raises ValueError unless each video of one folder has its counterpart in the other."""
    contents = first.content(), second.content()
    differ = [name for name in MUST_AGREE if contents[0][name] != contents[1][name]]
    if first.seed is None or second.seed is None:  # of other programs, whose noise is not known
        differ = [name for name in differ if name not in ("seed", "num_latent_frames", "temporal_stride", "fps")]
    if differ:
        raise ValueError(
            f"{both[0]} and {both[1]} cannot be compared video by video: they differ in {', '.join(differ)}; "
            "prepare both with the same suite, part, seed and length"
        )


def compare(first: Values, second: Values, prepared: Prepared, *, resamples: int = 10_000, seed: int = 0) -> list[Compared]:
    """Every metric that both have of the same videos; with all of VBench's dimensions Total, Quality and Semantic too.

    Raises:
        ValueError: when they have none in common, or not of the same videos.
    """
    if resamples < 100:
        raise ValueError(f"{resamples} resamples are too few for an interval; choose 100 or more")
    prompt_of = {name: number for number, entry in enumerate(prepared.entries) for name in names_of([entry])}
    weights = np.random.default_rng(seed).standard_exponential((resamples, len(prepared.entries)))
    rows: dict[str, Compared] = {}
    drawn: dict[str, np.ndarray] = {}  # metric -> resampled means of both, [2, R]
    for metric in first:
        if metric in second and (compared := _compare_metric(metric, first[metric], second[metric], prompt_of, weights)) is not None:
            rows[metric], drawn[metric] = compared
    if not rows:
        raise ValueError(
            f"nothing was measured on both: the first has {', '.join(first) or 'nothing'}, the second {', '.join(second) or 'nothing'}; "
            "`run` and `measure` both folders"
        )
    if drawn.keys() >= DIMENSIONS.keys():
        means = parts({name: np.array([rows[name].first, rows[name].second]) for name in DIMENSIONS})
        prompts, videos = max(rows[name].prompts for name in DIMENSIONS), sum(rows[name].videos for name in DIMENSIONS)
        for name, resampled in parts({name: drawn[name] for name in DIMENSIONS}).items():
            spread = float((resampled[1] - resampled[0]).std())
            rows[name] = _row(name, means[name], resampled, spread, prompts, videos)
    return list(rows.values())


def _compare_metric(
    metric: str, first: dict[str, float], second: dict[str, float], prompt_of: dict[str, int], weights: np.ndarray
) -> tuple[Compared, np.ndarray] | None:
    """A row, and the resampled means of both `[2, R]`; None when no video has a value in both."""
    if metric in OF_SOME_VIDEOS:
        first, second = ({name: by_video[name] for name in first if name in second} for by_video in (first, second))
    if first.keys() != second.keys():
        apart = sorted(first.keys() ^ second.keys())
        raise ValueError(f"{metric} was not measured on the same videos: {len(apart)} are in one folder only, {apart[0]} for example")
    if unexpected := [name for name in first if name not in prompt_of]:
        raise ValueError(f"{metric} was measured on {unexpected[0]}, which belongs to no prompt of the list")
    names = [name for name in first if not math.isnan(first[name]) and not math.isnan(second[name])]
    if not names:
        return None
    both = np.array([[by_video[name] for name in names] for by_video in (first, second)])
    prompts, place = np.unique([prompt_of[name] for name in names], return_inverse=True)
    sums = np.stack([np.bincount(place, model, minlength=len(prompts)) for model in both])  # [2, P]
    counts = np.bincount(place, minlength=len(prompts))
    drawn = weights[:, prompts]
    resampled = (drawn @ sums.T / (drawn @ counts)[:, None]).T
    return _row(metric, both.mean(axis=1), resampled, float(both.std(axis=1).mean()), len(prompts), len(names)), resampled


def _row(metric: str, means: np.ndarray, resampled: np.ndarray, spread: float, prompts: int, videos: int) -> Compared:
    first, second = means
    low, high = np.quantile(resampled[1] - resampled[0], [0.025, 0.975]) if prompts > 1 else (math.nan, math.nan)
    return Compared(metric, first, second, second - first, low, high, spread, prompts, videos)


def table(rows: Sequence[Compared], names: Sequence[str]) -> str:
    """Markdown."""
    head = ["metric", *names, "difference, 95 % interval", f"{names[1]} is", "prompts", "videos"]
    lines = []
    for row in rows:
        change = f"{row.difference:+.4g} [{row.low:+.4g}, {row.high:+.4g}]"
        lines.append([row.metric, f"{row.first:.4g}", f"{row.second:.4g}", change, row.verdict, str(row.prompts), str(row.videos)])
    return markdown_table(head, lines)


def write(rows: Sequence[Compared], names: Sequence[str], output: Path, about: dict[str, Any]) -> None:
    """Table, JSON and charts into the folder `output`."""
    title = f"{names[1]} minus {names[0]}"
    known = [{name: values.none_if_nan(value) for name, value in row._asdict().items()} | {"verdict": row.verdict} for row in rows]
    content = {**about, "names": list(names), "rows": known}
    write_json(output / "compared.json", content)
    write_text(output / "compared.md", f"# {title}\n\n{table(rows, names)}")
    shown = [
        charts.Difference(row.metric, row.difference / row.spread, row.low / row.spread, row.high / row.spread)
        for row in rows
        if row.spread > 0 and row.prompts > 1 and row.metric not in ("total", "quality", "semantic")
    ]
    if shown:
        label = "mean difference, in standard deviations over videos, with its 95 % interval"
        charts.differences(shown, output / "compared.png", title=title, x_label=label)
    dimensions = {row.metric: (row.first, row.second) for row in rows if row.metric in DIMENSIONS}
    if len(dimensions) >= charts.MIN_RADAR_AXES:
        both = {name: normalised({metric: means[i] for metric, means in dimensions.items()}) for i, name in enumerate(names)}
        charts.radar(both, output / "radar.png", title="VBench's dimensions, normalised")


def check_measured_alike(both: Sequence[Path], prepared: Sequence[Prepared]) -> None:
    """Raises ValueError when something was measured on other videos than the present ones, or not in the same way in both folders."""
    for folder, each in zip(both, prepared):
        if old := report.stale(folder, each):
            raise ValueError(f"{folder}: {old[0]}")
    for dimension in DIMENSIONS:
        runs = [vbench_run.read_run(folder, dimension) for folder in both]
        if all(runs):
            first, second = (run | {"vbench": run["environment"]["versions"]["vbench"]} for run in runs)
            names = [name for name in ("clip_seconds", "static_filter", "slow_fast", "vbench") if first[name] != second[name]]
            if apart := "; ".join(f"{name} {first[name]} and {second[name]}" for name in names):
                raise ValueError(f"{dimension} was not measured alike ({apart}); measure one of {both[0]} and {both[1]} again")
    clips = [about.get("clip_weights") for _, about in (values.read(folder, "clip_score") for folder in both) if about]
    if len(clips) == 2 and clips[0] != clips[1]:
        raise ValueError(f"the CLIP scores of {both[0]} and {both[1]} are of different CLIP models; measure one of them again")


def compare_folders(first: Path, second: Path, *, resamples: int) -> tuple[list[Compared], dict[str, Any]]:
    """Rows for two folders, and a record of their origin and of what was left out. Raises ValueError when they cannot be compared."""
    prepared = [load_prepared(folder) for folder in (first, second)]
    check_paired(prepared[0], prepared[1], (first, second))
    check_measured_alike((first, second), prepared)
    measured = [values.read_all(folder) for folder in (first, second)]
    rows = compare(measured[0], measured[1], prepared[0], resamples=resamples)
    about = {
        "measured_on_one_only": sorted(measured[0].keys() ^ measured[1].keys()),
        "folders": [str(first), str(second)],
        "models": [each.model for each in prepared],
        "weights": [each.weights for each in prepared],
        "interval": f"95 %, Bayesian bootstrap over prompts, {resamples} resamples",
    }
    return rows, about
