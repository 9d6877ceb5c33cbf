"""The miniature's oracle as an evaluation: whether every second of a video shows what its prompt describes, and the subject keeps its size.

It reads the mp4 files, not the model's output.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longlive import video
from longlive.evaluation import charts, report, values
from longlive.evaluation.prepared import PlannedVideo, Prepared, video_path
from longlive.evaluation.suites import Entry
from longlive.miniature import oracle
from longlive.miniature.captions import parse
from longlive.miniature.world import ATTRIBUTES, SIZE, Captioned

Captions = list[tuple[int, Captioned]]
"""The frame with which each prompt of a video begins, and the attributes that it describes."""

MIN_RUN = 8  # consecutive frames that must show a new attribute before it counts as shown


class Seen(NamedTuple):
    """A video as the oracle saw it: `correct` `[T, 4]`, whether each frame shows each attribute of the active prompt (order of
    `ATTRIBUTES`); `radius` `[T]` in pixels, NaN without a subject; `iou` `[T]` of the subject with the most similar shape of the world."""

    correct: np.ndarray
    radius: np.ndarray
    iou: np.ndarray


def captions_of(prepared: Prepared, entry: Entry) -> Captions:
    """The captions of an entry's videos. Raises ValueError for a prompt outside the miniature world."""
    captions = []
    for first, prompt in prepared.prompt_starts(entry):
        attributes = parse(prompt)
        if missing := [name for name in ATTRIBUTES if name not in attributes]:
            raise ValueError(f'{entry.script.where}: "{prompt}" lacks {", ".join(missing)} of the miniature world')
        captions.append((first, Captioned(**attributes)))
    return captions


def read_small(path: Path) -> Tensor:
    """A video in the world's own size, uint8 `[T, 3, 64, 64]`: every enlarged pixel becomes one pixel again.

    Raises:
        ValueError: when it is not an enlargement of the world.
    """
    images = video.read_video(path)
    height, width = images.shape[1:3]
    if height != width or height % SIZE:
        raise ValueError(f"{path} has {height}x{width} pixels; the oracle reads {SIZE}x{SIZE} and whole multiples of it")
    scale = height // SIZE
    small = images.reshape(len(images), SIZE, scale, SIZE, scale, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    return torch.from_numpy(small).permute(0, 3, 1, 2)


def look(path: Path, captions: Captions) -> Seen:
    """Read a video and compare each frame with the active caption."""
    images = read_small(path)
    reading = oracle.read(images[None])
    ends = [first for first, _ in captions[1:]] + [len(images)]
    in_force = [caption for (first, caption), end in zip(captions, ends) for _ in range(first, end)]
    shown = {name: getattr(reading, name)[0] for name in ("shape", "color", "background")} | {"motion": reading.steady_motion(MIN_RUN)[0]}
    wanted = {name: torch.tensor([list(known).index(getattr(each, name)) for each in in_force]) for name, known in ATTRIBUTES.items()}
    correct = torch.stack([shown[name] == wanted[name] for name in ATTRIBUTES], -1)
    return Seen(correct.numpy(), reading.radius[0].numpy(), reading.iou[0].numpy())


def switch_seconds(seen: Seen, captions: Captions, *, fps: float) -> float:
    """Mean seconds from a new prompt to the first of `MIN_RUN` consecutive frames that show what it changed; the prompt's whole duration
    when they never come; NaN without a switch."""
    waits = []
    ends = [first for first, _ in captions[2:]] + [len(seen.correct)]
    for ((_, before), (first, after)), end in zip(itertools.pairwise(captions), ends):
        changed = [number for number, name in enumerate(ATTRIBUTES) if getattr(before, name) != getattr(after, name)]
        correct = np.asarray(seen.correct[first:end, changed].all(axis=1))
        runs = np.lib.stride_tricks.sliding_window_view(correct, min(MIN_RUN, len(correct))).all(axis=1)
        waits.append((int(runs.argmax()) if runs.any() else len(correct)) / fps)
    return float(np.mean(waits)) if waits else float("nan")


def metrics(seen: Seen, captions: Captions, *, fps: float) -> dict[str, float]:
    """Metrics of one video: shares of frames that show each attribute, their mean (`adherence`, also of the last second) and all at once
    (`all_right`); `clearness`: mean IoU of the subject; `size_drift`: relative change of its size, which no prompt mentions."""
    second = max(1, round(fps))
    return {
        **{f"{name}_right": float(seen.correct[:, number].mean()) for number, name in enumerate(ATTRIBUTES)},
        "adherence": float(seen.correct.mean()),
        "all_right": float(seen.correct.all(axis=1).mean()),
        "adherence_last_second": float(seen.correct[-second:].mean()),
        "clearness": float(seen.iou.mean()),
        "size_drift": abs(_median(seen.radius[-second:]) / _median(seen.radius[:second]) - 1),
        "switch_seconds": switch_seconds(seen, captions, fps=fps),
    }


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def over_seconds(seen: Seen, *, fps: float) -> np.ndarray:
    """Shares of frames that show each attribute, `[seconds, 4]`; a rest at the end counts when it is half a second or more."""
    second = max(1, round(fps))
    parts = [seen.correct[start : start + second] for start in range(0, len(seen.correct), second)]
    return np.stack([part.mean(axis=0) for part in parts if len(part) >= second / 2])


def run(folder: Path, prepared: Prepared) -> None:
    """Measure all videos of a folder and write `results/oracle.json`, and a chart of adherence over time.

    The JSON file has adherence over time `[videos, seconds, 4]`, null after the end of a video, beside the metrics.

    Raises:
        ValueError: for a prompt outside the miniature world, or a video that is not an enlargement of it.
    """
    rows = []

    def measure(planned: PlannedVideo) -> dict[str, float]:
        captions = captions_of(prepared, planned.entry)
        seen = look(video_path(folder, planned.name), captions)
        rows.append(over_seconds(seen, fps=prepared.fps))
        return metrics(seen, captions, fps=prepared.fps)

    measured = values.collect(prepared, measure)
    longest = max(map(len, rows))
    adherence = np.stack([np.pad(row, ((0, longest - len(row)), (0, 0)), constant_values=np.nan) for row in rows])
    over_time = [[[values.none_if_nan(round(share, 4)) for share in second] for second in row] for row in adherence.tolist()]
    values.write(folder, "oracle", measured, {**values.measured_on(folder, prepared), "adherence_over_seconds": over_time})
    _draw(adherence, prepared, folder / "results" / "adherence.png")


def _draw(adherence: np.ndarray, prepared: Prepared, path: Path) -> None:
    """Draws the share of frames that show each attribute, `[videos, seconds, 4]`, with 95 % intervals over videos."""
    seconds = np.arange(adherence.shape[1]) + 0.5
    lines = []
    for number, name in enumerate(ATTRIBUTES):
        shown = 100 * adherence[:, :, number]
        mean, count = np.nanmean(shown, axis=0), np.maximum((~np.isnan(shown)).sum(axis=0), 1)
        margin = 1.96 * np.nanstd(shown, axis=0) / np.sqrt(count)
        low, high = (np.clip(mean + sign * margin, 0, 100).tolist() for sign in (-1, 1))
        lines.append(charts.Line(name, seconds.tolist(), mean.tolist(), low, high))
    marks = {start.image / prepared.fps: "next prompt" for start in prepared.prompt_starts(prepared.entries[0])[1:]}
    panel = charts.Panel("Frames that show what the active prompt describes", "seconds", "percent", lines, (0.0, 103.0), marks)
    charts.over_time([panel], path, title=f"{report.name_of(prepared)}, {len(adherence)} videos", columns=1)
