"""Where does a training step spend its time and memory? Prints a table, then one JSON line. Two questions, two answers:

    python benchmarks/train_step.py --config configs/miniature/long.yaml [key=value …] [--steps 10]

runs stage `init` or `long`: seconds and share of every part of a mean step and the memory it takes, with and without
checkpointing. Configurations of the miniature take the bundled model and prompts of its world unless told otherwise.

    python benchmarks/train_step.py --count 1.3b [--teacher 14b] [key=value …]

counts a mean iteration of a real size: the same code on the meta device, where tensors have shapes and no values, with
torch's FLOP counter. One and two layers are counted; all layers are alike, so the rest follows on a straight line. That it
runs there also says that a rollout asks for no value, which would make the host wait for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import AutoencoderKLWan
from machine import commit, peak_memory, processor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import longlive.miniature
from longlive.cache.history import HistoryCache
from longlive.cache.window import Window
from longlive.config import DistillationConfig, TrainConfig, load
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.miniature.prompt_pairs import write_pairs
from longlive.models.vae import settings_of
from longlive.models.wan import WanTransformer
from longlive.models.zoo import ZOO, arguments
from longlive.ops import attention
from longlive.ops.flow import warp_steps
from longlive.ops.rope import rotation
from longlive.parallel.world import SharedChoices, World, choose_device
from longlive.training.clips import StreamingTuner, anchor_frame
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD
from longlive.training.networks import Learner
from longlive.training.prompts import PromptPair
from longlive.training.stages import build

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

ROLLOUT = ("prompts", "denoise", "remember", "recache")
GROUPS = {  # what is called by one name in the design: its parts here, and its share of the designed 3,139 TFLOP
    "critic": (("critic forward", "critic backward"), 0.39),
    "rollout": (ROLLOUT, 0.25),
    "teacher": (("teacher",), 0.21),
    "VAE": (("anchor",), 0.10),
    "generator backward": (("generator backward",), 0.04),
}
DESIGNED_TFLOP = 3139
PARTS = (*ROLLOUT, "anchor", "teacher", "critic for the generator", "generator backward", "critic forward", "critic backward")
SECONDS = (*PARTS, "generator optimiser", "critic optimiser", "rest")


class Parts:
    """By how much a reading grows in each part; what is called within a part belongs to that part."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.sums: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrap(self, name: str | Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted as the part called `name`, or what `name()` is when it is called."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            part = name if isinstance(name, str) else name()
            self._inside, before = True, self.read()
            try:
                return call(*args, **kwargs)
            finally:
                self.sums[part] += self.read() - before
                self._inside = False

        return counted


@contextmanager
def told_apart(parts: Parts, tuner: StreamingTuner, objective: DMD, generator: Learner, critic: Learner) -> Iterator[None]:
    """Within the context, `parts` follows what these objects are asked to do."""
    rollout, judged = tuner.rollout, ["generator"]

    def judging(network: str, loss: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            judged[0] = network
            return loss(*args, **kwargs)

        return noted

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (tuner, "embed", parts.wrap("prompts", tuner.embed)),
        (rollout.denoiser.network, "read", parts.wrap("prompts", rollout.denoiser.network.read)),
        (rollout, "block", parts.wrap("denoise", rollout.block)),
        (rollout, "remember", parts.wrap("remember", rollout.remember)),
        (rollout, "switch", parts.wrap("recache", rollout.switch)),
        (objective, "teacher", parts.wrap("teacher", objective.teacher)),
        (objective, "critic", parts.wrap(lambda: f"critic for{'ward' if torch.is_grad_enabled() else ' the generator'}", objective.critic)),
        (objective, "generator_loss", judging("generator", objective.generator_loss)),
        (objective, "critic_loss", judging("critic", objective.critic_loss)),
        (torch.Tensor, "backward", parts.wrap(lambda: f"{judged[0]} backward", torch.Tensor.backward)),
        (generator, "update", parts.wrap("generator optimiser", generator.update)),
        (critic, "update", parts.wrap("critic optimiser", critic.update)),
    ]
    if tuner.anchor is not None:
        changes.append((tuner, "anchor", parts.wrap("anchor", tuner.anchor)))
    with ExitStack() as stack:
        for owner, name, replacement in changes:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what an operation is given or gives back."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


