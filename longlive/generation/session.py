"""A running video: iterate for decoded frames, prompt from any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from longlive.generation.cues import Cue, Cues, PromptQueue
from longlive.generation.stream import Made, Seconds
from longlive.models.vae import StreamDecoder


@dataclass(frozen=True)
class Chunk:
    """The images of one block.

    `images`: uint8 `[B, T, Y, X, 3]` on the CPU; `frames`: its latent frames; `prompt`: in force; `switched`: it began with
    this block; `seconds`: what the block cost, by part.
    """

    images: UInt8[Tensor, "B T Y X 3"]
    frames: range
    prompt: str
    switched: bool
    seconds: Seconds


class TypedOver:
    """Cues of a plan, unless somebody has typed a prompt since the last block."""

    def __init__(self, plan: Cues) -> None:
        self._plan, self._typed = plan, PromptQueue.empty()

    def put(self, prompt: str, keep_sink: bool | None) -> None:
        self._typed.put(prompt, keep_sink)

    def due(self, after: int, until: int) -> Cue | None:
        planned, typed = self._plan.due(after, until), self._typed.due(after, until)
        return planned if typed is None else typed


class Session:
    """Yields a `Chunk` a block; made by `LongLivePipeline.session`. Generation happens in the thread that iterates."""

    def __init__(self, make: Callable[[Cues], Iterable[Made]], cues: Cues, decoder: StreamDecoder, *, now: Callable[[], float]) -> None:
        self._cues = TypedOver(cues)
        self._made = iter(make(self._cues))
        self._decoder, self._now = decoder, now
        self.timeline: list[Cue] = []
        """The prompts that have taken effect, each with the frame from which on it did."""

    def prompt(self, text: str, *, keep_sink: bool | None = None) -> None:
        """The prompt from the next block on, from any thread. Raises ValueError when it is empty."""
        self._cues.put(text, keep_sink)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    @torch.no_grad()
    def __next__(self) -> Chunk:
        made = next(self._made)
        if made.switched:
            self.timeline.append(replace(made.cue, frame=made.frames.start))
        began = self._now()
        decoded = self._decoder.decode(made.latents)
        images = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()
        made.seconds.decode = self._now() - began
        return Chunk(images, made.frames, made.cue.prompt, made.switched, made.seconds)
