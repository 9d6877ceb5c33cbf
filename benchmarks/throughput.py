"""How fast is a video made? `python benchmarks/throughput.py --size 1.3b --output result.json`; prints a table, then one JSON line.

A pipeline of random weights makes an ordinary session: once to warm up, once to be measured, and only blocks that see a
full window count. The parts of a block are the session's own seconds, whose clock waits for the device. The prompts are
read by a stand-in of one layer, as wide as the model's text: the speed of a text encoder is not measured here.

`--engine` says how the transformer runs: `reference` is the plain way (benchmarks/reference.py, with an unmerged LoRA), `eager` the
package as it is, `compiled` and `graphs` what `accelerate` makes of it. All are measured in the same way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flops import PEAK_TFLOPS, flops_of_block
from machine import Setup, clocks_under_load, describe, memory_in_use, peak_memory, report
from random_model import ENGINES, accelerate, build

from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.session import Session
from longlive.generation.stream import BlockSeconds
from longlive.models.zoo import ZOO
from longlive.ops import attention

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPTS = ("a red circle moving right on a black background", "a blue square moving up on a white background")


class Spread(NamedTuple):
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(*values * 3)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


class Lap(NamedTuple):
    """One block: wall seconds until its images were in host memory and the cache was written, its parts, and its number of images."""

    wall: float
    parts: BlockSeconds
    num_images: int
    switched: bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Milliseconds are per block with a full window; FPS are pixel frames per second at the median block.

    `warm_up_s`: the whole first video, compilation and recording included. `flat_ratio`: the median of the last tenth of the steady
    blocks over that of the first tenth. `memory_growth_bytes`: what is allocated after the steady blocks and was not before.
    """

    blocks: int
    warm_up_s: float
    block_ms: Spread
    denoise_ms: Spread
    remember_ms: Spread
    decode_ms: Spread
    network_fps: float
    end_to_end_fps: float
    first_images_ms: float
    first_images_cold_ms: float
    switches: int
    switch_recache_ms: float
    switch_block_ms: float
    switch_block_worst_ms: float
    flat_ratio: float
    memory_growth_bytes: int
    block_tflop: float
    network_tflops: float
    clocks: dict[str, str] | None


def laps(session: Session) -> Iterator[Lap]:
    began = time.perf_counter()
    for block in session:
        yield Lap(time.perf_counter() - began, block.seconds, block.images.shape[0] * block.images.shape[1], block.switched)
        began = time.perf_counter()


def flatness(seconds: list[float]) -> float:
    """The median of the last tenth over that of the first tenth."""
    tenth = max(1, len(seconds) // 10)
    return statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth])


def steady_laps(running: Iterator[Lap], blocks: int, max_seconds: float | None) -> list[Lap]:
    """`blocks` laps, or as many as `max_seconds` allow, at least one."""
    began, laps = time.perf_counter(), [next(running)]
    while len(laps) < blocks and (max_seconds is None or time.perf_counter() - began < max_seconds):
        laps.append(next(running))
    return laps


def measure(
    pipe: LongLivePipeline, *, height: int, width: int, blocks: int, switches: int, seed: int = 0, max_seconds: float | None = None
) -> Speed:
    """Warm up with a video that fills the window and switches its prompt, then time a second one."""
    info = pipe.info
    filling = -(-info.window // info.block) + 1  # from this block on every one overwrites a frame of a full window

    def start() -> tuple[Session, Iterator[Lap], float]:
        began = time.perf_counter()
        session = pipe.session(PROMPTS[0], height=height, width=width, generator=torch.Generator().manual_seed(seed))
        running = laps(session)
        next(running)
        return session, running, time.perf_counter() - began

    def switch(session: Session, running: Iterator[Lap], number: int) -> Lap:
        session.prompt(PROMPTS[(number + 1) % len(PROMPTS)])
        lap = next(running)
        assert lap.switched
        return lap

    began = time.perf_counter()
    session, running, cold = start()
    for _ in range(filling + 1):
        next(running)
    switch(session, running, 0)
    next(running)
    warm_up = time.perf_counter() - began
    del session, running

    session, running, first = start()
    for _ in range(filling):
        next(running)
    before = memory_in_use(pipe.transformer.device)
    steady = steady_laps(running, blocks, max_seconds)
    growth = memory_in_use(pipe.transformer.device) - before
    clocks = clocks_under_load(pipe.transformer.device, lambda: next(running))
    switched = []
    for number in range(switches):
        switched.append(switch(session, running, number))
        next(running)

    times = {"warm_up_s": warm_up, "first_images_ms": 1000 * first, "first_images_cold_ms": 1000 * cold}
    flops = flops_per_block(pipe, height=height, width=width)
    return speed_of(steady, switched, flops=flops, memory_growth_bytes=growth, clocks=clocks, **times)


def flops_per_block(pipe: LongLivePipeline, *, height: int, width: int) -> int:
    """Of the transformer, for a video of `height` x `width` pixels."""
    info = pipe.info
    stride = info.spatial_stride // pipe.transformer.config.patch_size[1]
    rows, columns, steps = height // stride, width // stride, len(info.denoising_steps)
    return flops_of_block(pipe.transformer, height=rows, width=columns, block=info.block, window=info.window, steps=steps)


def speed_of(steady: list[Lap], switched: list[Lap], *, flops: int, **measured: Any) -> Speed:
    """`steady`: laps that count; `switched`: those that begin a prompt; `measured`: fields of `Speed` that do not follow from them."""

    def milliseconds(part: str) -> Spread:
        return Spread.of([1000 * getattr(lap.parts, part) for lap in steady])

    network = statistics.median(lap.parts.network for lap in steady)
    wall = statistics.median(lap.wall for lap in steady)
    return Speed(
        blocks=len(steady),
        block_ms=Spread.of([1000 * lap.wall for lap in steady]),
        denoise_ms=milliseconds("denoise"),
        remember_ms=milliseconds("remember"),
        decode_ms=milliseconds("decode"),
        network_fps=steady[0].num_images / network,
        end_to_end_fps=steady[0].num_images / wall,
        switch_recache_ms=1000 * statistics.median(lap.parts.switch for lap in switched),
        switches=len(switched),
        switch_block_ms=1000 * statistics.median(lap.wall for lap in switched),
        switch_block_worst_ms=1000 * max(lap.wall for lap in switched),
        flat_ratio=flatness([lap.wall for lap in steady]),
        block_tflop=flops / 1e12,
        network_tflops=flops / network / 1e12,
        **measured,
    )
