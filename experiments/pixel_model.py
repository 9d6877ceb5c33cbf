"""Videos of the pixel world by one of the miniature's pipelines, a batch at a time, with the past treated as a test wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longlive.cache.window import Window
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.memory import ring_cache
from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.rollout import Recache, Rollout
from longlive.generation.stream import stream
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, MOTIONS, SIZE, SPEED, Captioned
from longlive.models.text import TextEncoder
from longlive.models.vae import StreamDecoder, settings_of
from longlive.ops.flow_matching import warp_steps

IMAGES = 4  # of a latent frame, the first one excepted


@dataclass(frozen=True)
class PixelCut:
    """A prompt switch: the frame, the captions after it, and what it does with the past."""

    frame: int
    captions: Sequence[Captioned]
    recache: Recache = "joint"
    keep_sink: bool = False


class PixelModel:
    """A pipeline of the miniature that was distilled to a few steps.

    Raises:
        ValueError: for a pipeline that was not.
    """

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
        self, captions: Sequence[Captioned], *, num_latent_frames: int, seed: int, window: Window | None = None, cut: PixelCut | None = None
    ) -> Tensor:
        """One video a caption, uint8 `[V, T, 3, 64, 64]`; the same seed gives the same noise."""
        stride = settings_of(self.vae).scale_factor_spatial
        shape = (len(captions), self.block, settings_of(self.vae).z_dim, SIZE // stride, SIZE // stride)
        generator = torch.Generator().manual_seed(seed)

        def draw(_: object) -> Tensor:
            return torch.randn(shape, generator=generator)

        said = {"before": captions} if cut is None else {"before": captions, "after": cut.captions}
        texts = {name: self.network.read(self.encoder.encode([canonical(c) for c in words])) for name, words in said.items()}
        schedule = PromptSchedule.single("before") if cut is None else PromptSchedule.at_frames(["before", "after"], [cut.frame])
        cache = ring_cache(self.network, *shape[3:], window=window or self.window, batch=len(captions))
        recache = "joint" if cut is None else cut.recache
        rollout = Rollout(Denoiser(self.network), cache, steps=self.steps, draw=draw, recache=recache)
        decoder, parts = StreamDecoder(self.vae), []
        for made in stream(
            rollout,
            schedule,
            read=texts.__getitem__,
            noise=draw,
            block=self.block,
            num_latent_frames=num_latent_frames,
            keep_sink=cut is not None and cut.keep_sink,
        ):
            images = decoder.decode(made.latents).transpose(1, 2)
            parts.append(((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(parts, dim=1)


def first_image(frame: int) -> int:
    """Of a latent frame."""
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
    """Of each image against the median of the `reference` images, relative, `[V, T]`; 1 where there is no subject."""
    usual = reading.radius[:, reference].nanmedian(dim=1, keepdim=True).values
    return ((reading.radius - usual).abs() / usual).nan_to_num(1.0)


def jump(reading: oracle.Reading, captions: Sequence[Captioned]) -> Tensor:
    """Pixels between the position of each image and where the one before and the caption's motion put it, `[V, T]`; half the picture
    where there is no subject."""
    step = SPEED * torch.tensor([MOTIONS[caption.motion] for caption in captions]).float()
    beyond = (reading.displacement - step[:, None] + SIZE / 2) % SIZE - SIZE / 2
    return torch.cat([torch.zeros(len(beyond), 1), beyond.norm(dim=-1).nan_to_num(SIZE / 2)], dim=1)
