"""What a block may see: a window with a frame sink, and the protocol of the two caches that keep it.

Knows nothing of denoising steps, gradients or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from longlive.types import KVView


@dataclass(frozen=True)
class Window:
    """The first `sink` frames and the last `recent` ones, the current block included (paper: 3 and 9)."""

    sink: int = 3
    recent: int = 9

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise ValueError(f"a window needs sink >= 0 and recent >= 1 frames, got {self.sink} and {self.recent}")

    @classmethod
    def of(cls, visible: int, sink: int) -> Window:
        """From the number of frames visible in all (the released configurations' way of counting: 12 with a sink of 3)."""
        if visible <= sink:
            raise ValueError(f"a window of {visible} frames with a sink of {sink} leaves no recent frame; choose a larger window")
        return cls(sink, visible - sink)

    @classmethod
    def full(cls, num_latent_frames: int) -> Window:
        """Everything, in a video of at most `num_latent_frames`."""
        return cls(0, num_latent_frames)

    @property
    def visible(self) -> int:
        """Frames visible in all."""
        return self.sink + self.recent


class KVCache(Protocol):
    """Remembers keys and values of finished frames; what is visible follows from the window."""

    end: int
    """Frames remembered: the position where the video goes on."""

    window: Window

    def view(self, span: range) -> KVView:
        """For reading, any number of denoising passes over `span`, which must begin at `end`; leaves nothing behind."""
        ...

    def record(self, span: range) -> AbstractContextManager[KVView]:
        """For one pass over `span` that is remembered when the context ends without an exception."""
        ...

    def forget(self, *, keep_sink: bool) -> range:
        """At a prompt switch: drop what the old prompt wrote; returns the frames that must be read again (recorded) now."""
        ...

    def clear(self) -> None:
        """Drop everything; the video goes on at the same position as if it began there, its next frames being the sink."""
        ...


def check_span(span: range, end: int, window: Window) -> None:
    """Raises ValueError when `span` does not begin where the video ends, is empty or is longer than the window."""
    if span.start != end or span.step != 1:
        raise ValueError(f"frames {span.start}..{span.stop - 1} do not go on from frame {end}")
    if not 0 < len(span) <= window.visible:
        raise ValueError(f"a span of {len(span)} frames does not fit a window of {window.visible}")


def frames_to_reread(end: int, window: Window, *, keep_sink: bool) -> range:
    """Frames a prompt switch at frame `end` reads again: the recent ones when the sink stays, else the whole window.

    The sink stays only when the window is past it (`end > window.visible`); before that everything is rewritten. With the
    sink kept, its frames would be queries whose keys are thrown away; leaving them out does not change the others.
    """
    if keep_sink and end > window.visible:
        return range(end - window.recent, end)
    return range(end - min(window.visible, end), end)


def block_mask(
    queries: Sequence[int], keys: Sequence[int], *, block: int, window: Window, tokens_per_frame: int = 1
) -> Bool[Tensor, "N K"]:
    """Which key frames the block of each query frame sees, without a cache: past and own block, inside sink or window."""
    q, k = torch.tensor(list(queries))[:, None], torch.tensor(list(keys))[None, :]
    block_end = (q // block + 1) * block
    mask = (k < block_end) & ((k < window.sink) | (k >= block_end - window.recent))
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
