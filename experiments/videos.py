"""Test prompts, and the videos that a network makes of them by the block loop of inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.state_model import BLOCK, STEPS, WINDOW
from experiments.state_world import LATENT_SHAPE, text_of
from longlive.cache.ring import RingCache
from longlive.cache.window import KVCache, Window
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.memory import ring_cache
from longlive.generation.rollout import Recache, Rollout
from longlive.generation.stream import stream
from longlive.miniature.captions import SwitchPair
from longlive.miniature.world import ATTRIBUTES, Captioned, held_out
from longlive.models.wan import WanTransformer
from longlive.types import Latents


class Video(NamedTuple):
    """Latents `[V, F, 8, 4, 4]`, and wall seconds of the network for each block of the batch."""

    latents: Latents
    seconds: list[float]


def switch_pairs(count: int) -> list[SwitchPair]:
    """Captions that training never shows, and the same with one attribute changed: each attribute in turn, its new value drawn."""
    generator = torch.Generator().manual_seed(20250923)
    pairs = []
    for number, before in enumerate((held_out(100) * (count // 100 + 1))[:count]):
        attribute = tuple(ATTRIBUTES)[number % len(ATTRIBUTES)]
        others = [value for value in ATTRIBUTES[attribute] if value != getattr(before, attribute)]
        value = others[int(torch.randint(len(others), (), generator=generator))]
        pairs.append(SwitchPair(before, before.with_one_change(attribute, value), attribute))
    return pairs


class Cut(NamedTuple):
    """A prompt switch: the frame, the captions after it, and what it does with the past."""

    frame: int
    captions: Sequence[Captioned]
    recache: Recache = "joint"
    keep_sink: bool = False


def make(
    network: WanTransformer,
    captions: Sequence[Captioned],
    *,
    num_latent_frames: int,
    seed: int,
    window: Window = WINDOW,
    relative: bool = False,
    cut: Cut | None = None,
    cache: KVCache | None = None,
) -> Video:
    """One video a caption, all in one batch; the same seed gives all arms the same noise.

    Args:
        relative: the sink's keys are turned so that they always stand just before the window.
        cache: another than a ring for `window`.
    """
    generator, shape = torch.Generator().manual_seed(seed), (len(captions), BLOCK, *LATENT_SHAPE)

    def draw(_: object) -> Tensor:
        return torch.randn(shape, generator=generator)

    if cache is None:
        cache = _ring(network, len(captions), window, relative)
    schedule = PromptSchedule.single("before") if cut is None else PromptSchedule.at_frames(["before", "after"], [cut.frame])
    with torch.no_grad():
        texts = {"before": network.read(text_of(captions))}
        if cut is not None:
            texts["after"] = network.read(text_of(cut.captions))
        rollout = Rollout(Denoiser(network), cache, steps=STEPS, draw=draw, recache="joint" if cut is None else cut.recache)
        made = stream(
            rollout,
            schedule,
            read=texts.__getitem__,
            noise=draw,
            block=BLOCK,
            num_latent_frames=num_latent_frames,
            keep_sink=cut is not None and cut.keep_sink,
        )
        parts, seconds = [], []
        for part in made:
            parts.append(part.latents)
            seconds.append(part.seconds.network)
    return Video(torch.cat(parts, dim=1), seconds)


def _ring(network: WanTransformer, batch: int, window: Window, relative: bool) -> RingCache:
    return ring_cache(network, *LATENT_SHAPE[1:], window=window, batch=batch, relative=relative)
