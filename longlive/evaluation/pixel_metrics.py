"""Metrics of a video's pixels alone, without weights: flicker (also between blocks and at switches), colour drift, motion, collapse, loops.

A video is read once, image by image, and reduced to `Traces`: memory does not grow with its pixels. Knows nothing about models or prompts,
only where blocks and switches are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from longlive.generation.dimensions import Timing

SINK_IMAGES = 9  # of three latent frames
THUMBNAIL = 32  # pixels along the longer side


class Traces(NamedTuple):
    """What is kept of a video of T images.

    `changes` `[T - 1]`: mean absolute difference of neighbouring images, on the scale 0..255. `histograms` `[T, 512]`: shares of the
    8 x 8 x 8 cells of the colour cube. `correlation` `[T, T]`: of the brightness of thumbnails of every two images, -1 to 1.
    """

    changes: np.ndarray
    histograms: np.ndarray
    correlation: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.histograms)


def traces(images: Iterable[np.ndarray]) -> Traces:
    """Read images, uint8 `[H, W, 3]`, one after the other.

    Raises:
        ValueError: when there are fewer than two, they are no such images, or not all of one size.
    """
    changes, histograms, thumbnails = [], [], []
    before: np.ndarray | None = None
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"images are uint8 [H, W, 3]; this is {image.dtype} {list(image.shape)}")
        if before is not None:
            if image.shape != before.shape:
                raise ValueError(f"an image of {image.shape[:2]} pixels in a video of {before.shape[:2]}")
            changes.append(np.abs(image.astype(np.int16) - before).mean())
        counts = np.bincount((image >> 5).reshape(-1, 3).astype(np.int64) @ np.array([64, 8, 1]), minlength=512)
        histograms.append((counts / counts.sum()).astype(np.float32))
        thumbnails.append(_thumbnail(image))
        before = image
    if len(histograms) < 2:
        raise ValueError("one image does not change; give at least two")
    flat = np.stack(thumbnails)
    return Traces(np.array(changes), np.stack(histograms), flat @ flat.T)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Brightness of a small copy as a vector of mean 0 and length 1; zeros for a uniform image."""
    height, width = image.shape[:2]
    reduce = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * reduce)), max(1, round(height * reduce))
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32).ravel()
    grey = grey - grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > 0 else grey


def temporal_flickering(found: Traces) -> float:
    """VBench's dimension of that name: (255 - mean change) / 255, 1 for a still video. Meant for videos that should stand still.

    The same to 1e-5 as `vbench` 0.1.5 when images are read as OpenCV reads them (`video.images_of(…, as_opencv=True)`).
    """
    return float((255.0 - found.changes.mean()) / 255.0)


def relative_change(found: Traces, firsts: Collection[int]) -> float:
    """Mean change into the images `firsts` (the first of a block, or of a prompt), over the median of all other changes; 1 is smooth.

    NaN where none of them lies within the video, or nothing else ever changes.
    """
    at = np.zeros(len(found.changes), dtype=bool)
    at[[first - 1 for first in firsts if 0 < first < found.num_images]] = True
    if not at.any() or at.all() or not (usual := float(np.median(found.changes[~at]))):
        return float("nan")
    return float(found.changes[at].mean() / usual)


def block_starts(num_images: int, *, block: int = 3) -> list[int]:
    """The first image of every block but the first, in a video of blocks of `block` latent frames."""
    timing = Timing(block=block)
    return list(range(timing.num_frames(block), num_images, timing.stride * block))


def colour_drift(found: Traces, *, first: int = 32) -> np.ndarray:
    """Distance of each image's colour histogram from the mean of the first ones, `[T]`, 0 (same) to 1 (nothing shared).

    Total variation: half the sum of absolute differences.
    """
    start = found.histograms[:first].mean(axis=0)
    return 0.5 * np.abs(found.histograms - start).sum(axis=1)


def sink_similarity(found: Traces, *, first: int = SINK_IMAGES) -> np.ndarray:
    """Correlation of each image with the most similar of the `first` ones (the sink's), `[T]`, -1 to 1.

    A model that collapses to its sink returns to values near 1 again and again although it should have moved on.
    """
    return found.correlation[:, :first].max(axis=1)


def loop_similarity(found: Traces, *, lag: int = 32) -> np.ndarray:
    """How far each image went away and came back, `[T]`, 0 to 2.

    Correlation with the most similar image at least `lag` before it, minus the lowest correlation with the images in between; 0 where a
    video only stands still or only moves on, and where there is no such past.
    """
    loops = np.zeros(found.num_images, dtype=np.float32)
    for now in range(lag, found.num_images):
        past = found.correlation[now, : now - lag + 1]
        match = int(past.argmax())
        loops[now] = max(0.0, past[match] - found.correlation[now, match:now].min())
    return loops


class PixelMetrics(NamedTuple):
    """Of one video. `block_flicker`, `switch_flicker`: 1 is smooth; `colour_drift`: of its last second; `sink_similarity`: mean beyond the
    sink; `loop_similarity`: highest; `motion`: mean change from image to image, on the scale 0..255."""

    images: int
    temporal_flickering: float
    block_flicker: float
    switch_flicker: float
    colour_drift: float
    sink_similarity: float
    loop_similarity: float
    motion: float


def measure(found: Traces, *, switches: Collection[int] = (), block: int = 3, fps: float = 16.0) -> PixelMetrics:
    """All metrics. `switches`: the images with which prompts begin, without the first prompt. `block`: latent frames per block; 1 when it
    is not known or the video was made at once, and then there is no flicker between blocks."""
    starts = [] if block == 1 else [start for start in block_starts(found.num_images, block=block) if start not in switches]
    second = max(1, round(fps))
    beyond = sink_similarity(found)[SINK_IMAGES:]
    return PixelMetrics(
        images=found.num_images,
        temporal_flickering=temporal_flickering(found),
        block_flicker=relative_change(found, starts),
        switch_flicker=relative_change(found, switches),
        colour_drift=float(colour_drift(found, first=2 * second)[-second:].mean()),
        sink_similarity=float(beyond.mean()) if len(beyond) else float("nan"),
        loop_similarity=float(loop_similarity(found, lag=2 * second).max()),
        motion=float(found.changes.mean()),
    )
