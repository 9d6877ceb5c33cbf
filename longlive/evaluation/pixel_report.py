"""Pixel metrics of video files: numbers, charts over time, and contact sheets with the prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longlive import video
from longlive.evaluation import charts, pixel_metrics
from longlive.evaluation.pixel_metrics import PixelMetrics, Traces
from longlive.evaluation.prepared import PromptStart
from longlive.files import read_json
from longlive.generation.dimensions import Timing

TILES = 12


def prompts_beside(path: Path) -> list[PromptStart]:
    """When the prompts of a video begin: from the record of a prepared one, or the JSON file that the programs write beside it.

    Empty without either. Raises ValueError when the file lacks a field.
    """
    for record in (path.parent.parent / "records" / f"{path.stem}.json", path.with_suffix(".json")):
        if record.is_file():
            try:
                return [PromptStart(start["image"], start["prompt"]) for start in read_json(record)["prompts"]]
            except (KeyError, TypeError) as error:
                raise ValueError(f'{record} has no field "prompts" with the frames where they begin: {error!r}') from error
    return []


def measure_file(path: Path, prompts: Sequence[PromptStart], timing: Timing, *, charts_folder: Path | None = None) -> PixelMetrics:
    """Metrics of a video file; `charts_folder`: where to draw a chart over time and a contact sheet. The rate is that of the file.

    Raises:
        ValueError: when it cannot be read as a video.
    """
    with video.readable(path):
        timing = dataclasses.replace(timing, fps=video.probe(path).fps or timing.fps)
        traces = pixel_metrics.reduce_video(video.images_of(path, as_opencv=True))
    if charts_folder is not None:
        draw_over_time(traces, prompts, charts_folder / f"{path.stem}_over_time.png", title=path.stem, timing=timing)
        _contact_sheet(path, traces.num_frames, prompts, charts_folder / f"{path.stem}_sheet.png", fps=timing.fps)
    return pixel_metrics.measure(traces, switches=[start.image for start in prompts[1:]], timing=timing)


def draw_over_time(traces: Traces, prompts: Sequence[PromptStart], path: Path, *, title: str, timing: Timing) -> None:
    """Change, colour drift, similarity to the sink and loops over time, with dashed lines where prompts begin."""
    seconds = [frame / timing.fps for frame in range(traces.num_frames)]
    two_seconds = 2 * max(1, round(timing.fps))
    starts = set(pixel_metrics.block_starts(traces.num_frames, timing))
    into_blocks = [traces.changes[frame - 1] if frame in starts else math.nan for frame in range(traces.num_frames)]

    def every(values: np.ndarray) -> charts.Line:
        return charts.Line("every frame", seconds[-len(values) :], values.tolist())

    changes = [every(traces.changes), charts.Line("into a block's first frame", seconds, into_blocks)]
    drift = [every(pixel_metrics.colour_drift(traces, first=two_seconds))]
    sink = [every(pixel_metrics.sink_similarity(traces))]
    loops = [every(pixel_metrics.loop_similarity(traces, lag=two_seconds))]
    curves = [
        ("Change from frame to frame", "mean |difference|, 0–255", changes, None),
        ("Colour drift against the first two seconds", "distance of histograms, 0–1", drift, None),
        ("Similarity to the sink's frames", "correlation, −1 to 1", sink, None),
        ("Went away and came back (two seconds or more)", "gain in correlation, 0–2", loops, (0.0, 2.0)),
    ]
    marks = {start.image / timing.fps: start.prompt for start in prompts[1:]}
    panels = [charts.Panel(what, "seconds", y_label, lines, y_range, marks) for what, y_label, lines, y_range in curves]
    charts.over_time(panels, path, title=title)


def _contact_sheet(path: Path, num_frames: int, prompts: Sequence[PromptStart], target: Path, *, fps: float) -> None:
    """Twelve frames of a video, evenly spaced, each with its second and the active prompt."""
    shown = video.evenly_spaced(num_frames, TILES)
    in_force = [next((start.prompt for start in reversed(prompts) if start.image <= index), "") for index in shown]
    captions = [f"{index / fps:.1f} s\n{prompt}".strip() for index, prompt in zip(shown, in_force)]
    video.contact_sheet(video.read_images(path, shown), target, captions=captions, title=path.name)
