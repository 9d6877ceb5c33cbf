"""FLOPs and bytes of a training step of a real size, counted on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import AutoencoderKLWan
from step_parts import PARTS, ROLLOUT, Held, LiveMemory, Parts, clips_of, held, measured_parts
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longlive.cache.window import Window
from longlive.config import DistillationConfig
from longlive.engine.apply import Recipe
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.vae import settings_of
from longlive.models.wan import WanTransformer
from longlive.ops import attention
from longlive.ops.flow_matching import warp_steps
from longlive.parallel.world import SharedChoices, World
from longlive.training.clips import StreamingTuner, anchor_frame
from longlive.training.dmd import DMD
from longlive.training.networks import TrainableNetwork
from longlive.training.prompts import Chain

GROUPS = {  # groups of the design: their parts here, and their share of the designed 3,139 TFLOP
    "critic": (("critic forward", "critic backward"), 0.39),
    "rollout": (ROLLOUT, 0.25),
    "teacher": (("teacher",), 0.21),
    "VAE": (("anchor",), 0.10),
    "generator backward": (("generator backward",), 0.04),
}
DESIGNED_TFLOP = 3139


class _SamePrompts:
    """Empty prompts without end."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def next(self) -> list[Chain]:
        return [("", "")] * self._batch

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        assert not state


