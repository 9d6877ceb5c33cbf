"""Images that a video begins with or continues: made fit, encoded, and remembered before the first block. Knows nothing of pipelines.

Text-to-video weights take them without training: the clean latents of the given images pass through the network as those of finished blocks
do, and the blocks that follow see them in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from PIL import Image as PILImage

from longlive.models.vae import encode_video, settings_of
from longlive.types import Images, Latents


@dataclass(frozen=True)
class Given:
    """Latents `[1, k, C, h, w]` that a video begins with.

    `shown`: whether their images are part of the video; otherwise it continues after them. `digest`: of the images, for the timeline.
    """

    latents: Latents
    shown: bool
    digest: str


def pixels(images: Any, height: int, width: int) -> Images:
    """Images as the VAE reads them, `[1, 3, T, height, width]` in [-1, 1]: scaled to cover the size, and cut at its middle.

    `images`: one or several PIL images; an array `[H, W, 3]` or `[T, H, W, 3]`, uint8 or floating point in [0, 1]; a tensor `[3, H, W]` or
    `[T, 3, H, W]`, likewise. Raises ValueError for anything else.
    """
    if isinstance(images, PILImage.Image):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(image, PILImage.Image) for image in images):
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if isinstance(images, np.ndarray) and images.ndim in (3, 4):
        images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    if not isinstance(images, torch.Tensor) or images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape:
        got = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"no RGB images: {got}; give PIL images, an array [T, H, W, 3] or a tensor [T, 3, H, W]")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point() or not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(f"images are uint8, or floating point in [0, 1]; these are {images.dtype} with values outside")
    images = images.float().reshape(-1, *images.shape[-3:])
    scale = max(height / images.shape[-2], width / images.shape[-1])
    size = [max(least, round(length * scale)) for least, length in zip((height, width), images.shape[-2:])]
    if size != list(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = images[:, :, top : top + height, left : left + width]
    return (cut * 2 - 1).movedim(0, 1)[None]


@torch.no_grad()
def given(vae: AutoencoderKLWan, images: Images, *, shown: bool, most_latent_frames: int) -> Given:
    """Encode images `[1, 3, T, H, W]`: one picture, or the newest of a video that fit into `most_latent_frames`.

    Raises ValueError for a picture to be shown that is several.
    """
    stride = settings_of(vae).scale_factor_temporal
    if shown and images.shape[2] != 1:
        raise ValueError(f"image is one picture, not {images.shape[2]}; several are continued with video")
    latent_frames = min(most_latent_frames, (images.shape[2] - 1) // stride + 1)
    newest = images[:, :, images.shape[2] - (stride * (latent_frames - 1) + 1) :]
    latents = encode_video(vae, newest.to(vae.device, vae.dtype))
    return Given(latents, shown, hashlib.sha256(newest.cpu().numpy().tobytes()).hexdigest()[:16])
