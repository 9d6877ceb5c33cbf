"""Measures of a video that need no weights: flicker, also where blocks meet and prompts switch, colour drift, motion, collapse.

Images are uint8 `[T, H, W, 3]`. Knows nothing about models or prompts, only where blocks and switches are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Images = np.ndarray


def changes(images: Images) -> np.ndarray:
    """Mean absolute difference of neighbouring images, `[T - 1]`, in steps of 0..255.

    Raises:
        ValueError: when there are fewer than two images, or they are no uint8 `[T, H, W, 3]`.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are uint8 [T, H, W, 3]; these are {images.dtype} {list(images.shape)}")
    if len(images) < 2:
        raise ValueError("one image does not change; give at least two")
    return np.array([np.abs(two.astype(np.int16) - one).mean() for one, two in itertools.pairwise(images)])


def temporal_flickering(images: Images) -> float:
    """VBench's dimension of that name: (255 - mean change) / 255, 1 for a still video. Meant for videos that should stand still."""
    return float((255.0 - changes(images).mean()) / 255.0)


def border_flicker(images: Images, borders: Sequence[int]) -> float:
    """Mean change into the images at `borders` (the first of a block, or of a prompt), over the median of all other changes: 1 is smooth.

    NaN where there is no border within the video, or nothing else ever changes.
    """
    step = changes(images)
    at = np.zeros(len(step), dtype=bool)
    at[[border - 1 for border in borders if 0 < border < len(images)]] = True
    if not at.any() or at.all() or not (usual := float(np.median(step[~at]))):
        return float("nan")
    return float(step[at].mean() / usual)


def block_borders(num_images: int, *, block: int = 3, stride: int = 4) -> list[int]:
    """The first image of every block but the first, of a video of blocks of `block` latent frames: 4 F - 3 images are F frames."""
    return list(range(stride * block - (stride - 1), num_images, stride * block))


def colour_drift(images: Images, *, first: int = 32) -> np.ndarray:
    """How far each image's colours are from those of the first ones, `[T]`: distance of the histograms, 0 (same) to 1 (nothing shared).

    The colour cube is cut into 8 x 8 x 8; the distance is half the sum of absolute differences (total variation).
    """
    histograms = np.stack([_histogram(image) for image in images])
    start = histograms[:first].mean(axis=0)
    return 0.5 * np.abs(histograms - start).sum(axis=1)


def _histogram(image: np.ndarray) -> np.ndarray:
    cells = (image >> 5).reshape(-1, 3).astype(np.int64)
    counts = np.bincount(cells @ np.array([64, 8, 1]), minlength=512)
    return counts / counts.sum()


def sink_similarity(images: Images, *, first: int = 9) -> np.ndarray:
    """How much each image is like the most similar of the `first` ones (the sink's), `[T]`: correlation of brightness, -1 to 1.

    A model that collapses to its sink comes back to values near 1 again and again although it should have moved on.
    """
    flat = images.astype(np.float32).mean(axis=-1).reshape(len(images), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = flat / np.where(norms > 0, norms, 1)
    return (flat @ flat[:first].T).max(axis=1)


class Measured(NamedTuple):
    """One video. `block_flicker`, `switch_flicker`: 1 is smooth; `colour_drift`: of its last second; `sink_similarity`: mean beyond the
    sink; `motion`: mean change from image to image in 0..255."""

    images: int
    temporal_flickering: float
    block_flicker: float
    switch_flicker: float
    colour_drift: float
    sink_similarity: float
    motion: float


def measure(images: Images, *, switches: Sequence[int] = (), block: int = 3, fps: float = 16.0) -> Measured:
    """All of them. `switches`: images at which a prompt begins, the first prompt aside."""
    step = changes(images)
    borders = [border for border in block_borders(len(images), block=block) if border not in set(switches)]
    second = max(1, round(fps))
    return Measured(
        images=len(images),
        temporal_flickering=float((255.0 - step.mean()) / 255.0),
        block_flicker=border_flicker(images, borders),
        switch_flicker=border_flicker(images, switches),
        colour_drift=float(colour_drift(images)[-second:].mean()),
        sink_similarity=float(sink_similarity(images)[9:].mean()) if len(images) > 9 else float("nan"),
        motion=float(step.mean()),
    )
