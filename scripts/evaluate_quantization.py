"""What 8 bits change, on the miniature and counted for the 1.3B: `python scripts/evaluate_quantization.py [--parts error drift ...]`.

error: the velocity of a pass over a full window, against that in floating point.
drift: videos of 999 latent frames with one prompt switch, their latents against those in floating point from the same noise, beside the
       distance between two seeds.
oracle: held-out prompts, read by the miniature's oracle; differences are paired by prompt.
memory: bytes of weights and of the cache of the 1.3B at 480 x 832, counted without making them.
speed: CPU seconds of one thread, floating point and 8 bits in turns.

Prints tables in Markdown and writes all numbers to a JSON file. Parts that are not measured keep what it says of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evaluate_miniature import generate, mean, share
from torch import Tensor, nn

from longlive.cache.window import Window
from longlive.engine.apply import Recipe, apply
from longlive.engine.linears import KINDS, QuantisedLinear
from longlive.files import read_json, write_json
from longlive.generation.caches import cache_bytes, ring_cache, weight_bytes
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, held_out
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import add_noise, warp_steps
from longlive.provenance import commit, processor

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int8-weights": {"quantize": "int8-weights"},
    "fp8": {"quantize": "fp8"},
    "cache int8": {"quantize_cache": "int8"},
    "cache fp8": {"quantize_cache": "fp8"},
    "int8 + cache int8": {"quantize": "int8", "quantize_cache": "int8"},
    "fp8 + cache fp8": {"quantize": "fp8", "quantize_cache": "fp8"},
}
PLAIN = "float32"
SEEDS = (0, 1, 2)
BLOCK = 3  # latent frames, the miniature's
PROMPTS = ("a red circle moving right on a black background", "a blue square moving up on a white background")
WIDE = ((192, 1536, 1536), (192, 1536, 8960), (192, 8960, 1536))  # tokens, inputs, outputs: the 1.3B's layers, 3 frames of 128 x 128


def pipeline(model: str, name: str) -> LongLivePipeline:
    """The model with the settings called `name`."""
    pipe = LongLivePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.accelerate(**SETTINGS[name])
    return pipe


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def velocities(pipe: LongLivePipeline, x0: Tensor, noise: Tensor, text: Tensor, cache_format: str | None) -> list[Tensor]:
    """Of the last block of `x0` at every timestep, after the blocks before it have been recorded."""
    config, block = pipe.config, pipe.config.block
    window, size = Window.of(config.window, config.sink), x0.shape[-2:]
    cache = ring_cache(pipe.transformer, *size, window=window, batch=len(x0), quantize=cache_format)  # type: ignore[arg-type]
    denoiser, prompt = Denoiser(pipe.transformer), pipe.transformer.project_text(text)
    for start in range(0, x0.shape[1] - block, block):
        with cache.record(range(start, start + block)) as view:
            denoiser.write_kv(x0[:, start : start + block], 0.0, prompt, view)
    view = cache.view(range(cache.end, cache.end + block))
    steps = warp_steps(config.denoising_steps, config.timestep_shift)
    noisy = [(t, add_noise(x0[:, -block:], noise, torch.tensor([[t]]))) for t in steps]
    return [denoiser(latents, t, prompt, view).velocity for t, latents in noisy]


@torch.no_grad()
def measure_error(model: str, num_prompts: int) -> dict[str, Any]:
    """Relative error of the velocity at every timestep."""
    prompts = [canonical(caption) for caption in held_out(num_prompts)]
    pipe = pipeline(model, PLAIN)
    generators = [torch.Generator().manual_seed(number) for number in range(num_prompts)]
    made = pipe.stream(
        PromptSchedule.single("all"),
        num_latent_frames=15,
        batch=num_prompts,
        generator=generators,
        project_text=lambda _: pipe.project_prompts(prompts),
    )
    x0 = torch.cat([block.latents for block in made], dim=1)
    noise = torch.randn(x0[:, -pipe.config.block :].shape, generator=torch.Generator().manual_seed(5))
    text, exact, found = pipe._text.text_encoder.encode(prompts), [], {}
    for name, settings in SETTINGS.items():
        velocity = velocities(pipeline(model, name), x0, noise, text, settings.get("quantize_cache"))
        exact = exact or velocity
        found[name] = [round(((one - other).norm() / other.norm()).item(), 5) for one, other in zip(velocity, exact, strict=True)]
    return {"timesteps": warp_steps(pipe.config.denoising_steps, pipe.config.timestep_shift), "relative": found}


@torch.no_grad()
def long_video(model: str, name: str, num_frames: int) -> Tensor:
    """Latents of a video with a switch in its middle, `[seeds, F, C, H, W]`: of every seed in floating point, of the first in 8 bits."""
    seeds = SEEDS if name == PLAIN else SEEDS[:1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    plan = PromptSchedule.at_latent_frames(list(PROMPTS), [switch_frame(num_frames)])
    made = pipeline(model, name).stream(plan, num_latent_frames=num_frames, batch=len(seeds), generator=generators)
    return torch.cat([part.latents for part in made], dim=1)


def switch_frame(num_frames: int) -> int:
    return num_frames // 2 // BLOCK * BLOCK


def drift(videos: dict[str, Tensor]) -> dict[str, Any]:
    """Root mean square difference of latents from the float video of the same seed, and of the float videos of the other seeds from it,
    over blocks of three frames along the video.
    """
    plain = videos[PLAIN]
    num_frames, switch = plain.shape[1], switch_frame(plain.shape[1])
    at = sorted(
        {0, switch, min(switch + 3 * BLOCK, num_frames - BLOCK), num_frames - BLOCK, *(BLOCK * (num_frames // each) for each in (30, 10))}
    )
    others = {f"seed {seed}": plain[number : number + 1] for number, seed in enumerate(SEEDS) if number}
    others |= {name: latents for name, latents in videos.items() if name != PLAIN}
    found = {name: [rms((one - plain[:1])[:, f : f + BLOCK]) for f in at] for name, one in others.items()}
    found["size of the latents"] = [rms(plain[:1, f : f + BLOCK]) for f in at]
    return {"frames": at, "switch": switch, "rms": {name: [round(value, 4) for value in values] for name, values in found.items()}}


@torch.no_grad()
def seen(model: str, name: str, num_prompts: int) -> dict[str, Tensor]:
    """Of every held-out prompt's video: which attributes it shows, their share, and the overlap with the best template."""
    captions = held_out(num_prompts)
    videos = generate(pipeline(model, name), [[canonical(one)] for one in captions], num_latent_frames=21, seed=1000)
    reading = oracle.read(videos)
    right = reading.correct(captions)
    return right | {"right": torch.stack([right[each].double() for each in ATTRIBUTES]).mean(0), "iou": reading.iou.double().mean(1)}


