"""Time and memory of a training step, measured or counted. Prints a table, then one JSON line.

    python benchmarks/train_step.py --config configs/miniature/long.yaml [key=value …] [--steps 10]

runs stage `init` or `long`: seconds and share of every part of a step, and its memory, with and without activation checkpointing.
Configurations of the miniature use the bundled model and prompts of its world unless the command line names others.

    python benchmarks/train_step.py --count 1.3b [--teacher 14b] [key=value …]

counts a step of a real size: the same code on the meta device, where tensors have shapes and no values, with torch's FLOP counter. One
and two layers are counted, and the rest is extrapolated, since all layers are equal. That it runs there also shows that a rollout reads no
value, for which the host would wait for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import peak_memory, report
from step_count import count, table_of_count
from step_parts import PARTS, Held, LiveMemory, Parts, clips_of, held_by_clips, measured_parts

import longlive.miniature
from longlive.config import DistillationConfig, TrainConfig
from longlive.miniature.prompt_pairs import write_chains
from longlive.models.zoo import ZOO, arguments
from longlive.parallel.world import World, choose_device
from longlive.provenance import commit, processor
from longlive.settings import load
from longlive.training.distillation import DistillationStage
from longlive.training.stages import build

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECONDS = (*PARTS, "generator optimiser", "critic optimiser", "rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Means over steps.

    Attributes:
        seconds, parts: of the whole, and of each part.
        peak_bytes: the most that tensors made within a cycle took at once.
        clips: what each clip of a video holds when it is made with a gradient; not looked at on a GPU.
        waits: how often the host waited for the GPU while a clip was made without gradient; None on a CPU.
    """

    checkpointing: bool
    steps: int
    seconds: float
    parts: dict[str, float]
    peak_bytes: int
    clips: list[Held]
    waits: int | None


