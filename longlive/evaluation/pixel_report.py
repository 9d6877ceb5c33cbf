"""Pixel metrics of video files: numbers, charts over time, and contact sheets with the prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from longlive import video
from longlive.evaluation import charts, pixel_metrics
from longlive.evaluation.folder import PromptStart
from longlive.evaluation.pixel_metrics import PixelMetrics, Traces
from longlive.files import read_json

TILES = 12


def prompts_beside(path: Path) -> list[PromptStart]:
    """When the prompts of a video begin: from the record of a prepared one, or the JSON file that the programs write beside it.

    Empty without either. Raises ValueError when the file says something else.
    """
    for record in (path.parent.parent / "records" / f"{path.stem}.json", path.with_suffix(".json")):
        if record.is_file():
            try:
                return [PromptStart(start["image"], start["prompt"]) for start in read_json(record)["prompts"]]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{record} does not say when prompts began: {error!r}") from error
    return []


def measure_file(path: Path, prompts: Sequence[PromptStart], *, block: int, pictures: Path | None = None) -> PixelMetrics:
    """Metrics of a file of blocks of `block` latent frames; `pictures`: a folder for a chart over time and a contact sheet.

    Raises:
        ValueError: when it cannot be read as a video.
    """
    try:
        fps = video.probe(path).fps or 16.0
        found = pixel_metrics.traces(video.images_of(path, as_opencv=True))
    except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if pictures is not None:
        draw_over_time(found, prompts, pictures / f"{path.stem}_over_time.png", title=path.stem, block=block, fps=fps)
        _contact_sheet(path, found.num_images, prompts, pictures / f"{path.stem}_sheet.png", fps=fps)
    return pixel_metrics.measure(found, switches=[start.image for start in prompts[1:]], block=block, fps=fps)


def draw_over_time(found: Traces, prompts: Sequence[PromptStart], path: Path, *, title: str, block: int, fps: float) -> None:
    """Change, colour drift, similarity to the sink and loops over time, with dashed lines where prompts begin."""
    seconds = [image / fps for image in range(found.num_images)]
    two_seconds = 2 * max(1, round(fps))
    starts = set(pixel_metrics.block_starts(found.num_images, block=block))
    into_blocks = [found.changes[image - 1] if image in starts else math.nan for image in range(found.num_images)]

    def every(values: np.ndarray) -> charts.Line:
        return charts.Line("every image", seconds[-len(values) :], values.tolist())

    changes = [every(found.changes), charts.Line("into a block's first image", seconds, into_blocks)]
    drift = [every(pixel_metrics.colour_drift(found, first=two_seconds))]
    sink = [every(pixel_metrics.sink_similarity(found))]
    loops = [every(pixel_metrics.loop_similarity(found, lag=two_seconds))]
    curves = [
        ("Change from image to image", "mean |difference|, 0–255", changes, None),
        ("Colour drift against the first two seconds", "distance of histograms, 0–1", drift, None),
        ("Similarity to the sink's images", "correlation, −1 to 1", sink, None),
        ("Went away and came back (two seconds or more)", "gain in correlation, 0–2", loops, (0.0, 2.0)),
    ]
    marks = {start.image / fps: start.prompt for start in prompts[1:]}
    panels = [charts.Panel(what, "seconds", y_label, lines, y_range, marks) for what, y_label, lines, y_range in curves]
    charts.over_time(panels, path, title=title)


def _contact_sheet(path: Path, num_images: int, prompts: Sequence[PromptStart], target: Path, *, fps: float) -> None:
    """Twelve images of a video, evenly spaced, each with its second and the prompt in force."""
    shown = video.evenly_spaced(num_images, TILES)
    in_force = [next((start.prompt for start in reversed(prompts) if start.image <= index), "") for index in shown]
    captions = [f"{index / fps:.1f} s\n{prompt}".strip() for index, prompt in zip(shown, in_force)]
    video.contact_sheet(video.read_images(path, shown), target, captions=captions, title=path.name)
