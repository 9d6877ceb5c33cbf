"""Measures without weights on files and folders: numbers, a plot over time and a contact sheet with the prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import av

from longlive import video
from longlive.evaluation import charts, metrics
from longlive.evaluation import folder as folders
from longlive.evaluation.metrics import Measured, Traces
from longlive.generation.cues import Cue
from longlive.generation.dimensions import Timing

TILES = 12


class Begun(NamedTuple):
    """A prompt, and the image with which it begins."""

    image: int
    prompt: str


def begun(cues: Iterable[Cue]) -> list[Begun]:
    """The images with which cues begin: frame F of them have 4 F - 3 images."""
    return [Begun(Timing().num_frames(cue.latent_frame) if cue.latent_frame else 0, cue.prompt) for cue in cues]


def prompts_beside(path: Path) -> list[Begun]:
    """From the JSON file that the programs leave beside a video, or the record of a prepared one; none without it. Raises ValueError when
    it says something else."""
    record = path.parent.parent / "records" / f"{path.stem}.json"
    if record.is_file():
        try:
            return begun([Cue(cue["frame"], cue["prompt"]) for cue in folders.read_json(record).get("cues", [])])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{record} does not say when prompts began: {error!r}") from error
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return []
    try:
        return [Begun(entry["image"], entry["prompt"]) for entry in json.loads(beside.read_text(encoding="utf-8"))["prompts"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} does not say when prompts began: {error!r}") from error


def trace_file(path: Path) -> tuple[Traces, float]:
    """Of a video file, read as OpenCV reads it; and its images a second. Raises ValueError when it cannot be read."""
    try:
        fps = video.probe(path).fps or 16.0
        return metrics.traces(video.images_of(path, as_opencv=True)), fps
    except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def measure_file(path: Path, prompts: Sequence[Begun], *, block: int, pictures: Path | None = None) -> Measured:
    """Measures of a file; `pictures`: a folder for a plot over time and a contact sheet."""
    found, fps = trace_file(path)
    switches = [one.image for one in prompts[1:]]
    if pictures is not None:
        plot(found, prompts, pictures / f"{path.stem}_over_time.png", title=path.stem, block=block, fps=fps)
        sheet(path, found.num_images, prompts, pictures / f"{path.stem}_sheet.png", fps=fps)
    return metrics.measure(found, switches=switches, block=block, fps=fps)


def plot(found: Traces, prompts: Sequence[Begun], path: Path, *, title: str, block: int, fps: float) -> None:
    """Change, colour drift, likeness to the sink and loops over time, with dashed lines where prompts begin."""
    seconds = [image / fps for image in range(found.num_images)]
    marks = {one.image / fps: one.prompt for one in prompts[1:]}
    borders = metrics.block_borders(found.num_images, block=block)
    at_borders = [found.changes[border - 1] if border in set(borders) else math.nan for border in range(found.num_images)]
    second = max(1, round(fps))
    panels = [
        charts.Panel(
            "Change from image to image",
            "seconds",
            "mean |difference|, 0–255",
            [
                charts.Line("every image", seconds[1:], found.changes.tolist()),
                charts.Line("into a block's first image", seconds, at_borders),
            ],
            None,
            marks,
        ),
        charts.Panel(
            "Colour drift against the first two seconds",
            "seconds",
            "distance of histograms, 0–1",
            [charts.Line("every image", seconds, metrics.colour_drift(found, first=2 * second).tolist())],
            None,
            marks,
        ),
        charts.Panel(
            "Likeness to the sink's images",
            "seconds",
            "correlation, −1 to 1",
            [charts.Line("every image", seconds, metrics.sink_similarity(found).tolist())],
            None,
            marks,
        ),
        charts.Panel(
            "Went away and came back (two seconds or more)",
            "seconds",
            "gain in correlation, 0–2",
            [charts.Line("every image", seconds, metrics.loop_similarity(found, lag=2 * second).tolist())],
            (0.0, 2.0),
            marks,
        ),
    ]
    charts.over_time(panels, path, title=title)


def sheet(path: Path, num_images: int, prompts: Sequence[Begun], target: Path, *, fps: float) -> None:
    """Twelve images of a video, evenly spaced, each with its second and the prompt in force."""
    shown = video.evenly_spaced(num_images, TILES)
    captions = []
    for index in shown:
        in_force = [one.prompt for one in prompts if one.image <= index]
        captions.append(f"{index / fps:.1f} s\n{in_force[-1] if in_force else ''}".strip())
    video.contact_sheet(video.read_images(path, shown), target, captions=captions, title=path.name)