def measure(config: TrainConfig, *, steps: int, device: torch.device) -> Step:
    """Run the stage of `config`: a cycle of `critic_updates` steps to warm up and measure memory, then whole cycles of at least `steps`."""
    stage = build(config, World(), device).stage
    assert isinstance(stage, DistillationStage)
    tuner, cycle = stage.tuner, range(stage.config.critic_updates)
    cuda = device.type == "cuda"

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for number in cycle:
            stage.step(number)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveMemory(device) as live:
            for number in cycle:
                stage.step(number)
        peak = live.peak

    steps = -(-steps // stage.config.critic_updates) * stage.config.critic_updates
    parts = Parts(clock)
    with measured_parts(parts, tuner, stage.objective, stage.generator, stage.critic):
        began = clock()
        for number in range(steps):
            stage.step(number)
        seconds = (clock() - began) / steps
    means = {part: parts.sums[part] / steps for part in SECONDS}
    means["rest"] = seconds - sum(means.values())

    while not tuner.between_videos:
        tuner.clip(grad=False)
    waits = waits_in(lambda: tuner.clip(grad=False)) if cuda else None
    while not tuner.between_videos:
        tuner.clip(grad=False)
    clips = held_by_clips(tuner, clips_of(tuner.max_frames[0], tuner.clip_frames, tuner.overlap)) if not cuda else []
    return Step(
        checkpointing=distillation_of(config).checkpointing,
        steps=steps,
        seconds=seconds,
        parts=means,
        peak_bytes=peak,
        clips=clips,
        waits=waits,
    )


def waits_in(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU during `work`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def distillation_of(config: TrainConfig) -> DistillationConfig:
    """The section of the stage. Raises ValueError for a stage without rollout."""
    if config.stage not in ("init", "long"):
        raise ValueError(f"stage {config.stage} has no rollout, teacher and critic; give a configuration of stage init or long")
    return config.init if config.stage == "init" else config.long


def bundled(folder: Path) -> dict[str, str]:
    """Settings to train the bundled miniature on prompts of its world, which are written to `folder`."""
    weights = Path(longlive.miniature.__file__).parent / "weights"
    prompts = write_chains(folder / "prompts", num=64, switches=8, seed=0, phrasings=1)
    values = {"generator": weights, "teacher": weights, "components": weights, "embeddings": folder / "embeddings", "prompts": prompts}
    return {name: str(value) for name, value in values.items()}


def table_of_steps(steps: Sequence[Step]) -> str:
    def columns(cells: Callable[[Step], str]) -> str:
        return "".join(f"{cells(step):>22}" for step in steps)

    names = {True: "checkpointed", False: "plain"}
    lines = [
        f"{f'seconds per step, of {steps[0].steps}':26}{columns(lambda step: names[step.checkpointing])}",
        *(
            f"{f'  {part}':26}{columns(lambda step, part=part: f'{step.parts[part]:.4f}  {step.parts[part] / step.seconds:6.1%}')}"
            for part in SECONDS
        ),
        f"{'whole':26}{columns(lambda step: f'{step.seconds:.4f}  100.0%')}",
        "",
        f"{'peak in a cycle, MiB':26}{columns(lambda step: f'{step.peak_bytes / 2**20:.1f}')}   without weights",
    ]
    for number in range(len(steps[0].clips)):
        lines.append(f"{f'held by clip {number + 1}, MiB':26}{columns(lambda step, n=number: f'{step.clips[n].alive / 2**20:.1f}')}")
    if steps[0].waits is not None:
        lines.append(f"{'waits in a clip':26}{columns(lambda step: str(step.waits))}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", type=Path, help="default: the miniature's long.yaml; with --count train_long.yaml")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure, rounded up to whole cycles of `critic_updates` steps")
    parser.add_argument("--count", choices=list(ZOO), metavar="SIZE", help=f"count a generator of this size instead: {', '.join(ZOO)}")
    parser.add_argument("--teacher", choices=list(ZOO), default="14b", help="with --count")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of longlive/config.py, e.g. long.batch=4")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or count as the command line says; prints the table and returns the content of the JSON line."""
    if options.steps < 1:
        raise ValueError(f"{options.steps} steps cannot be measured; choose at least 1")
    where = {"machine": processor(), "torch": torch.__version__, "commit": commit()}
    if options.count is not None:
        path = options.config or CONFIGS / "train_long.yaml"
        settings = distillation_of(load(TrainConfig, path, options.settings))
        counted = count(arguments(options.count), arguments(options.teacher), settings)
        print(f"{options.count}, teacher {options.teacher}, {settings.height}x{settings.width}, {path}; counted, not measured")
        print(table_of_count(counted, designed=(options.count, options.teacher) == ("1.3b", "14b")), end="\n\n")
        bytes_ = {kind: {name: one._asdict() for name, one in getattr(counted, kind).items()} for kind in ("checkpointed", "plain")}
        return {"size": options.count, "teacher": options.teacher, "config": str(path), **where, **dataclasses.asdict(counted), **bytes_}

    path = options.config or CONFIGS / "miniature" / "long.yaml"
    config = load(TrainConfig, path, options.settings)
    settings = distillation_of(config)
    device = choose_device(config.device, World())
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        if path.resolve().parent == CONFIGS / "miniature":
            given = {word.partition("=")[0] for word in options.settings}
            own = {name: value for name, value in bundled(Path(folder)).items() if f"{config.stage}.{name}" not in given}
            settings = dataclasses.replace(settings, **own)
        steps = []
        for checkpointing in (True, False):
            changed = dataclasses.replace(settings, checkpointing=checkpointing)
            steps.append(measure(dataclasses.replace(config, **{config.stage: changed}), steps=options.steps, device=device))
            gc.collect()
    memory = peak_memory(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{path}, batch {settings.batch} | {name} | {where['machine']}\ntorch {where['torch']} | commit {where['commit']}\n")
    print(table_of_steps(steps))
    print(f"{'peak memory, GiB':26}{memory / 2**30:22.2f}   of the whole process", end="\n\n")
    parts = [{**dataclasses.asdict(step), "clips": [clip._asdict() for clip in step.clips]} for step in steps]
    return {"config": str(path), "batch": settings.batch, "device": name, **where, "runs": parts, "peak_memory_bytes": memory}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
