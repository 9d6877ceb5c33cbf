"""Streaming long tuning: the model generates long videos and is trained on them one clip at a time.

A clip is what a teacher of short clips can judge. The video continues from clip to clip through the same block loop as inference; only
the newest clip's frames carry a gradient, so memory does not grow with the video. The initial stage uses videos of a single clip. Knows
no loss and no optimiser; frames are latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Bool, Float
from torch import Tensor

from longlive.cache.history import HistoryCache
from longlive.generation.rollout import Rollout
from longlive.generation.transition import Transition
from longlive.models.vae import StreamDecoder, StreamEncoder
from longlive.parallel.world import SharedChoices
from longlive.training.prompts import Chain
from longlive.types import Latents, Text, TextKV

Anchor = Callable[[Latents], Float[Tensor, "B 1 C H W"]]
"""The last of some frames, made into the first frame of a clip: `[B, F, C, H, W]` -> `[B, 1, C, H, W]`."""

Embed = Callable[[Sequence[str]], Text]
"""Embeddings of prompts, on the network's device."""


class Prompts(Protocol):
    """A source of batches of prompts, each with those that follow it."""

    def next(self) -> list[Chain]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Clip:
    """A clip as teacher and critic see it.

    Attributes:
        latents: `[B, F, C, H, W]`; the first frame encodes a single image, as the first frame of every video does.
        fresh: the frames generated for this clip; only these carry loss.
        text: embeddings of the prompts at its end, which the losses use for the whole clip.
        frames: positions of the fresh frames in the video.
        prompts, earlier: of the fresh frames, and of those before them in the clip (the same but after a switch).
    """

    latents: Latents
    fresh: Bool[Tensor, "B F"]
    text: Text
    frames: range
    prompts: tuple[str, ...]
    earlier: tuple[str, ...]