def scores(videos: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Means over prompts with intervals, and differences from floating point paired by prompt."""
    found: dict[str, Any] = {}
    for name, each in videos.items():
        found[name] = {what: share(each[what]) for what in ATTRIBUTES} | {what: mean(each[what]) for what in ("right", "iou")}
        found[name] |= {f"{what}_difference": mean(each[what] - videos[PLAIN][what]) for what in ("right", "iou")}
    return {"prompts": len(videos[PLAIN]["right"]), "settings": found}


def measure_memory() -> dict[str, Any]:
    """Bytes of the 1.3B in bfloat16 and of its cache for 12 latent frames of 480 x 832 pixels."""
    found: dict[str, Any] = {"weights": {}, "cache": {}}
    for kind in (None, *KINDS):
        with torch.device("meta"):
            network = WanTransformer().bfloat16()
        apply(network, Recipe(quantize=kind))  # type: ignore[arg-type]
        found["weights"][kind or "bfloat16"] = weight_bytes(network)
        for relative in (False, True):
            for form in (None, "int8"):  # fp8 is as large
                name = f"{form or 'bfloat16'}{', relative rope' if relative else ''}"
                found["cache"][name] = cache_bytes(network, 60, 104, visible=12, sink_copies=3 * relative, quantize=form)  # type: ignore[arg-type]
    return found


def in_turns(one: Callable[[], object], other: Callable[[], object], times: int) -> tuple[float, float, float]:
    """CPU milliseconds of both and how many times faster the second is: medians, the ratio of neighbours."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * times + 2):
        began = time.thread_time()
        (one, other)[number % 2]()
        if number > 1:
            seconds[number % 2].append(time.thread_time() - began)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return tuple(round(statistics.median(values) * scale, 3) for values, scale in ((seconds[0], 1e3), (seconds[1], 1e3), (ratios, 1)))  # type: ignore[return-value]


@torch.no_grad()
def measure_speed(model: str, times: int) -> dict[str, Any]:
    """A layer of the 1.3B's width and a block's pass of the miniature, in float32 and in 8 bits."""
    found: dict[str, Any] = {"layers": {}, "passes": {}}
    for tokens, inputs, outputs in WIDE:
        linear, x = nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
        for kind in KINDS:
            measured = in_turns(partial(linear, x), partial(QuantisedLinear(linear, kind), x), times)
            found["layers"][f"{tokens} x {inputs} x {outputs} {kind}"] = measured
    pipes = {name: pipeline(model, name) for name in SETTINGS}
    x0, noise = torch.randn(1, 15, 16, 8, 8), torch.randn(1, 3, 16, 8, 8)
    text = pipes[PLAIN]._text.text_encoder.encode([PROMPTS[0]])
    size = pipes[PLAIN].config.height // pipes[PLAIN]._spatial_stride
    x0, noise = (latents[..., :size, :size] for latents in (x0, noise))
    for name, settings in SETTINGS.items():
        if name != PLAIN:
            one, other = (partial(velocities, pipes[each], x0, noise, text, SETTINGS[each].get("quantize_cache")) for each in (PLAIN, name))
            found["passes"][name] = in_turns(one, other, times)
            assert settings
    return found


def tables(results: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines: list[str] = []

    def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
        lines.extend(["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""])

    if part := results.get("error"):
        steps = [f"t = {t:.0f}" for t in part["timesteps"]]
        table(["velocity, relative error", *steps], [[name, *errors] for name, errors in part["relative"].items() if name != PLAIN])
    if part := results.get("drift"):
        table(["rms of latents, frame", *part["frames"]], [[name, *values] for name, values in part["rms"].items()])
    if part := results.get("oracle"):
        rows = []
        for name, each in part["settings"].items():
            shown = [f"{each[what][0]:.0%} [{each[what][1]:.0%}, {each[what][2]:.0%}]" for what in ATTRIBUTES]
            change = [f"{v[0]:+.3f} [{v[1]:+.3f}, {v[2]:+.3f}]" for v in (each["right_difference"], each["iou_difference"])]
            rows.append([name, *shown, f"{each['iou'][0]:.3f}", *(["", ""] if name == PLAIN else change)])
        table(["", *ATTRIBUTES, "overlap", "attributes, difference", "overlap, difference"], rows)
    if part := results.get("memory"):
        for what in ("weights", "cache"):
            first = next(iter(part[what].values()))
            table([what, "GB", "times smaller"], [[name, f"{n / 1e9:.2f}", f"{first / n:.2f}"] for name, n in part[what].items()])
    if part := results.get("speed"):
        for what in ("layers", "passes"):
            table([what, "float32, ms", "8 bits, ms", "times faster"], [[name, *values] for name, values in part[what].items()])
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("error", "drift", "oracle", "memory", "speed")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--output", type=Path, default=Path("docs/quantization.json"))
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts for the oracle")
    parser.add_argument("--frames", type=int, default=999, help="latent frames of the videos whose drift is measured")
    parser.add_argument("--times", type=int, default=15, help="measurements of a speed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    measure = {
        "error": lambda: measure_error(arguments.model, min(8, arguments.prompts)),
        "drift": lambda: drift({name: long_video(arguments.model, name, arguments.frames) for name in SETTINGS}),
        "oracle": lambda: scores({name: seen(arguments.model, name, arguments.prompts) for name in SETTINGS}),
        "memory": measure_memory,
        "speed": lambda: measure_speed(arguments.model, arguments.times),
    }
    results = read_json(arguments.output) if arguments.output.exists() else {}
    for part in parts:
        if part in arguments.parts:
            began = time.thread_time()
            made = {"commit": commit(), "machine": processor(), "torch": torch.__version__}
            results[part] = measure[part]() | made | {"cpu_seconds": round(time.thread_time() - began)}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, results)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
