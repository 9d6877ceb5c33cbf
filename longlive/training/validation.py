"""Validation videos: a few prompts through the block loop of inference, written to files and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
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
from longlive.miniature.captions import SwitchPair, canonical, parse
from longlive.miniature.switches import AFTER, JUDGED, after_switch, images_needed, switch_pairs
from longlive.miniature.world import ATTRIBUTES, FPS, Captioned, training_set, validation_set
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
        batch: how many videos with the same switches are made together.
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
        batch: int = 1,
        measure: Measure | None = None,
        write: bool = True,
    ) -> None:
        if num_latent_frames % block:
            raise ValueError(f"validation videos of {num_latent_frames} frames cannot be cut into blocks of {block}; choose a multiple")
        self.schedules, self.vae, self.embed, self.window, self.block = list(schedules), vae, embed, window, block
        self.steps, self.context_t, self.num_latent_frames, self.transition = list(steps), context_t, num_latent_frames, transition
        stride = settings_of(vae).scale_factor_spatial
        self.size = (height // stride, width // stride)
        self.seed, self.fps, self.batch, self.measure, self.write = seed, fps, batch, measure, write

    @torch.no_grad()
    def __call__(self, network: WanTransformer, folder: Path, number: int) -> dict[str, float]:
        videos = self._videos(network)
        for index, images in enumerate(videos[:MAX_WRITTEN]):
            if self.write:
                with VideoWriter(folder / f"step_{number:06d}_{index}.mp4", fps=self.fps, scale=max(1, 256 // images.shape[1])) as writer:
                    writer.write(images)
        if self.write:
            self._sheet(videos[:MAX_WRITTEN], folder / f"step_{number:06d}.png", number)
        return {} if self.measure is None else self.measure(torch.stack(videos), self.schedules)

    def _videos(self, network: WanTransformer) -> list[Tensor]:
        """uint8 `[T, Y, X, 3]` of every schedule; those that switch at the same frames are made in batches."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, schedule in enumerate(self.schedules):
            alike.setdefault(tuple((cue.latent_frame, cue.transition) for cue in schedule.cues), []).append(index)
        made: dict[int, Tensor] = {}
        for indices in alike.values():
            for start in range(0, len(indices), self.batch):
                part = indices[start : start + self.batch]
                made |= dict(zip(part, self._batch(network, part), strict=True))
        return [made[index] for index in range(len(self.schedules))]

    def _batch(self, network: WanTransformer, indices: Sequence[int]) -> Tensor:
        """uint8 `[B, T, Y, X, 3]`; each video has the noise of its own seed, so that it is the same in any batch."""
        cues = self.schedules[indices[0]].cues
        said = {str(number): [self.schedules[index].cues[number].prompt for index in indices] for number in range(len(cues))}
        blocks = sample(
            Denoiser(network),
            PromptSchedule(tuple(replace(cue, prompt=str(number)) for number, cue in enumerate(cues))),
            lambda number: network.project_text(self.embed(said[number])),
            cache=history_cache(network, *self.size, window=self.window, batch=len(indices)),
            latent_size=self.size,
            timesteps=self.steps,
            generator=[torch.Generator().manual_seed(self.seed + index) for index in indices],
            block=self.block,
            num_latent_frames=self.num_latent_frames,
            batch=len(indices),
            context_t=self.context_t,
            transition=self.transition,
        )
        decoder = StreamDecoder(self.vae)
        return torch.cat([to_uint8(decoder.decode(made.latents)) for made in blocks], dim=1).cpu()

    def _sheet(self, videos: Sequence[Tensor], path: Path, number: int) -> None:
        picks = evenly_spaced(len(videos[0]), 6)
        tiles = [images[pick].numpy() for images in videos for pick in picks]
        captions, timing = [], Timing(self.fps, settings_of(self.vae).scale_factor_temporal, self.block)
        for schedule in self.schedules[: len(videos)]:
            for pick in picks:
                cue = [cue for cue in schedule.cues if timing.first_frame(cue.latent_frame) <= pick][-1]
                captions.append(f"{pick / self.fps:.1f} s\n{cue.prompt}")
        contact_sheet(tiles, path, columns=len(picks), captions=captions, title=f"step {number}")


def miniature_schedules(count: int, *, switch_at: int | None) -> list[PromptSchedule]:
    """What validation videos of the miniature show: combinations that neither the test nor, in the recipe, the training has.

    At latent frame `switch_at` (None: never) one attribute changes, each in turn, into such a combination.

    Raises:
        ValueError: when there are not as many.
    """
    captions = validation_set()
    if switch_at is not None:
        pairs = switch_pairs(captions, -(-count // len(ATTRIBUTES)), seed=0, old=training_set())[:count]
        return [PromptSchedule.at_latent_frames([canonical(pair.before), canonical(pair.after)], [switch_at]) for pair in pairs]
    if count > len(captions):
        raise ValueError(
            f"validation_videos {count}: the miniature has {len(captions)} combinations for validation; choose at most as many"
        )
    return [PromptSchedule.single(canonical(one)) for one in captions[:count]]


def read_by_oracle(videos: Tensor, schedules: Sequence[PromptSchedule]) -> dict[str, float]:
    """What the oracle reads in the miniature's videos, uint8 `[N, T, 64, 64, 3]`.

    "oracle/…": share of videos whose last second shows each attribute of their last prompt, all of them ("all"), and by value, as
    `Reading.shares`. "switch/…", of all switches of one attribute that a video shows for a second and a half: shares of
    `AfterSwitch.outcomes`, and "new", "kept" and "lost" by attribute ("switch/new/background").
    """
    images, said = videos.movedim(-1, 2), [[Captioned(**parse(cue.prompt)) for cue in schedule.cues] for schedule in schedules]
    last = oracle.read(images[:, -FPS:]).shares([captions[-1] for captions in said])
    found = {f"oracle/{name}": value for name, value in last.items()}
    switches: dict[tuple[int, int], list[tuple[int, SwitchPair]]] = {}  # first image, end -> videos and what changes
    timing = Timing()
    for video, (schedule, captions) in enumerate(zip(schedules, said, strict=True)):
        starts = [timing.first_frame(cue.latent_frame) for cue in schedule.cues] + [videos.shape[1]]
        for number, (before, after) in enumerate(pairwise(captions), 1):
            changed = [name for name in ATTRIBUTES if getattr(before, name) != getattr(after, name)]
            if len(changed) == 1 and starts[number + 1] - starts[number] >= AFTER + JUDGED:
                switches.setdefault((starts[number], starts[number + 1]), []).append((video, SwitchPair(before, after, changed[0])))
    outcomes: dict[str, list[float]] = {}
    for (at, end), members in switches.items():
        needed, pairs = images_needed(at), [pair for _, pair in members]
        shown = images[[video for video, _ in members], needed.start : min(end, needed.stop)]
        for name, values in after_switch(shown, pairs, at - needed.start).outcomes().items():
            for pair, value in zip(pairs, values.tolist(), strict=True):
                outcomes.setdefault(f"switch/{name}", []).append(float(value))
                if name in ("new", "kept", "lost"):
                    outcomes.setdefault(f"switch/{name}/{pair.attribute}", []).append(float(value))
    return found | {name: sum(values) / len(values) for name, values in outcomes.items()}