class StreamingTuner:
    """Generates long videos one after another, in batches, and cuts them into overlapping clips (streaming long tuning, LongLive).

    Lengths, switches and exit steps come from `choices`, the same on all ranks; each rank has its own prompts and noise.

    Args:
        rollout: over a `HistoryCache`; its denoiser's network is the generator in training.
        embed: embeddings of prompts.
        noise: Gaussian latents `[B, F, C, H, W]` of a batch for the given number of frames.
        clip_frames: frames of a clip (21: 5 seconds); the first clip of a video consists of new frames,
        overlap: every later one shares this many frames with the previous clip.
        max_frames: lengths of videos, one chosen for each. A video ends where no further whole clip fits.
        switch_at: frames at which the prompt may switch, each the start of a clip. Empty: never.
        num_switches: how many of them are chosen for each video, of those that lie in it.
        transition: what a switch does with the past.
        anchor: makes the first frame of a clip that continues a video; None: the latent frame is used as it is.

    Raises:
        ValueError: when a length is not a multiple of `block`, a switch is not at the start of a clip, or there are too few of them.
    """

    def __init__(
        self,
        rollout: Rollout,
        prompts: Prompts,
        *,
        embed: Embed,
        noise: Callable[[int], Latents],
        choices: SharedChoices,
        block: int = 3,
        clip_frames: int = 21,
        overlap: int = 3,
        max_frames: Sequence[int] = (240,),
        switch_at: Sequence[int] = (),
        num_switches: int = 1,
        transition: Transition = Transition(keep_sink=False),  # noqa: B008  # frozen
        anchor: Anchor | None = None,
    ) -> None:
        if not isinstance(rollout.cache, HistoryCache):
            raise ValueError(
                f"training needs a HistoryCache, which never overwrites what a gradient may need; got a {type(rollout.cache).__name__}"
            )
        for name, frames in (("clip_frames", clip_frames), ("overlap", overlap)):
            if frames < 0 or frames % block:
                raise ValueError(f"{name} {frames} cannot be cut into blocks of {block}; choose a multiple")
        if not 0 < overlap < clip_frames:
            raise ValueError(f"clips of {clip_frames} frames cannot overlap by {overlap}; choose 1 to {clip_frames - 1}")
        if not max_frames or min(max_frames) < clip_frames:
            raise ValueError(f"videos of {list(max_frames)} frames are shorter than a clip of {clip_frames}")
        starts = self._starts(max(max_frames), clip_frames, overlap)
        if wrong := [frame for frame in switch_at if frame not in starts]:
            where = f"prompts can switch at {', '.join(map(str, starts))}" if starts else "these videos are one clip long"
            raise ValueError(f"no clip starts at frame {wrong[0]} in videos of {max(max_frames)} frames; {where}")
        if not 1 <= num_switches <= max(1, len(switch_at)):
            raise ValueError(f"num_switches {num_switches}: choose 1 to {max(1, len(switch_at))}, the number of frames of switch_at")
        self.rollout, self.cache, self.prompts, self.embed = rollout, rollout.cache, prompts, embed
        self.noise, self.choices = noise, choices
        self.block, self.clip_frames, self.overlap = block, clip_frames, overlap
        self.max_frames, self.switch_at, self.num_switches = tuple(max_frames), tuple(switch_at), num_switches
        self.transition, self.anchor = transition, anchor
        self._chains: list[Chain] = []
        self._length, self._switches = 0, list[int]()  # of the current video
        self._previous: Latents | None = None  # its newest `clip_frames` frames

    @staticmethod
    def _starts(length: int, clip_frames: int, overlap: int) -> range:
        """Where the clips after the first start in a video of `length` frames."""
        new = clip_frames - overlap
        return range(clip_frames, length - new + 1, new)

    @property
    def between_videos(self) -> bool:
        """Whether the next clip starts a new video."""
        return self._previous is None or self.rollout.end + self.clip_frames - self.overlap > self._length

    def clip(self, *, grad: bool) -> Clip:
        """Continue the video by one clip, or start the next video.

        `grad`: whether the new frames carry a gradient, which passes through the last denoising pass of each block only.
        """
        if self.between_videos:
            self._begin()
        previous = self._previous
        start = self.rollout.end
        frames = range(start, start + self.clip_frames - (0 if previous is None else self.overlap))
        prompts = self._prompts_at(start)
        text = self.embed(prompts)
        with torch.set_grad_enabled(grad):
            read = self.rollout.denoiser.network.project_text(text)  # for every clip again: the weights have changed
        if start in self._switches:
            self.rollout.switch(read, self.transition)
        self.cache.reserve(len(frames))
        made = self._make(frames, read, grad=grad)
        if previous is None:
            latents = made
        else:
            whole = torch.cat([previous, made], dim=1)
            old = whole[:, : 1 - self.clip_frames].detach()
            first = old[:, -1:] if self.anchor is None else self.anchor(old)
            latents = torch.cat([first.detach(), whole[:, 1 - self.clip_frames :]], dim=1)
        known = made.detach() if previous is None else torch.cat([previous, made.detach()], dim=1)
        self._previous = known[:, -self.clip_frames :]
        fresh = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
        fresh[:, -len(frames) :] = True
        return Clip(latents, fresh, text, frames, tuple(prompts), tuple(self._prompts_at(max(start - 1, 0))))

    def _begin(self) -> None:
        self._length = self.choices.pick(self.max_frames)
        starts = self._starts(self._length, self.clip_frames, self.overlap)
        inside = [frame for frame in self.switch_at if frame in starts]
        self._switches = []
        for _ in range(min(self.num_switches, len(inside))):
            self._switches.append(self.choices.pick([frame for frame in inside if frame not in self._switches]))
        self._chains, times = self.prompts.next(), len(self._switches)
        if short := [chain for chain in self._chains if len(chain) <= times]:
            told = (
                "has no switch prompt"
                if times == 1
                else f"is followed by {len(short[0]) - 1} prompts, and its video switches {times} times"
            )
            raise ValueError(f"prompt {short[0][0]!r} {told}; give switch prompts or leave switch_at empty")
        self.rollout.reset()
        self._previous = None

    def _prompts_at(self, frame: int) -> list[str]:
        switched = sum(switch <= frame for switch in self._switches)
        return [chain[switched] for chain in self._chains]

    def _make(self, frames: range, text: TextKV, *, grad: bool) -> Latents:
        """New frames, block by block, all with the same random number of denoising passes."""
        num_passes = 1 + self.choices.integer(len(self.rollout.solver.timesteps))
        made = []
        for _ in range(frames.start, frames.stop, self.block):
            made.append(self.rollout.block(self.noise(self.block), text, num_passes=num_passes, grad=grad))
            self.rollout.remember(made[-1], text)
        return torch.cat(made, dim=1)

    def state(self) -> dict[str, Any]:
        """The position in the prompts, and the video in progress if any; the caller saves the states of noise and `choices`."""
        video = None
        if self._previous is not None and not self.between_videos:
            video = {
                "chains": self._chains,
                "length": self._length,
                "switches": self._switches,
                "previous": self._previous.cpu().clone(),  # cloned: a view would be saved with its whole storage
                "rollout": self.rollout.state(),
                "cache": self.cache.state(),
            }
        return {"prompts": self.prompts.state(), "video": video}

    def load(self, state: dict[str, Any], *, device: torch.device | str = "cpu") -> None:
        """The inverse of `state`."""
        self.prompts.load(state["prompts"])
        video = state["video"]
        self._previous = None
        if video is not None:
            self._chains, self._length, self._switches = video["chains"], video["length"], video["switches"]
            self._previous = video["previous"].to(device)
            self.rollout.load(video["rollout"], device=device)
            self.cache.load(video["cache"])


@torch.no_grad()
def anchor_frame(vae: AutoencoderKLWan, frames: Latents, *, context: int | None = None) -> Float[Tensor, "B 1 C H W"]:
    """The last image of some latent frames, encoded alone: `[B, F, C, H, W]` -> `[B, 1, C, H, W]`.

    The first latent frame of a video encodes one image, every other one four; a teacher trained on whole videos expects the first frame
    of a clip to encode one. The frames are decoded as if they started a video. The decoder's memory is short, so decoding only the last
    `context` frames (None: all) gives nearly the same image at less cost; docs/training.md has the differences.

    Raises:
        ValueError: when `context` is less than 1.
    """
    if context is not None and context < 1:
        raise ValueError(f"anchor_context {context}: choose 1 frame or more")
    part = frames if context is None else frames[:, -context:]
    decoder, image = StreamDecoder(vae), None
    for start in range(part.shape[1]):
        image = decoder.decode(part[:, start : start + 1])
    assert image is not None
    return StreamEncoder(vae).encode(image[:, :, -1:]).to(frames.dtype)
