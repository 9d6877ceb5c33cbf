"""When do the images of a video arrive, and could a viewer watch it? `python benchmarks/latency.py --seconds 20 --output result.json`

Makes two videos with the bundled miniature or the model of a folder, the second with everything warm, a block being made while the one
before is decoded; prints a table, then one JSON line. Each video gives: time to its first images, time between arrivals (percentiles),
how many arrivals met the deadline of a video that plays without a pause from its first images on, and the stalls of a simulated viewer,
who waits until there is something to show and, optionally, begins only when some seconds are in store. FPS: of the transformer alone,
and end to end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import report

from longlive.generation.pipeline import LongLivePipeline
from longlive.parallel.world import World, choose_device, choose_dtype
from longlive.provenance import commit, processor

PROMPTS = ("a red circle moving right on a black background", "a blue square moving up on a white background")


class Arrival(NamedTuple):
    """One block: seconds after the request at which its images were there, and how long they play."""

    at: float
    plays: float


class Viewing(NamedTuple):
    """What a viewer sees: when the video starts, how often it stops for lack of images, for how long in all, and when it ends."""

    starts: float
    stalls: int
    stalled_seconds: float
    ends: float


def watch(arrivals: Sequence[Arrival], *, ahead: float = 0.0) -> Viewing:
    """Play blocks as they arrive, beginning when `ahead` seconds of video are in store (or all of it).

    A stall is an image that is due and not there; the viewer then goes on as soon as it arrives. Raises ValueError without arrivals.
    """
    if not arrivals:
        raise ValueError("nothing arrived, so there is nothing to watch")
    stored, starts = 0.0, arrivals[-1].at
    for arrival in arrivals:
        stored += arrival.plays
        if stored >= ahead:
            starts = arrival.at
            break
    now, stalls, stalled = starts, 0, 0.0
    for arrival in arrivals:
        if arrival.at > now:
            stalls, stalled, now = stalls + 1, stalled + arrival.at - now, arrival.at
        now += arrival.plays
    return Viewing(starts, stalls, stalled, now)


def deadlines_met(arrivals: Sequence[Arrival]) -> float:
    """The fraction of blocks, without the first, that arrive before all earlier images have been played from the first arrival on."""
    due, met = arrivals[0].at, 0
    for before, arrival in pairwise(arrivals):
        due += before.plays
        met += arrival.at <= due
    return met / max(1, len(arrivals) - 1)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds. `between`: from one arrival to the next, after the first. Frames per second are pixel frames."""

    blocks: int
    first: float
    between_p50: float
    between_p90: float
    between_p99: float
    between_most: float
    deadlines_met: float
    viewer_starts: float
    viewer_stalls: int
    viewer_stalled: float
    switch_block: float
    network_fps: float
    decode_fps: float
    end_to_end_fps: float


def percentile(values: Sequence[float], per_cent: float) -> float:
    """Linear between the two nearest of the ordered values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * per_cent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(arrivals: Sequence[Arrival], *, fps: float, ahead: float, network: float, decode: float, switch_block: float) -> Latency:
    """`network`, `decode`: seconds of the whole video."""
    between = [later.at - earlier.at for earlier, later in pairwise(arrivals)] or [0.0]
    seen, images = watch(arrivals, ahead=ahead), fps * sum(arrival.plays for arrival in arrivals)
    return Latency(
        blocks=len(arrivals),
        first=arrivals[0].at,
        between_p50=percentile(between, 50),
        between_p90=percentile(between, 90),
        between_p99=percentile(between, 99),
        between_most=max(between),
        deadlines_met=deadlines_met(arrivals),
        viewer_starts=seen.starts,
        viewer_stalls=seen.stalls,
        viewer_stalled=seen.stalled_seconds,
        switch_block=switch_block,
        network_fps=images / network,
        decode_fps=images / decode,
        end_to_end_fps=images / arrivals[-1].at,
    )


def measure(pipe: LongLivePipeline, *, seconds: float, height: int, width: int, ahead: float) -> Latency:
    """Make one video whose prompt is switched half way."""
    arrivals: list[Arrival] = []
    network = decode = switch_block = 0.0
    began = time.perf_counter()
    with pipe.session(PROMPTS[0], seconds=seconds, height=height, width=width, seed=0, ahead=True) as session:
        asked = False
        for block in session:
            arrivals.append(Arrival(time.perf_counter() - began, block.images.shape[1] / pipe.info.fps))
            network, decode = network + block.seconds.network, decode + block.seconds.decode
            if block.switched and len(arrivals) > 1:
                switch_block = arrivals[-1].at - arrivals[-2].at
            if not asked and sum(arrival.plays for arrival in arrivals) >= seconds / 2:
                session.prompt(PROMPTS[1])
                asked = True
    return summary(arrivals, fps=pipe.info.fps, ahead=ahead, network=network, decode=decode, switch_block=switch_block)


def table(first: Latency, steady: Latency) -> str:
    lines = [f"{'':32} {'first video':>12} {'second':>12}"]
    for name, value in asdict(first).items():
        lines.append(f"{name.replace('_', ' '):32} {value:12.4g} {asdict(steady)[name]:12.4g}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; prints the table and returns the content of the JSON line."""
    device = choose_device(options.device, World())
    pipe = LongLivePipeline.from_pretrained(options.model, torch_dtype=choose_dtype("auto", device)).to(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipe.accelerate(compile=options.compile, graphs=options.graphs, quantize=options.quantize, decoder=options.decoder)
    size = {"height": options.height or pipe.info.height, "width": options.width or pipe.info.width}
    videos = [measure(pipe, seconds=options.seconds, **size, ahead=options.ahead) for _ in range(2)]
    print(table(*videos), end="\n\n")
    how = {name: getattr(options, name) for name in ("model", "compile", "graphs", "quantize", "decoder", "seconds", "ahead")}
    where = {"device": str(device), "machine": processor(), "torch": torch.__version__, "commit": commit()}
    return {**how, **size, **where, "fps": pipe.info.fps, "first_video": asdict(videos[0]), "second_video": asdict(videos[1])}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="a folder in diffusers layout, or the bundled miniature")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each video")
    parser.add_argument("--height", type=int, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, help="pixels; default: the model's")
    parser.add_argument("--ahead", type=float, default=0.0, help="seconds of video that the viewer stores before beginning")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--quantize", choices=("int8", "int8-weights", "fp8"))
    parser.add_argument("--decoder", default="full", help="full, tiny, or the path of a tiny one")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
