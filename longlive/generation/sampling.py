"""A video from a network in one call: denoiser, solver, noise and block loop put together.

Text encoders and decoders belong to the caller. Knows only latents: frames are latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from longlive.cache.window import KVCache
from longlive.generation.cues import Cues
from longlive.generation.denoiser import Denoiser
from longlive.generation.noise import Noise
from longlive.generation.rollout import Rollout
from longlive.generation.solver import Euler, FewStep
from longlive.generation.stream import LatentBlock, stream
from longlive.generation.transition import Transition
from longlive.models.wan import WanTransformer
from longlive.types import Text


@torch.no_grad()
def sample(
    network: WanTransformer,
    cues: Cues,
    embed: Callable[[str], Text],
    *,
    cache: KVCache,
    latent_size: tuple[int, int],
    steps: Sequence[float],
    generator: torch.Generator,
    num_latent_frames: int,
    block: int,
    batch: int = 1,
    fresh_noise: bool = True,
    context_t: float = 0.0,
    transition: Transition = Transition(),  # noqa: B008  # frozen
) -> Iterator[LatentBlock]:
    """Blocks of a batch of videos that follow the same cues, without gradients.

    All noise, of blocks and between denoising steps, comes from `generator` in the order of use: the same seed gives the same video.

    Args:
        embed: embeddings `[B, L, E]` of a cue's prompt; it may stand for a different sentence in each video of the batch.
        cache: empty, for this network, batch and latent size.
        latent_size: height and width of the latents.
        steps: timesteps of the denoising passes, decreasing from 1000.
        transition: what a prompt switch does with the past, unless its cue says so itself.
        fresh_noise: add new noise between steps (few-step models); false: Euler steps, for a network that was not distilled.

    Raises:
        ValueError: when `num_latent_frames` is not a multiple of `block`.
    """
    noise = Noise(generator, batch, device=network.device, dtype=network.dtype)
    solver = FewStep(steps, noise.like) if fresh_noise else Euler(steps)
    yield from stream(
        Rollout(Denoiser(network), cache, solver, context_t=context_t),
        cues,
        project_text=lambda prompt: network.project_text(embed(prompt)),
        noise=lambda frames: noise((batch, len(frames), network.config.in_dim, *latent_size)),
        block=block,
        num_latent_frames=num_latent_frames,
        transition=transition,
    )
