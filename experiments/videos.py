"""Test prompts, and a network's videos of them by the block loop of inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from experiments.state_model import BLOCK, STEPS, WINDOW
from experiments.state_world import LATENT_SHAPE, text_of
from longlive.cache.window import KVCache, Window
from longlive.generation.caches import ring_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.sampling import sample
from longlive.generation.transition import Transition
from longlive.miniature.captions import SwitchPair
from longlive.miniature.world import ATTRIBUTES, Captioned, held_out
from longlive.models.wan import WanTransformer
from longlive.types import Latents


class Video(NamedTuple):
    """Latents `[V, F, 8, 4, 4]`, and wall seconds of the network for each block of the batch."""

    latents: Latents
    seconds: list[float]


def switch_pairs(count: int) -> list[SwitchPair]:
    """Held-out captions, and the same with one attribute changed: each attribute in turn, with a random new value."""
    generator = torch.Generator().manual_seed(20250923)
    pairs = []
    for number, before in enumerate((held_out(100) * (count // 100 + 1))[:count]):
        attribute = tuple(ATTRIBUTES)[number % len(ATTRIBUTES)]
        others = [value for value in ATTRIBUTES[attribute] if value != getattr(before, attribute)]
        value = others[int(torch.randint(len(others), (), generator=generator))]
        pairs.append(SwitchPair(before, before.with_one_change(attribute, value), attribute))
    return pairs


class Cut(NamedTuple):
    """A prompt switch: its frame, the captions after it, and what it does with the past."""

    frame: int
    captions: Sequence[Captioned]
    transition: Transition = Transition(keep_sink=False)


def cues_of(cut: Cut | None) -> PromptSchedule:
    """The prompts "before" and "after" the switch; without one "before" alone."""
    return PromptSchedule.single("before") if cut is None else PromptSchedule.at_latent_frames(["before", "after"], [cut.frame])


def captions_by_cue(captions: Sequence[Captioned], cut: Cut | None) -> dict[str, Sequence[Captioned]]:
    """The captions of a batch that each prompt of `cues_of` stands for."""
    return {"before": captions} if cut is None else {"before": captions, "after": cut.captions}


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
    """One video per caption, in one batch; the same seed gives all arms the same noise.

    Args:
        relative: the sink is rotated to stand just before the window (infinite mode).
        cache: None: a ring for `window`.
    """
    if cache is None:
        cache = ring_cache(network, *LATENT_SHAPE[1:], window=window, batch=len(captions), relative=relative)
    said = captions_by_cue(captions, cut)
    blocks = list(
        sample(
            Denoiser(network),
            cues_of(cut),
            lambda prompt: network.project_text(text_of(said[prompt])),
            cache=cache,
            latent_size=LATENT_SHAPE[1:],
            timesteps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            batch=len(captions),
            block=BLOCK,
            num_latent_frames=num_latent_frames,
            transition=Transition() if cut is None else cut.transition,
        )
    )
    return Video(torch.cat([made.latents for made in blocks], dim=1), [made.seconds.network for made in blocks])
