"""Teacher forcing: flow matching of all blocks in one pass, where each noisy block attends to the clean blocks before it.

A forward pass over `[clean frames ; noisy frames]`, with a mask for the window, replaces one pass of the block loop per block. Knows no
trainer; frames are latent frames.
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
    """What frames at positions `[x0 ; noisy]` may attend to.

    Clean frames: clean frames up to their own block. Noisy frames: clean frames before their block, and their own block. The past is
    visible through sink and window only.
    """
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
        block: frames per block; the frames of a clip must be whole blocks.
        window: of the attention at inference.
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
            clip: `[B, F, C, H, W]`, clean; the first `context_blocks` blocks are context only, the others carry the loss.
            frames: position in the video of each of the F frames.
            t: timestep of each block that carries the loss.
            noise: Gaussian, of the shape of the frames that carry the loss.
            history: the clip as later blocks see it, e.g. with a little noise; None: `clip` itself.
        """
        start = context_blocks * self.block
        t_noisy: Timesteps = t.repeat_interleave(self.block, dim=1)
        noisy = add_noise(clip[:, start:], noise, t_noisy)
        seen = (clip if history is None else history)[:, : -self.block]  # no block attends to the last one
        frames = tuple(frames)
        clean_frames, noisy_frames = frames[: seen.shape[1]], frames[start:]
        rope = self.network.rope(*clip.shape[-2:])
        mask = None  # a single block attends to all of itself
        if clean_frames:
            frames_seen = {"block": self.block, "window": self.window, "tokens_per_frame": rope.tokens_per_frame}
            mask = teacher_forcing_mask(clean_frames, noisy_frames, **frames_seen).to(clip.device)
        t_all = torch.cat([torch.zeros(seen.shape[:2], device=clip.device), t_noisy], dim=1)
        velocity = self.network(torch.cat([seen, noisy], dim=1), t_all, text, SequenceView(rope.at(clean_frames + noisy_frames), mask))
        return (velocity[:, seen.shape[1] :].float() - (noise - clip[:, start:]).float()).square().mean()
