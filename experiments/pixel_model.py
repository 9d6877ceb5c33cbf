"""Batches of videos by one of the miniature's pipelines, with a choice of what a switch does with the past; metrics in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.videos import Cut, captions_by_cue, cues_of
from longlive.cache.window import Window
from longlive.generation.caches import ring_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.sampling import sample
from longlive.generation.transition import Transition
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, MOTIONS, SIZE, SPEED, Captioned
from longlive.models.text import TextEncoder
from longlive.models.vae import StreamDecoder, settings_of
from longlive.ops.flow_matching import warp_steps
from longlive.video import to_uint8

IMAGES = 4  # per latent frame, except the first


class PixelModel:
    """A pipeline of the miniature that was distilled to a few steps. Raises ValueError for one that was not."""

    def __init__(self, model: str | Path) -> None:
        pipe = LongLivePipeline.from_pretrained(model)
        if not pipe.config.fresh_noise:
            raise ValueError(f"{model} is not distilled to a few steps; give the result of stage init or long")
        self.block, self.window = pipe.config.block, Window.of(pipe.config.window, pipe.config.sink)
        self.steps = warp_steps(pipe.config.denoising_steps, pipe.config.timestep_shift)
        self.network, self.vae, self.fps = pipe.transformer, pipe.vae, pipe.config.fps
        self.encoder = TextEncoder(pipe.text_encoder, pipe.tokenizer, text_len=self.network.config.text_len)

    @torch.no_grad()
    def make(
        self, captions: Sequence[Captioned], *, num_latent_frames: int, seed: int, window: Window | None = None, cut: Cut | None = None
    ) -> Tensor:
        """One video per caption, uint8 `[V, T, 3, 64, 64]`; the same seed gives the same noise."""
        said = captions_by_cue(captions, cut)
        side = SIZE // settings_of(self.vae).scale_factor_spatial
        blocks = sample(
            Denoiser(self.network),
            cues_of(cut),
            lambda prompt: self.network.project_text(self.encoder.encode([canonical(c) for c in said[prompt]])),
            cache=ring_cache(self.network, side, side, window=window or self.window, batch=len(captions)),
            latent_size=(side, side),
            timesteps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            batch=len(captions),
            block=self.block,
            num_latent_frames=num_latent_frames,
            transition=Transition() if cut is None else cut.transition,
        )
        decoder = StreamDecoder(self.vae)
        return torch.cat([to_uint8(decoder.decode(made.latents)) for made in blocks], dim=1).movedim(-1, 2)


def first_image(frame: int) -> int:
    """The number of the first image of a latent frame."""
    return 0 if frame == 0 else 1 + IMAGES * (frame - 1)


def right(reading: oracle.Reading, captions: Sequence[Captioned]) -> dict[str, Tensor]:
    """Whether each image shows each captioned attribute, float `[V, T]`; the first image moves as the second does."""
    found = {}
    for name, values in ATTRIBUTES.items():
        seen = reading.motion if name == "motion" else getattr(reading, name)
        if name == "motion":
            seen = torch.cat([seen[:, :1], seen], dim=1)
        said = torch.tensor([tuple(values).index(getattr(caption, name)) for caption in captions])
        found[name] = (seen == said[:, None]).float()
    return found


def radius_change(reading: oracle.Reading, reference: slice) -> Tensor:
    """Relative change against the median radius of the `reference` images, `[V, T]`; 1 where there is no subject."""
    usual = reading.radius[:, reference].nanmedian(dim=1, keepdim=True).values
    return ((reading.radius - usual).abs() / usual).nan_to_num(1.0)


def jump(reading: oracle.Reading, captions: Sequence[Captioned]) -> Tensor:
    """Pixels between each position and that expected from the previous image and the caption's motion, `[V, T]`; half the image's size
    where there is no subject."""
    step = SPEED * torch.tensor([MOTIONS[caption.motion] for caption in captions]).float()
    beyond = (reading.displacement - step[:, None] + SIZE / 2) % SIZE - SIZE / 2
    return torch.cat([torch.zeros(len(beyond), 1), beyond.norm(dim=-1).nan_to_num(SIZE / 2)], dim=1)