class Live(TorchDispatchMode):
    """Bytes of the tensors of one device made within the context that are still there (`bytes`), and the most at once (`peak`).

    Sees every operation of its own thread; the backward pass of a GPU runs in another.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}  # by the address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = {s._cdata: s for s in map(Tensor.untyped_storage, _tensors(out)) if s.device.type == self.device.type}
        made = {key: storage for key, storage in made.items() if key not in self.known}
        if made:  # neither a view of what was there, nor written in place
            given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
            for key in made.keys() - given:
                self._made(key, made[key])
        return out

    def _made(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: weakref.ref[Any]) -> None:
            del self.known[key]
            self.bytes -= size

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class Held(NamedTuple):
    """Bytes that a tensor with a gradient keeps from being freed.

    Attributes:
        saved: what autograd saved, weights aside: of checkpointed blocks their inputs.
        alive: everything: also the remembered frames that the view of a checkpointed block shows.
        backward: more at once while the backward pass runs.
    """

    saved: float
    alive: float
    backward: float


def held(live: Live, make: Callable[[], Tensor]) -> Held:
    """Of what `make` makes; `live` must have begun before anything that it reads, weights aside, was made."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in live.known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = make()
    alive = live.peak = live.bytes
    made.sum().backward()
    return Held(sum(saved.values()), alive, live.peak - alive)


