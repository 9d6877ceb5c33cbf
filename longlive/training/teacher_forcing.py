"""Teacher forcing: flow matching of every block at once, each noisy block seeing the clean blocks before it.

One forward pass over `[x0 history ; noisy blocks]` with the mask of the window stands in for as many passes of the
block loop as there are blocks. The objective knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longlive.cache.window import Window, block_mask
from longlive.models.wan import WanTransformer
from longlive.ops.attention import SequenceView
from longlive.ops.flow_matching import add_noise
from longlive.types import Latents, Text, Timesteps


@lru_cache(maxsize=256)
def teacher_forcing_mask(
    x0: tuple[int, ...], noisy: tuple[int, ...], *, block: int, window: Window, tokens_per_frame: int
) -> Bool[Tensor, "N N"]:
    """What `[x0 frames ; noisy frames]` (positions) may see: clean sees clean up to its own block, noisy sees clean before its
    block and itself; the past through sink and window only."""
    q, k = torch.tensor(x0 + noisy), torch.tensor(x0 + noisy)
    noisy_q = (torch.arange(len(q)) >= len(x0))[:, None]
    noisy_k = (torch.arange(len(k)) >= len(x0))[None, :]
    same_block = (q[:, None] // block) == (k[None, :] // block)
    seen = block_mask(q.tolist(), k.tolist(), block=block, window=window)
    mask = torch.where(noisy_q, torch.where(noisy_k, same_block, seen & ~same_block), seen & ~noisy_k)
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


class TeacherForcing:
    """Mean of (v - (noise - x))^2 over the noisy blocks of a clip.

    Args:
        block: frames a block; positions of a clip must be whole blocks.
        window: what a block may see at inference.
    """

    def __init__(self, network: WanTransformer, *, block: int, window: Window) -> None:
        self.network, self.block, self.window = network, block, window

    def __call__(
        self,
        clip: Latents,
        frames: Sequence[int],
        text: Text,
        *,
        t: Float[Tensor, "B blocks"],
        noise: Latents,
        context_blocks: int = 0,
        history: Latents | None = None,
    ) -> Tensor:
        """The loss of one clip.

        Args:
            clip: `[B, F, C, H, W]`, clean; the first `context_blocks` blocks are only seen, the rest carry the loss.
            frames: position in the video of each of the F frames.
            t: timestep of each block that carries the loss.
            noise: Gaussian, like the frames that carry the loss.
            history: the clip as later blocks see it (`clip` itself if None), e.g. a little damaged.
        """
        start = context_blocks * self.block
        levels: Timesteps = t.repeat_interleave(self.block, dim=1)
        noisy = add_noise(clip[:, start:], noise, levels)
        seen = (clip if history is None else history)[:, : -self.block]  # the last block is nobody's history
        frames = tuple(frames)
        clean_frames, noisy_frames = frames[: seen.shape[1]], frames[start:]
        rope = self.network.rope(*clip.shape[-2:])
        mask = None  # a first block alone sees all of itself
        if clean_frames:
            frames_seen = {"block": self.block, "window": self.window, "tokens_per_frame": rope.tokens_per_frame}
            mask = teacher_forcing_mask(clean_frames, noisy_frames, **frames_seen).to(clip.device)
        t_all = torch.cat([torch.zeros(seen.shape[:2], device=clip.device), levels], dim=1)
        velocity = self.network(torch.cat([seen, noisy], dim=1), t_all, text, SequenceView(rope.at(clean_frames + noisy_frames), mask))
        return (velocity[:, seen.shape[1] :].float() - (noise - clip[:, start:]).float()).square().mean()
