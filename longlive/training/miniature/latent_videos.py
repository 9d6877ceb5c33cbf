"""Videos of the miniature world as latents, encoded once and stored on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from longlive import video
from longlive.files import replacing
from longlive.generation.dimensions import Timing
from longlive.miniature.world import Captioned, draw_identity, render
from longlive.models.vae import encode_video, settings_of, spatial_padding

log = logging.getLogger(__name__)


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, T, 3, Y, X]` -> `[B, 3, T, Y, X]` in [-1, 1]."""
    return images.transpose(1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """`[B, 3, T, Y, X]` in [-1, 1] -> uint8 `[B, T, 3, Y, X]`, as the oracle reads them."""
    return video.to_uint8(images).movedim(-1, 2)


def save_strips(videos: Tensor, path: Path, *, num_images: int = 8) -> None:
    """Write a PNG with a row per video, uint8 `[N, T, 3, Y, X]`: evenly spaced images at twice their size."""
    picks = torch.linspace(0, videos.shape[1] - 1, min(num_images, videos.shape[1])).round().long()
    sheet = rearrange(videos[:, picks], "N T C Y X -> (N Y) (T X) C").numpy()
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(path)


class LatentVideos:
    """Encoded videos with random captions from a list and random identities.

    They are encoded on first use into `path` (float16) and read from there afterwards. Raises ValueError for a file of other settings.
    If the VAE pads circularly, every draw moves a video to a random cell: moved latents are the latents of the moved video.
    """

    def __init__(
        self,
        path: Path,
        vae: AutoencoderKLWan,
        captions: Sequence[Captioned],
        *,
        num_videos: int,
        num_latent_frames: int,
        seed: int,
        batch: int = 16,
    ) -> None:
        settings = {"num_videos": num_videos, "num_latent_frames": num_latent_frames, "seed": seed, "num_captions": len(captions)}
        if path.exists():
            saved = torch.load(path, weights_only=True, mmap=True)
            if saved["settings"] != settings:
                raise ValueError(f"{path} was made with {saved['settings']}, not {settings}; delete it or choose another run folder")
        else:
            saved = {"settings": settings, **_encode(vae, captions, settings, batch)}
            with replacing(path) as partial:
                torch.save(saved, partial)
        self.latents: Tensor = saved["latents"]  # float16 [num_videos, F, C, H, W]
        self._caption_index: Tensor = saved["captions"]
        self._torus = spatial_padding(vae) == "circular"

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, batch: int, frames: slice, generator: torch.Generator, *, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frames of `batch` random videos, float32 `[B, F, C, H, W]`, and the index of the caption of each `[B]`.

        `weights`: how often each caption is drawn, relative to the others.
        """
        if weights is None:
            picks = torch.randint(len(self), (batch,), generator=generator)
        else:
            picks = torch.multinomial(weights[self._caption_index], batch, replacement=True, generator=generator)
        latents = self.latents[picks][:, frames].float()
        if self._torus:
            cells = [torch.randint(size, (batch,), generator=generator).tolist() for size in latents.shape[-2:]]
            latents = torch.stack([one.roll(by, (-2, -1)) for one, by in zip(latents, zip(*cells, strict=True), strict=True)])
        return latents, self._caption_index[picks]


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, captions: Sequence[Captioned], settings: dict[str, int], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(settings["seed"])
    picks = torch.randint(len(captions), (settings["num_videos"],), generator=generator)
    parts, num_frames = [], Timing(stride=settings_of(vae).scale_factor_temporal).num_frames(settings["num_latent_frames"])
    log.info("encoding %d videos of %d latent frames", settings["num_videos"], settings["num_latent_frames"])
    for part in tqdm(picks.split(batch), desc="encoding", mininterval=5):
        chosen = [captions[int(i)] for i in part]
        images = render(chosen, [draw_identity(generator) for _ in chosen], num_frames)
        parts.append(encode_video(vae, to_float(images)).half())
    return {"latents": torch.cat(parts), "captions": picks}