class _FirstChoice(SharedChoices):
    """Always chooses the first option: every block ends after its first denoising pass."""

    def integer(self, n: int) -> int:
        return 0


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with the FLOPs and saved tensors of a fused kernel, which the meta device does not choose by itself."""
    assert mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


class MetaStage(NamedTuple):
    """A training stage on the meta device for the first `clips` clips of a video; later ones cost as much as the last of them."""

    tuner: StreamingTuner
    objective: DMD
    generator: TrainableNetwork
    critic: TrainableNetwork
    clips: int


def meta_stage(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig, *, layers: int) -> MetaStage:
    """Generator and critic of `size` and a `teacher` (arguments of `WanTransformer`) with `layers` layers each, in bfloat16."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    with meta:
        networks = [WanTransformer(**{**kind, "num_layers": layers}) for kind in (size, size, teacher)]
        lora = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
        generator, critic = (
            TrainableNetwork(network, lr=1.0, recipe=Recipe(checkpointing=settings.checkpointing), **lora) for network in networks[:2]
        )
    for network in networks:
        torch.nn.Module.to(network, dtype)  # not diffusers' own `to`, which warns
    networks[2].requires_grad_(False)
    sizes, window = networks[0].config, Window.of(settings.window, settings.sink)
    stride = settings.clip_frames - settings.overlap
    starts = [0, *range(settings.clip_frames, max(settings.max_frames) - stride + 1, stride)]
    clips = next((n for n, start in enumerate(starts, 1) if start >= window.visible), len(starts))

    def noise(frames: int) -> Tensor:
        return torch.empty(settings.batch, frames, sizes.in_dim, settings.height // 8, settings.width // 8, device=meta)

    rollout = Rollout(
        Denoiser(networks[0]),
        history_cache(networks[0], settings.height // 8, settings.width // 8, window=window, batch=settings.batch),
        FewStep(warp_steps(settings.denoising_steps, settings.timestep_shift), torch.empty_like),
        context_t=settings.context_timestep,
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
        transition=Transition(settings.keep_sink, settings.recache),
    )
    objective = DMD(Denoiser(networks[2]), Denoiser(networks[1]), guidance_scale=settings.guidance_scale, shift=settings.timestep_shift)
    return MetaStage(tuner, objective, generator, critic, clips)


def flops_of_clips(stage: MetaStage) -> list[dict[str, float]]:
    """FLOPs by part for each clip, with both networks trained on it and one denoising pass per block."""
    tuner, objective = stage.tuner, stage.objective
    found = []
    with FlopCounterMode(display=False) as counter, mock.patch.object(attention, "choose", lambda *_: _flash):
        parts = Parts(counter.get_total_flops)
        with measured_parts(parts, tuner, objective, stage.generator, stage.critic):
            for _ in range(stage.clips):
                before = counter.get_total_flops()
                clip = tuner.clip(grad=True)
                t, noise = objective.draw_timesteps(clip.latents, torch.Generator()), torch.empty_like(clip.latents)
                objective.generator_loss(clip.latents, clip.text, clip.text, t=t, noise=noise).loss.backward()
                objective.critic_loss(clip.latents, clip.text, t=t, noise=noise).backward()
                sums = {part: parts.sums[part] for part in PARTS}
                found.append({**sums, "rest": counter.get_total_flops() - before - sum(sums.values())})
                parts.sums.clear()
    return found


def flops_of_anchor(vae: AutoencoderKLWan, settings: DistillationConfig) -> float:
    """FLOPs of the first frame of a clip that continues a video."""
    frames = settings.clip_frames - settings.overlap + 1
    size = (settings.batch, frames, settings_of(vae).z_dim, settings.height // 8, settings.width // 8)
    with FlopCounterMode(display=False) as counter:
        anchor_frame(vae, torch.empty(size, device=vae.device), context=settings.anchor_context)
    return counter.get_total_flops()


def on_a_line(one: float, two: float, layers: int) -> float:
    """Extrapolation to `layers` equal layers from the values with one and with two."""
    return one + (layers - 1) * (two - one)


def depth(kind: Mapping[str, Any]) -> int:
    """Number of layers of a network with these arguments."""
    with torch.device("meta"):
        return WanTransformer(**kind).config.num_layers


def flops_of_step(
    size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig, *, anchor: float = 0.0
) -> dict[str, float]:
    """FLOPs by part per step: the mean over a cycle of `critic_updates` steps, exit steps, and all clips of videos of all lengths.

    `anchor`: FLOPs of one anchor frame.
    """
    layers = dict.fromkeys(PARTS, depth(size)) | {"teacher": depth(teacher)}
    one, two = (flops_of_clips(meta_stage(size, teacher, settings, layers=n)) for n in (1, 2))
    counted = [{part: on_a_line(a[part], b[part], layers[part]) for part in PARTS} for a, b in zip(one, two, strict=True)]
    videos = [clips_of(frames, settings.clip_frames, settings.overlap) for frames in settings.max_frames]
    inside = [sum(frame < frames for frame in settings.switch_at) for frames in settings.max_frames]
    switches = sum(min(settings.num_switches, count) for count in inside)
    clips = [counted[min(number, len(counted) - 1)] for video in videos for number in range(video)]
    mean = {part: sum(clip[part] for clip in clips) / len(clips) for part in PARTS}
    mean["recache"] = counted[-1]["recache"] * switches / len(clips)
    mean["anchor"] = anchor * (len(clips) - len(videos)) / len(clips)
    mean["denoise"] *= (len(settings.denoising_steps) + 1) / 2
    of_generator = 1 / settings.critic_updates
    times = dict.fromkeys(PARTS, of_generator) | dict.fromkeys((*ROLLOUT, "anchor"), 1 + of_generator)
    times |= {"critic forward": 1, "critic backward": 1}
    return {part: settings.gradient_accumulation * times[part] * mean[part] for part in PARTS}


def activations(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> dict[str, Held]:
    """Bytes held by a clip with gradient late in a video, and by the critic's loss on a clip; all layers, bfloat16."""

    def of(layers: int) -> dict[str, Held]:
        stage = meta_stage(size, teacher, settings, layers=layers)
        with mock.patch.object(attention, "choose", lambda *_: _flash):
            with LiveMemory(torch.device("meta")) as live:
                for _ in range(stage.clips - 1):
                    stage.tuner.clip(grad=False)
                clip = held(live, lambda: stage.tuner.clip(grad=True).latents)
            with LiveMemory(torch.device("meta")) as live:
                latents, text = stage.tuner.noise(settings.clip_frames), stage.tuner.embed([""] * settings.batch)
                t = stage.objective.draw_timesteps(latents, torch.Generator())
                loss = held(live, lambda: stage.objective.critic_loss(latents, text, t=t, noise=latents))
        return {"generator": clip, "critic": loss}

    one, two, layers = of(1), of(2), depth(size)
    return {
        name: Held(on_a_line(one[name].saved, b.saved, layers), on_a_line(one[name].alive, b.alive, layers), b.backward)
        for name, b in two.items()
    }


def parameters(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> dict[str, tuple[float, float]]:
    """Number of parameters of each network, adapters included, and of those that are trained."""

    def of(layers: int) -> dict[str, list[int]]:
        stage = meta_stage(size, teacher, settings, layers=layers)
        score = stage.objective.teacher
        assert isinstance(score, Denoiser)
        networks = {"generator": stage.generator.network, "critic": stage.critic.network, "teacher": score.network}
        return {
            name: [sum(p.numel() for p in network.parameters() if p.requires_grad or not only) for only in (False, True)]
            for name, network in networks.items()
        }

    one, two = of(1), of(2)
    layers = {"generator": depth(size), "critic": depth(size), "teacher": depth(teacher)}
    return {name: tuple(on_a_line(a, b, layers[name]) for a, b in zip(one[name], two[name], strict=True)) for name in layers}  # type: ignore[misc]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """FLOPs per step by part; bytes of weights, gradients and AdamW by network; bytes held by activations."""

    flops: dict[str, float]
    flops_plain: dict[str, float]
    weights: dict[str, tuple[float, float, float]]
    checkpointed: dict[str, Held]
    plain: dict[str, Held]


def count(size: Mapping[str, Any], teacher: Mapping[str, Any], settings: DistillationConfig) -> Count:
    """Count a stage with generator and critic of `size`; trained weights are float32, all other weights and activations bfloat16."""
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


def table_of_count(counted: Count, *, designed: bool) -> str:
    """`designed`: whether the design has numbers to compare with."""
    whole, plain = sum(counted.flops.values()), sum(counted.flops_plain.values())
    lines = [f"{'TFLOP per step':26}{'checkpointed':>14}{'share':>8}{'plain':>10}"]
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
        lines += [f"  the design rounds parts to whole percents: ±{DESIGNED_TFLOP / 200:.0f} TFLOP", ""]
    lines += [f"{'GB':26}{'weights':>14}{'gradients':>11}{'AdamW':>9}   whole, before anything is sharded over ranks"]
    for name, parts in counted.weights.items():
        lines.append(f"{f'  {name}':26}{parts[0] / 1e9:14.3g}{parts[1] / 1e9:11.3g}{parts[2] / 1e9:9.3g}")
    lines += ["", f"{'GB':26}{'held':>14}{'saved':>11}{'backward':>9}   by activations, one rank"]
    for kind, networks in (("checkpointed", counted.checkpointed), ("plain", counted.plain)):
        for name, bytes_ in networks.items():
            title = f"  {name}, {kind}"
            lines.append(f"{title:26}{bytes_.alive / 1e9:14.3g}{bytes_.saved / 1e9:11.3g}{bytes_.backward / 1e9:9.3g}")
    return "\n".join(lines)
