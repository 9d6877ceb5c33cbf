"""Metrics of a video's pixels alone, without weights: flicker (also between blocks and at switches), colour drift, motion, collapse, loops.

A video is read once, frame by frame, and reduced to `Traces`: memory does not grow with its pixels. Of prompts and model only the
positions of switches and blocks are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from longlive.generation.dimensions import Timing

SINK_FRAMES = 9  # of three latent frames
THUMBNAIL = 32  # pixels along the longer side
TIMING = Timing()


class Traces(NamedTuple):
    """A video of T frames, reduced to what the metrics need.

    `changes` `[T - 1]`: mean absolute difference of neighbouring frames, on the scale 0..255. `histograms` `[T, 512]`: shares of the
    8 x 8 x 8 cells of the colour cube. `correlation` `[T, T]`: of the brightness of thumbnails of every two frames, -1 to 1.
    """

    changes: np.ndarray
    histograms: np.ndarray
    correlation: np.ndarray

    @property
    def num_frames(self) -> int:
        return len(self.histograms)


def reduce_video(images: Iterable[np.ndarray]) -> Traces:
    """Read frames, uint8 `[H, W, 3]`, one after the other.

    Raises:
        ValueError: when there are fewer than two, they have another type or shape, or differ in size.
    """
    changes, histograms, thumbnails = [], [], []
    before: np.ndarray | None = None
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"frames are uint8 [H, W, 3]; this is {image.dtype} {list(image.shape)}")
        if before is not None:
            if image.shape != before.shape:
                raise ValueError(f"a frame of {image.shape[:2]} pixels in a video of {before.shape[:2]}")
            changes.append(np.abs(image.astype(np.int16) - before).mean())
        counts = np.bincount((image >> 5).reshape(-1, 3).astype(np.int64) @ np.array([64, 8, 1]), minlength=512)
        histograms.append((counts / counts.sum()).astype(np.float32))
        thumbnails.append(_thumbnail(image))
        before = image
    if len(histograms) < 2:
        raise ValueError("a video of one frame has no changes; give at least two")
    flat = np.stack(thumbnails)
    return Traces(np.array(changes), np.stack(histograms), flat @ flat.T)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Brightness of a small copy as a vector of mean 0 and length 1; zeros for a uniform frame."""
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32).ravel()
    grey = grey - grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > 0 else grey


def temporal_flickering(traces: Traces) -> float:
    """VBench's dimension of that name: (255 - mean change) / 255, 1 for a still video. Meant for videos that should stand still.

    The same to 1e-5 as `vbench` 0.1.5 when frames are read as OpenCV reads them (`video.images_of(…, as_opencv=True)`).
    """
    return float((255.0 - traces.changes.mean()) / 255.0)


def relative_change(traces: Traces, firsts: Collection[int]) -> float:
    """Mean change into the frames `firsts` (the first of a block, or of a prompt), over the median of all other changes; 1 is smooth.

    NaN when none of them lies within the video, or the median is zero.
    """
    at = np.zeros(len(traces.changes), dtype=bool)
    at[[first - 1 for first in firsts if 0 < first < traces.num_frames]] = True
    if not at.any() or at.all() or not (median := float(np.median(traces.changes[~at]))):
        return float("nan")
    return float(traces.changes[at].mean() / median)


def block_starts(num_frames: int, timing: Timing = TIMING) -> list[int]:
    """The first frame of every block but the first."""
    return list(range(timing.num_frames(timing.block), num_frames, timing.stride * timing.block))


def colour_drift(traces: Traces, *, first: int = 32) -> np.ndarray:
    """Distance of each frame's colour histogram from the mean of the first ones, `[T]`, 0 (same) to 1 (nothing shared).

    Total variation: half the sum of absolute differences.
    """
    start = traces.histograms[:first].mean(axis=0)
    return 0.5 * np.abs(traces.histograms - start).sum(axis=1)


def sink_similarity(traces: Traces, *, first: int = SINK_FRAMES) -> np.ndarray:
    """Correlation of each frame with the most similar of the `first` ones (the sink's), `[T]`, -1 to 1.

    A model that collapses to its sink returns to values near 1 again and again although it should have moved on.
    """
    return traces.correlation[:, :first].max(axis=1)


def loop_similarity(traces: Traces, *, lag: int = 32) -> np.ndarray:
    """How far each frame went away and came back, `[T]`, 0 to 2.

    Correlation with the most similar frame at least `lag` before it, minus the lowest correlation with the frames in between; 0 where a
    video only stands still or only moves on, and where there is no such past.
    """
    loops = np.zeros(traces.num_frames, dtype=np.float32)
    for now in range(lag, traces.num_frames):
        past = traces.correlation[now, : now - lag + 1]
        match = int(past.argmax())
        loops[now] = max(0.0, past[match] - traces.correlation[now, match:now].min())
    return loops


class PixelMetrics(NamedTuple):
    """Metrics of one video. `images`: number of frames; `block_flicker`, `switch_flicker`: 1 is smooth; `colour_drift`: of its last second;
    `sink_similarity`: mean beyond the sink; `loop_similarity`: highest; `motion`: mean change per frame, on the scale 0..255."""

    images: int
    temporal_flickering: float
    block_flicker: float
    switch_flicker: float
    colour_drift: float
    sink_similarity: float
    loop_similarity: float
    motion: float


def measure(traces: Traces, *, switches: Collection[int] = (), timing: Timing = TIMING) -> PixelMetrics:
    """All metrics. `switches`: the frames with which prompts begin, without the first prompt. A `timing` whose block is 1 means that the
    blocks are not known, or that the video was generated at once; then there is no flicker between blocks."""
    starts = [] if timing.block == 1 else [start for start in block_starts(traces.num_frames, timing) if start not in switches]
    second = max(1, round(timing.fps))
    beyond = sink_similarity(traces)[SINK_FRAMES:]
    return PixelMetrics(
        images=traces.num_frames,
        temporal_flickering=temporal_flickering(traces),
        block_flicker=relative_change(traces, starts),
        switch_flicker=relative_change(traces, switches),
        colour_drift=float(colour_drift(traces, first=2 * second)[-second:].mean()),
        sink_similarity=float(beyond.mean()) if len(beyond) else float("nan"),
        loop_similarity=float(loop_similarity(traces, lag=2 * second).max()),
        motion=float(traces.changes.mean()),
    )
