"""Validation videos: a few prompts through the block loop of inference, written to files and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.cache.window import Window
from longlive.generation.caches import history_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.dimensions import Timing
from longlive.generation.sampling import sample
from longlive.generation.transition import Transition
from longlive.miniature import oracle
from longlive.miniature.captions import parse
from longlive.miniature.world import Captioned
from longlive.models.vae import StreamDecoder, settings_of
from longlive.models.wan import WanTransformer
from longlive.training.clips import Embed
from longlive.video import VideoWriter, contact_sheet, evenly_spaced, to_uint8

Measure = Callable[[Tensor, Sequence[PromptSchedule]], dict[str, float]]
"""Measurements of videos, uint8 `[N, T, Y, X, 3]`, given the prompts they should show."""

Validate = Callable[[WanTransformer, Path, int], dict[str, float]]
"""Makes validation videos with a network at a step, writes pictures into a folder, returns measurements; a `Preview` is one."""

MAX_WRITTEN = 12  # videos that are written to files; all are measured


class Preview:
    """Generates a video of each schedule with few-step sampling, always from the same noise; writes mp4 files and a contact sheet.

    Args:
        embed: embeddings `[1, L, E]` of a prompt.
        steps: timesteps of the denoising passes.
        measure: None: nothing is measured.
        write: whether this rank writes files; all ranks generate the videos, since a sharded network only runs on all ranks.
    """

    def __init__(
        self,
        schedules: Sequence[PromptSchedule],
        vae: AutoencoderKLWan,
        embed: Embed,
        *,
        window: Window,
        block: int,
        steps: Sequence[float],
        num_latent_frames: int,
        height: int,
        width: int,
        transition: Transition,
        seed: int,
        context_t: float = 0.0,
        fps: float = 16,
        measure: Measure | None = None,
        write: bool = True,
    ) -> None:
        if num_latent_frames % block:
            raise ValueError(f"validation videos of {num_latent_frames} frames cannot be cut into blocks of {block}; choose a multiple")
        self.schedules, self.vae, self.embed, self.window, self.block = list(schedules), vae, embed, window, block
        self.steps, self.context_t, self.num_latent_frames, self.transition = list(steps), context_t, num_latent_frames, transition
        stride = settings_of(vae).scale_factor_spatial
        self.size = (height // stride, width // stride)
        self.seed, self.fps, self.measure, self.write = seed, fps, measure, write

    @torch.no_grad()
    def __call__(self, network: WanTransformer, folder: Path, number: int) -> dict[str, float]:
        videos = []
        for index, schedule in enumerate(self.schedules):
            images = self._video(network, schedule, self.seed + index)
            videos.append(images)
            if self.write and index < MAX_WRITTEN:
                with VideoWriter(folder / f"step_{number:06d}_{index}.mp4", fps=self.fps, scale=max(1, 256 // images.shape[1])) as writer:
                    writer.write(images)
        if self.write:
            self._sheet(videos[:MAX_WRITTEN], folder / f"step_{number:06d}.png", number)
        return {} if self.measure is None else self.measure(torch.stack(videos), self.schedules)

    def _video(self, network: WanTransformer, schedule: PromptSchedule, seed: int) -> Tensor:
        """uint8 `[T, Y, X, 3]`."""
        blocks = sample(
            Denoiser(network),
            schedule,
            lambda prompt: network.project_text(self.embed([prompt])),
            cache=history_cache(network, *self.size, window=self.window),
            latent_size=self.size,
            timesteps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            block=self.block,
            num_latent_frames=self.num_latent_frames,
            context_t=self.context_t,
            transition=self.transition,
        )
        decoder = StreamDecoder(self.vae)
        return torch.cat([to_uint8(decoder.decode(made.latents))[0] for made in blocks]).cpu()

    def _sheet(self, videos: Sequence[Tensor], path: Path, number: int) -> None:
        picks = evenly_spaced(len(videos[0]), 6)
        tiles = [images[pick].numpy() for images in videos for pick in picks]
        captions, timing = [], Timing(self.fps, settings_of(self.vae).scale_factor_temporal, self.block)
        for schedule in self.schedules[: len(videos)]:
            for pick in picks:
                cue = [cue for cue in schedule.cues if timing.first_frame(cue.latent_frame) <= pick][-1]
                captions.append(f"{pick / self.fps:.1f} s\n{cue.prompt}")
        contact_sheet(tiles, path, columns=len(picks), captions=captions, title=f"step {number}")


def read_by_oracle(videos: Tensor, schedules: Sequence[PromptSchedule]) -> dict[str, float]:
    """Share of the miniature's videos, uint8 `[N, T, 64, 64, 3]`, whose last second shows each attribute of their last prompt."""
    captions = [Captioned(**parse(schedule.cues[-1].prompt)) for schedule in schedules]
    reading = oracle.read(videos.movedim(-1, 2))
    last = slice(max(0, videos.shape[1] - 16), videos.shape[1])
    right = {f"oracle/{name}": value.float().mean().item() for name, value in reading.correct(captions, last).items()}
    return right | {"oracle/iou": reading.iou[:, last].mean().item()}
