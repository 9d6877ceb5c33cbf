"""A small decoder of a VAE's latents, in the layout of TAEHV for Wan 2.1 or of other sizes: 25 times less work than Wan's own.

Two-dimensional convolutions only; time is in "memory blocks", which see their own input one frame earlier, and in layers that make two
frames of one. It reads latents as the DiT makes them, without mean and scale. Knows nothing of blocks, prompts or files.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from longlive.models.vae import SpatialPadding
from longlive.types import Images, Latents

Memory = list[Tensor | None]
"""The last input of every memory block `[B, 1, C, h, w]`; None: a video begins, so that zeros are seen."""


class Clamp(nn.Module):
    """3 tanh(x / 3): outliers of latents are bounded."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


class MemoryBlock(nn.Module):
    """relu(f([x, past]) + x), past being the same block's input one frame earlier."""

    def __init__(self, width: int, padding: SpatialPadding) -> None:
        super().__init__()
        sizes = (2 * width, width, width)
        convolutions = [nn.Conv2d(size, width, 3, padding=1, padding_mode=padding) for size in sizes]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor, last: Tensor | None) -> Tensor:
        """`x` and the result `[B, F, C, h, w]`; `last`: the frame before `x`."""
        if last is None:
            last = torch.zeros_like(x[:, :1])
        past = torch.cat([last, x[:, :-1]], dim=1)
        flat = x.flatten(0, 1)
        return functional.relu(self.conv(torch.cat([flat, past.flatten(0, 1)], dim=1)) + flat).unflatten(0, x.shape[:2])


class Grow(nn.Module):
    """Makes `times` frames of each; their channels lie side by side, frame by frame, in the convolution's output."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)


class TinyVAE(ModelMixin, ConfigMixin):
    """The weights of a tiny decoder; `TinyDecoder` runs them. The defaults are the sizes of TAEHV for Wan 2.1, 9.84 million weights.

    Args:
        latent_channels: of the VAE whose latents it decodes.
        widths: channels of each level; each doubles height and width.
        growth: by how much each level multiplies the number of frames.
        num_blocks: memory blocks of each level.
        patch_size: pixels of an image, each way, that its last layer makes as channels.
        spatial_padding: as in `models.vae`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: tuple[int, ...] = (256, 128, 64),
        growth: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 3,
        patch_size: int = 1,
        spatial_padding: SpatialPadding = "zeros",
    ) -> None:
        super().__init__()
        if len(widths) != len(growth):
            raise ValueError(f"{len(widths)} widths and {len(growth)} factors of growth; give one of each per level")

        def conv3(before: int, after: int, *, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(before, after, 3, padding=1, bias=bias, padding_mode=spatial_padding)

        layers: list[nn.Module] = [Clamp(), conv3(latent_channels, widths[0]), nn.ReLU()]
        for width, following, times in zip(widths, (*widths[1:], widths[-1]), growth, strict=True):
            layers += [MemoryBlock(width, spatial_padding) for _ in range(num_blocks)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times), conv3(width, following, bias=False)]
        layers += [nn.ReLU(), conv3(widths[-1], 3 * patch_size**2)]
        self.decoder = nn.Sequential(*layers)
        self.patch_size, self.images_per_latent = patch_size, math.prod(growth)
        self.spatial_stride = patch_size * 2 ** len(widths)
        self.num_memories = num_blocks * len(widths)

    def forward(self, latents: Latents, memory: Memory) -> tuple[Images, Memory]:
        """Images about in [0, 1], not clamped, with `images_per_latent` per latent frame; and the new memory."""
        batch = latents.shape[0]
        x, new, before = latents.to(self.dtype), [], iter(memory)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                new.append(x[:, -1:])
                x = layer(x, next(before))
                continue
            flat = x.flatten(0, 1)
            if isinstance(layer, Grow):
                x = rearrange(layer.conv(flat), "(B F) (s C) h w -> B (F s) C h w", B=batch, s=layer.times)
            else:
                x = layer(flat).unflatten(0, (batch, -1))
        size = self.patch_size
        return rearrange(x, "B T (C y x) h w -> B C T (h y) (w x)", y=size, x=size), new


class TinyDecoder:
    """Decodes latents a few frames at a time by a `TinyVAE`: as many images as `StreamDecoder` gives, 1 first and 4 per frame after that.

    >>> decoder = TinyDecoder(vae)
    >>> images = torch.cat([decoder.decode(block) for block in latents.split(3, dim=1)], dim=2)  # = decoded at once
    """

    def __init__(self, vae: TinyVAE) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self.memory: Memory = [None] * self.vae.num_memories
        self.num_latent_frames = 0  # passed so far

    def detach(self) -> None:
        """Cut the gradient to the frames before: truncated back-propagation through time."""
        self.memory = [None if last is None else last.detach() for last in self.memory]

    def decode(self, latents: Latents, *, clamp: bool = True) -> Images:
        """The next images `[B, 3, T, H, W]` in [-1, 1] of latents `[B, F, C, h, w]` as the DiT makes them; see `StreamDecoder.decode`."""
        images, self.memory = self.vae(latents, self.memory)
        if self.num_latent_frames == 0:
            images = images[:, :, self.vae.images_per_latent - 1 :]
        self.num_latent_frames += latents.shape[1]
        return 2 * (images.clamp(0, 1) if clamp else images) - 1
