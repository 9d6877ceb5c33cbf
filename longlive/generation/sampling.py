"""A video from a denoiser in one call: solver, noise and block loop put together.

Text encoders and decoders belong to the caller. Knows only latents: frames are latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from longlive.cache.window import KVCache
from longlive.generation.active_text import Embeddings
from longlive.generation.cues import Cues
from longlive.generation.denoiser import Denoiser
from longlive.generation.noise import Generators, Noise
from longlive.generation.rollout import OnStep, Rollout
from longlive.generation.solver import Euler, FewStep
from longlive.generation.stream import LatentBlock, stream
from longlive.generation.transition import Transition
from longlive.types import Latents, TextKV


def sample(
    denoiser: Denoiser,
    cues: Cues,
    project_text: Callable[[str], TextKV],
    *,
    cache: KVCache,
    latent_size: tuple[int, int],
    timesteps: Sequence[float],
    generator: Generators,
    block: int,
    num_latent_frames: int | None,
    batch: int = 1,
    latents: Latents | None = None,
    fresh_noise: bool = True,
    context_t: float = 0.0,
    transition: Transition = Transition(),  # noqa: B008  # frozen
    embeddings: Embeddings | None = None,
    start: Latents | None = None,
    guided_blocks: int | None = None,
    on_step: OnStep | None = None,
    should_abort: Callable[[], bool] | None = None,
) -> Iterator[LatentBlock]:
    """Blocks of a batch of videos that follow the same cues, without gradients; arguments not listed are those of `stream`.

    All noise, of blocks and between denoising steps, comes from `generator` in the order of use: the same seed gives the same video.

    Args:
        project_text: text keys and values of a cue's prompt; it may stand for another sentence in each video of the batch.
        cache: empty, for this network, batch and latent size.
        latent_size: height and width of the latents.
        timesteps: of the denoising passes, decreasing from 1000.
        latents: the Gaussian noise to start from, `[B, F, C, H, W]`, instead of drawing it.
        fresh_noise: add new noise between steps (few-step models); false: Euler steps, for a network that was not distilled.

    Raises:
        ValueError: when `num_latent_frames` is not a multiple of `block`.
    """
    network = denoiser.network
    draw = Noise(generator, batch, device=network.device, dtype=network.dtype)

    def noise(frames: range) -> Latents:
        if latents is None:
            return draw((batch, len(frames), network.config.in_dim, *latent_size))
        return latents[:, frames.start : frames.stop].to(network.device, network.dtype)

    blocks = stream(
        Rollout(denoiser, cache, FewStep(timesteps, draw.like) if fresh_noise else Euler(timesteps), context_t=context_t, on_step=on_step),
        cues,
        project_text=project_text,
        noise=noise,
        block=block,
        num_latent_frames=num_latent_frames,
        transition=transition,
        embeddings=embeddings,
        start=None if start is None else start.to(network.device, network.dtype).expand(batch, -1, -1, -1, -1),
        guided_blocks=guided_blocks,
        should_abort=should_abort,
        snapshot=draw.snapshot,
    )
    return _without_gradients(blocks)


@torch.no_grad()  # of a generator: while a block is made, not in its consumer
def _without_gradients(blocks: Iterator[LatentBlock]) -> Iterator[LatentBlock]:
    yield from blocks
