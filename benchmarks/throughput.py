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


def utilisation(speed: Speed, setup: Setup) -> float | None:
    """Fraction of the GPU's peak rate; None when that is not known."""
    peak = PEAK_TFLOPS.get(setup.device) if setup.dtype != "float32" else None
    return None if peak is None else speed.network_tflops / peak


def table(setup: Setup, speed: Speed, memory: int, used: float | None) -> str:
    def spread(values: Spread) -> str:
        return f"{values.median:10.1f} {values.p10:10.1f} {values.p90:10.1f}"

    clocks = "" if speed.clocks is None else ", ".join(f"{name} {value}" for name, value in speed.clocks.items())
    share = "" if used is None else f"   ({used:.1%} of {PEAK_TFLOPS[setup.device]})"
    lines = [
        f"{setup.size} at {setup.height}x{setup.width}, {setup.dtype}, attention {setup.attention}",
        f"window {setup.window} (sink {setup.sink}), block {setup.block}, {len(setup.steps)}+1 passes",
        f"{setup.device} | {setup.machine}",
        f"torch {setup.torch}, CUDA {setup.cuda}, cuDNN {setup.cudnn} | commit {setup.commit}",
        *([clocks] if clocks else []),
        "",
        f"{f'ms per block, of {speed.blocks}':24} {'median':>10} {'p10':>10} {'p90':>10}",
        f"{'whole':24} {spread(speed.block_ms)}",
        f"{'  denoise':24} {spread(speed.denoise_ms)}",
        f"{'  remember':24} {spread(speed.remember_ms)}",
        f"{'  decode':24} {spread(speed.decode_ms)}",
        "",
        f"{'FPS, transformer only':32} {speed.network_fps:10.2f}",
        f"{'FPS, pixels in host memory':32} {speed.end_to_end_fps:10.2f}",
        f"{'warm-up video, s':32} {speed.warm_up_s:10.1f}   (compilation and recording included)",
        f"{'first images, ms':32} {speed.first_images_ms:10.1f}   (the first video of the process: {speed.first_images_cold_ms:.1f})",
        f"{'prompt switch, recache, ms':32} {speed.switch_recache_ms:10.1f}",
        f"{'prompt switch, whole block, ms':32} {speed.switch_block_ms:10.1f}",
        f"{'last blocks over first ones':32} {speed.flat_ratio:10.3f}   (memory grew by {speed.memory_growth_bytes / 2**20:.1f} MiB)",
        f"{'peak memory, GiB':32} {memory / 2**30:10.2f}",
        f"{'transformer, TFLOP per block':32} {speed.block_tflop:10.4g}",
        f"{'transformer, TFLOP/s':32} {speed.network_tflops:10.4g}{share}",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=list(ZOO), default="1.3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has, for a machine that is too small for all")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--engine", choices=ENGINES, default="eager", help="how the transformer runs")
    parser.add_argument("--quantize", choices=("int8", "int8-weights", "fp8"), help="its linear layers in 8 bits")
    parser.add_argument("--quantize-cache", choices=("int8", "fp8"), help="its key-value cache in 8 bits")
    parser.add_argument("--decoder", choices=("full", "tiny"), default="full")
    parser.add_argument("--blocks", type=int, default=60, help="steady blocks to measure")
    parser.add_argument("--max-seconds", type=float, help="measure fewer steady blocks when they take longer than this")
    parser.add_argument("--switches", type=int, default=3, help="prompt switches to measure, after the steady blocks")
    parser.add_argument("--window", type=int, default=12, help="latent frames a block sees, sink and itself included")
    parser.add_argument("--sink", type=int, default=3, help="latent frames")
    parser.add_argument("--block", type=int, default=3, help="latent frames")
    parser.add_argument("--steps", default="1000,750,500,250", help="denoising steps")
    parser.add_argument("--attention", default="auto", help=f"auto, {', '.join(attention.BACKENDS)}")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; prints the table and returns the content of the JSON line."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device; choose --device cpu")
    if options.blocks < 1 or options.switches < 1:
        raise ValueError(f"{options.blocks} blocks and {options.switches} switches cannot be measured; choose at least 1 of each")
    pipe = build(
        options.size,
        device=device,
        dtype=DTYPES[options.dtype],
        attention_backend=options.attention,
        seed=options.seed,
        reference=options.engine == "reference",
        layers=options.layers,
        window=options.window,
        sink=options.sink,
        block=options.block,
        denoising_steps=[int(step) for step in options.steps.split(",")],
        height=options.height,
        width=options.width,
    )
    how = {name: getattr(options, name) for name in ("engine", "quantize", "quantize_cache", "decoder")}
    accelerate(pipe, size=options.size, **how)
    setup = describe(pipe, size=options.size, height=options.height, width=options.width, attention_backend=options.attention)
    speed = measure(
        pipe,
        height=options.height,
        width=options.width,
        blocks=options.blocks,
        switches=options.switches,
        seed=options.seed,
        max_seconds=options.max_seconds,
    )
    memory, used = peak_memory(device), utilisation(speed, setup)
    print(", ".join(f"{name} {value}" for name, value in how.items() if value is not None))
    print(table(setup, speed, memory, used), end="\n\n")
    spreads = {name: value._asdict() for name, value in vars(speed).items() if isinstance(value, Spread)}
    return {
        **asdict(setup),
        "layers": pipe.transformer.config.num_layers,
        **how,
        **asdict(speed),
        **spreads,
        "peak_memory_bytes": memory,
        "utilisation": used,
    }


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
