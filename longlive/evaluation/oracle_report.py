"""The miniature's oracle as an evaluation: does every video show what its prompt says, second after second, and does the rest stay.

Reads the mp4 files, as everybody else would have to. Knows nothing of the model.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longlive import video
from longlive.evaluation.folder import Prepared
from longlive.evaluation.suites import Entry
from longlive.evaluation.weightless import begun
from longlive.miniature import oracle
from longlive.miniature.captions import parse
from longlive.miniature.world import ATTRIBUTES, SIZE, Captioned

LASTING = 8  # images for which a new attribute must be seen without a break, to be there


class Seen(NamedTuple):
    """A video as the oracle saw it: `correct` `[T, 4]`, whether each image shows each attribute of the prompt in force (order of
    `ATTRIBUTES`); `radius` `[T]` in pixels, NaN without a subject; `iou` `[T]`, how much the subject is like a shape of the world."""

    correct: np.ndarray
    radius: np.ndarray
    iou: np.ndarray


def meanings(prepared: Prepared, entry: Entry) -> list[tuple[int, Captioned]]:
    """The image with which each prompt begins, and what it says. Raises ValueError for a prompt that is not of the miniature world."""
    found = []
    for first, prompt in begun(prepared.schedule_of(entry).cues):
        said = parse(prompt)
        if said.keys() != ATTRIBUTES.keys():
            raise ValueError(f'{entry.script.where}: "{prompt}" does not say all that the miniature world has')
        found.append((first, Captioned(**said)))
    return found


def read_small(path: Path) -> Tensor:
    """A video in the world's own size, uint8 `[T, 3, 64, 64]`: enlarged pixels become one again.

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


def look(path: Path, said: list[tuple[int, Captioned]]) -> Seen:
    """Read a video and hold it against what is said from which image on."""
    images = read_small(path)
    reading = oracle.read(images[None])
    ends = [first for first, _ in said[1:]] + [len(images)]
    in_force = [meaning for (first, meaning), end in zip(said, ends) for _ in range(first, end)]
    shown = {name: getattr(reading, name)[0] for name in ("shape", "color", "background")} | {"motion": reading.steady_motion(LASTING)[0]}
    columns = []
    for name, of_world in ATTRIBUTES.items():
        places = {value: number for number, value in enumerate(of_world)}
        wanted = torch.tensor([places[getattr(meaning, name)] for meaning in in_force])
        columns.append(shown[name] == wanted)
    return Seen(torch.stack(columns, -1).numpy(), reading.radius[0].numpy(), reading.iou[0].numpy())


def switch_seconds(seen: Seen, said: list[tuple[int, Captioned]], *, fps: float) -> float:
    """Mean time from a new prompt to the first of `LASTING` images in a row that show what it changed; all of its time when they never
    come, NaN without a switch."""
    waits = []
    ends = [first for first, _ in said[2:]] + [len(seen.correct)]
    for ((_, before), (first, after)), end in zip(itertools.pairwise(said), ends):
        changed = [number for number, name in enumerate(ATTRIBUTES) if getattr(before, name) != getattr(after, name)]
        there = np.asarray(seen.correct[first:end, changed].all(axis=1))
        runs = np.lib.stride_tricks.sliding_window_view(there, min(LASTING, len(there))).all(axis=1)
        waits.append((int(runs.argmax()) if runs.any() else len(there)) / fps)
    return float(np.mean(waits)) if waits else float("nan")


def metrics(seen: Seen, said: list[tuple[int, Captioned]], *, fps: float) -> dict[str, float]:
    """Of one video: shares of images that show each attribute, all of them (`adherence`: their mean; `all_right`: every one at once), in
    the last second too; how clear the subject is; how much its size, which no prompt says, has changed at the end."""
    second = max(1, round(fps))
    found = {f"{name}_right": float(seen.correct[:, number].mean()) for number, name in enumerate(ATTRIBUTES)}
    found["adherence"] = float(seen.correct.mean())
    found["all_right"] = float(seen.correct.all(axis=1).mean())
    found["adherence_last_second"] = float(seen.correct[-second:].mean())
    found["clearness"] = float(seen.iou.mean())
    begin, end = (_median(part) for part in (seen.radius[:second], seen.radius[-second:]))
    found["size_drift"] = abs(end / begin - 1)
    found["switch_seconds"] = switch_seconds(seen, said, fps=fps)
    return found


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def over_seconds(seen: Seen, *, fps: float) -> np.ndarray:
    """Shares of images that show each attribute, `[seconds, 4]`; what is left at the end counts when it is half a second or more."""
    second = max(1, round(fps))
    parts = [seen.correct[start : start + second] for start in range(0, len(seen.correct), second)]
    return np.stack([part.mean(axis=0) for part in parts if len(part) >= second / 2])


def report(folder_videos: dict[str, Path], prepared: Prepared) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Metrics by name and video; and adherence over time `[videos, seconds, 4]`, NaN where a video is over."""
    found: dict[str, dict[str, float]] = {}
    rows = []
    for entry in prepared.entries:
        said = meanings(prepared, entry)
        for sample in range(entry.samples):
            name = f"{entry.name}-{sample}"
            seen = look(folder_videos[name], said)
            for metric, value in metrics(seen, said, fps=prepared.fps).items():
                found.setdefault(metric, {})[name] = value
            rows.append(over_seconds(seen, fps=prepared.fps))
    longest = max(map(len, rows))
    padded = [np.concatenate([row, np.full((longest - len(row), len(ATTRIBUTES)), np.nan)]) for row in rows]
    return found, np.stack(padded)