def held_by_clips(tuner: StreamingTuner, clips: int) -> list[Held]:
    """Of each of the first clips of a video, made with a gradient one after the other; leaves no gradient behind.

    Raises:
        ValueError: when a video is under way.
    """
    if not tuner.between_videos:
        raise ValueError(f"the video stands at frame {tuner.rollout.end}; bring it to its end first")
    network, found = tuner.rollout.denoiser.network, []
    with Live(network.device) as live:
        for _ in range(clips):
            rotation.cache_clear()  # rotations of earlier clips are kept there; they are not the clip's
            found.append(held(live, lambda: tuner.clip(grad=True).latents))
            network.zero_grad(set_to_none=True)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A mean step.

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
    """The stage of `config`: a cycle of `ratio` steps to warm up, whose memory is watched, then as many whole cycles as `steps` need."""
    stage = build(config, World(), device).stage
    assert isinstance(stage, DistillationStage)
    tuner, cycle = stage.tuner, range(stage.ratio)
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
        with Live(device) as live:
            for number in cycle:
                stage.step(number)
        peak = live.peak

    steps = -(-steps // stage.ratio) * stage.ratio
    parts = Parts(clock)
    with told_apart(parts, tuner, stage.objective, stage.generator, stage.critic):
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
    """How often the host waits for the GPU within `work`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def clips_of(frames: int, clip_frames: int, overlap: int) -> int:
    """Clips of a video that may have so many frames."""
    return 1 + (frames - clip_frames) // (clip_frames - overlap)


class _SamePrompts:
    """Prompts without end, of which only the number counts."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def next(self) -> list[PromptPair]:
        return [PromptPair("", "")] * self._batch

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        assert not state


class _FirstChoice(SharedChoices):
    """Nothing is drawn: every block ends after its first denoising pass."""

    def integer(self, n: int) -> int:
        return 0


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as a fused kernel counts and saves it, which on the meta device must be asked for by name."""
    assert mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


class Imagined(NamedTuple):
    """A stage of training whose tensors have no values, that makes the first `clips` clips of a video; the others are like the last."""

    tuner: StreamingTuner
    objective: DMD
    generator: Learner
    critic: Learner
    clips: int


def imagine(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig, *, layers: int) -> Imagined:
    """Generator and critic of `size` and a `teacher` (arguments of `WanTransformer`) with so many layers each, computing in bfloat16."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    with meta:
        networks = [WanTransformer(**{**kind, "num_layers": layers}) for kind in (size, size, teacher)]
        lora = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
        generator, critic = (Learner(network, lr=1.0, checkpointing=settings.checkpointing, **lora) for network in networks[:2])
    for network in networks:
        torch.nn.Module.to(network, dtype)  # diffusers warns of its own way
    networks[2].requires_grad_(False)
    sizes, window = networks[0].config, Window.of(settings.window, settings.sink)
    stride = settings.clip_frames - settings.overlap
    starts = [0, *range(settings.clip_frames, max(settings.max_frames) - stride + 1, stride)]
    clips = next((n for n, start in enumerate(starts, 1) if start >= window.visible), len(starts))

    def noise(frames: int) -> Tensor:
        return torch.empty(settings.batch, frames, sizes.in_dim, settings.height // 8, settings.width // 8, device=meta)

    rollout = Rollout(
        Denoiser(networks[0]),
        HistoryCache(window=window, theta=sizes.rope_theta),
        steps=warp_steps(settings.denoising_steps, settings.timestep_shift),
        draw=torch.empty_like,
        context_t=settings.context_timestep,
        recache=settings.recache,
    )
    tuner = StreamingTuner(
        rollout,
        _SamePrompts(settings.batch),
        embed=lambda prompts: torch.empty(len(prompts), sizes.text_len, sizes.text_dim, device=meta),
        noise=noise,
        choices=_FirstChoice(0, World()),
        block=settings.block,
        clip_frames=settings.clip_frames,
        overlap=settings.overlap,
        max_frames=[settings.clip_frames + (clips - 1) * stride],
        switch_at=[starts[clips - 1]] if settings.switch_at and clips > 1 else [],
        keep_sink=settings.keep_sink,
    )
    objective = DMD(Denoiser(networks[2]), Denoiser(networks[1]), guidance=settings.guidance, shift=settings.timestep_shift)
    return Imagined(tuner, objective, generator, critic, clips)


def flops_of_clips(stage: Imagined) -> list[dict[str, float]]:
    """FLOPs by part for each clip, if both networks were trained on it and every block ended after one denoising pass."""
    tuner, objective = stage.tuner, stage.objective
    found = []
    with FlopCounterMode(display=False) as counter, mock.patch.object(attention, "choose", lambda *_: _flash):
        parts = Parts(counter.get_total_flops)
        with told_apart(parts, tuner, objective, stage.generator, stage.critic):
            for _ in range(stage.clips):
                before = counter.get_total_flops()
                clip = tuner.clip(grad=True)
                drawn = {"t": objective.draw_levels(clip.latents, torch.Generator()), "noise": torch.empty_like(clip.latents)}
                objective.generator_loss(clip.latents, clip.text, clip.text, **drawn).loss.backward()
                objective.critic_loss(clip.latents, clip.text, **drawn).backward()
                sums = {part: parts.sums[part] for part in PARTS}
                found.append({**sums, "rest": counter.get_total_flops() - before - sum(sums.values())})
                parts.sums.clear()
    return found


def flops_of_anchor(vae: AutoencoderKLWan, settings: DistillationConfig) -> float:
    """FLOPs of the first frame of a clip that goes on from another."""
    frames = settings.clip_frames - settings.overlap + 1
    size = (settings.batch, frames, settings_of(vae).z_dim, settings.height // 8, settings.width // 8)
    with FlopCounterMode(display=False) as counter:
        anchor_frame(vae, torch.empty(size, device=vae.device), tail=settings.anchor_tail)
    return counter.get_total_flops()


def on_a_line(one: float, two: float, layers: int) -> float:
    """What a network of so many equal layers takes, from what it takes with one and with two of them."""
    return one + (layers - 1) * (two - one)


def depth(kind: Mapping[str, Any]) -> int:
    """Layers of a network with these arguments."""
    with torch.device("meta"):
        return WanTransformer(**kind).config.num_layers


def flops_of_step(
    size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig, *, anchor: float = 0.0
) -> dict[str, float]:
    """FLOPs by part of a mean step: mean over the cycle of `ratio` steps, the exit steps, and all clips of videos of all lengths.

    `anchor`: of one anchor frame.
    """
    layers = dict.fromkeys(PARTS, depth(size)) | {"teacher": depth(teacher)}
    one, two = (flops_of_clips(imagine(size, teacher, settings, layers=n)) for n in (1, 2))
    counted = [{part: on_a_line(a[part], b[part], layers[part]) for part in PARTS} for a, b in zip(one, two, strict=True)]
    videos = [clips_of(frames, settings.clip_frames, settings.overlap) for frames in settings.max_frames]
    switches = sum(any(frame < frames for frame in settings.switch_at) for frames in settings.max_frames)
    clips = [counted[min(number, len(counted) - 1)] for video in videos for number in range(video)]
    mean = {part: sum(clip[part] for clip in clips) / len(clips) for part in PARTS}
    mean["recache"] = counted[-1]["recache"] * switches / len(clips)
    mean["anchor"] = anchor * (len(clips) - len(videos)) / len(clips)
    mean["denoise"] *= (len(settings.denoising_steps) + 1) / 2
    of_generator = 1 / settings.ratio
    times = dict.fromkeys(PARTS, of_generator) | dict.fromkeys((*ROLLOUT, "anchor"), 1 + of_generator)
    times |= {"critic forward": 1, "critic backward": 1}
    return {part: settings.accumulate * times[part] * mean[part] for part in PARTS}


def activations(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> dict[str, Held]:
    """What a clip with gradient far into a video holds, and the critic's loss on a clip; all layers, bfloat16."""

    def of(layers: int) -> dict[str, Held]:
        stage = imagine(size, teacher, settings, layers=layers)
        with mock.patch.object(attention, "choose", lambda *_: _flash):
            with Live(torch.device("meta")) as live:
                for _ in range(stage.clips - 1):
                    stage.tuner.clip(grad=False)
                rotation.cache_clear()
                clip = held(live, lambda: stage.tuner.clip(grad=True).latents)
            with Live(torch.device("meta")) as live:
                latents, text = stage.tuner.noise(settings.clip_frames), stage.tuner.embed([""] * settings.batch)
                t = stage.objective.draw_levels(latents, torch.Generator())
                loss = held(live, lambda: stage.objective.critic_loss(latents, text, t=t, noise=latents))
        return {"generator": clip, "critic": loss}

    one, two, layers = of(1), of(2), depth(size)
    return {
        name: Held(on_a_line(one[name].saved, b.saved, layers), on_a_line(one[name].alive, b.alive, layers), b.backward)
        for name, b in two.items()
    }


def parameters(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> dict[str, tuple[float, float]]:
    """Parameters of each network: all of them, adapters included, and those in training."""

    def of(layers: int) -> dict[str, list[int]]:
        stage = imagine(size, teacher, settings, layers=layers)
        networks = {"generator": stage.generator.network, "critic": stage.critic.network, "teacher": stage.objective.teacher.network}
        return {
            name: [sum(p.numel() for p in network.parameters() if p.requires_grad or not only) for only in (False, True)]
            for name, network in networks.items()
        }

    one, two = of(1), of(2)
    layers = {"generator": depth(size), "critic": depth(size), "teacher": depth(teacher)}
    return {name: tuple(on_a_line(a, b, layers[name]) for a, b in zip(one[name], two[name], strict=True)) for name in layers}  # type: ignore[misc]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """FLOPs of a mean step by part; bytes of weights, gradients and AdamW by network; bytes held by activations."""

    flops: dict[str, float]
    flops_plain: dict[str, float]
    weights: dict[str, tuple[float, float, float]]
    checkpointed: dict[str, Held]
    plain: dict[str, Held]


def count(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> Count:
    """Of a stage whose generator and critic are of `size`; weights in training are float32, the others and all activations bfloat16."""
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    anchor = flops_of_anchor(vae, settings)
    twice, plain = (dataclasses.replace(settings, checkpointing=checkpointing) for checkpointing in (True, False))
    numbers = parameters(size, teacher, settings)
    return Count(
        flops=flops_of_step(size, teacher, twice, anchor=anchor),
        flops_plain=flops_of_step(size, teacher, plain, anchor=anchor),
        weights={name: ((4 if trained else 2) * every, 4 * trained, 8 * trained) for name, (every, trained) in numbers.items()}
        | {"VAE": (2 * sum(p.numel() for p in vae.parameters()), 0, 0)},
        checkpointed=activations(size, teacher, twice),
        plain=activations(size, teacher, plain),
    )


def distillation_of(config: TrainConfig) -> DistillationConfig:
    """The section of the stage. Raises ValueError for a stage without rollout."""
    if config.stage not in ("init", "long"):
        raise ValueError(f"stage {config.stage} has no rollout, teacher and critic; give a configuration of stage init or long")
    return config.init if config.stage == "init" else config.long


def bundled(folder: Path) -> dict[str, str]:
    """Settings by which a stage trains the bundled miniature on prompts of its world, which are written to `folder`."""
    weights = Path(longlive.miniature.__file__).parent / "weights"
    files = write_pairs(folder / "prompts", num=64, seed=0, phrasings=1)
    values = {"generator": weights, "teacher": weights, "components": weights, "embeddings": folder / "embeddings"}
    return {name: str(value) for name, value in {**values, "prompts": files.prompts, "switch_prompts": files.switch}.items()}


def table_of_steps(steps: Sequence[Step]) -> str:
    def columns(cells: Callable[[Step], str]) -> str:
        return "".join(f"{cells(step):>22}" for step in steps)

    names = {True: "checkpointed", False: "plain"}
    lines = [
        f"{f'seconds a step, of {steps[0].steps}':26}{columns(lambda step: names[step.checkpointing])}",
        *(
            f"{f'  {part}':26}{columns(lambda step, part=part: f'{step.parts[part]:.4f}  {step.parts[part] / step.seconds:6.1%}')}"
            for part in SECONDS
        ),
        f"{'whole':26}{columns(lambda step: f'{step.seconds:.4f}  100.0%')}",
        "",
        f"{'made in a cycle, MiB':26}{columns(lambda step: f'{step.peak_bytes / 2**20:.1f}')}   at most at once, weights aside",
    ]
    for number in range(len(steps[0].clips)):
        lines.append(f"{f'held by clip {number + 1}, MiB':26}{columns(lambda step, n=number: f'{step.clips[n].alive / 2**20:.1f}')}")
    if steps[0].waits is not None:
        lines.append(f"{'waits in a clip':26}{columns(lambda step: str(step.waits))}")
    return "\n".join(lines)


def table_of_count(counted: Count, *, designed: bool) -> str:
    """`designed`: whether the design has figures for this."""
    whole, plain = sum(counted.flops.values()), sum(counted.flops_plain.values())
    lines = [f"{'TFLOP a step':26}{'checkpointed':>14}{'share':>8}{'plain':>10}"]
    for part in PARTS:
        flops = counted.flops[part]
        lines.append(f"{f'  {part}':26}{flops / 1e12:14.4g}{flops / whole:8.1%}{counted.flops_plain[part] / 1e12:10.4g}")
    lines += [f"{'whole':26}{whole / 1e12:14.4g}{1:8.1%}{plain / 1e12:10.4g}", ""]
    if designed:
        lines.append(f"{'against the design, TFLOP':26}{'checkpointed':>14}{'design':>10}{'difference':>12}")
        figures = [(name, sum(counted.flops[part] for part in parts), share) for name, (parts, share) in GROUPS.items()]
        for name, flops, share in [*figures, ("whole", whole, 1.0)]:
            expected = share * DESIGNED_TFLOP
            lines.append(f"{f'  {name}':26}{flops / 1e12:14.1f}{expected:10.1f}{flops / 1e12 / expected - 1:+12.1%}")
        lines += [f"  the design's parts are rounded to whole percents: {DESIGNED_TFLOP / 200:.0f} TFLOP up or down", ""]
    lines += [f"{'GB':26}{'weights':>14}{'gradients':>11}{'AdamW':>9}   whole, before anything is spread over ranks"]
    for name, parts in counted.weights.items():
        lines.append(f"{f'  {name}':26}{parts[0] / 1e9:14.3g}{parts[1] / 1e9:11.3g}{parts[2] / 1e9:9.3g}")
    lines += ["", f"{'GB':26}{'held':>14}{'saved':>11}{'backward':>9}   by activations, one rank"]
    for kind, networks in (("checkpointed", counted.checkpointed), ("plain", counted.plain)):
        for name, bytes_ in networks.items():
            title = f"  {name}, {kind}"
            lines.append(f"{title:26}{bytes_.alive / 1e9:14.3g}{bytes_.saved / 1e9:11.3g}{bytes_.backward / 1e9:9.3g}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", type=Path, help="default: the miniature's long.yaml; with --count train_long.yaml")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure, rounded up to whole cycles of `ratio` steps")
    parser.add_argument("--count", choices=list(ZOO), metavar="SIZE", help=f"count a generator of this size instead: {', '.join(ZOO)}")
    parser.add_argument("--teacher", choices=list(ZOO), default="14b", help="with --count")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of longlive/config.py, e.g. long.batch=4")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or count as the command line says; prints the table and returns what the JSON line holds."""
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
    try:
        line = json.dumps(run(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
