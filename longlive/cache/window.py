"""What a block may see: a window with a frame sink, its arithmetic, and the protocol of the caches that store it.

Knows nothing of denoising steps, losses or texts: a prompt switch is only a call of `forget` or `clear`.
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
        """From the total number of visible frames, as the released configurations count them (12 with a sink of 3)."""
        if visible <= sink:
            raise ValueError(f"a window of {visible} frames with a sink of {sink} leaves no recent frame; choose a larger window")
        return cls(sink, visible - sink)

    @classmethod
    def full(cls, num_latent_frames: int) -> Window:
        """Everything, in a video of at most `num_latent_frames`."""
        return cls(0, num_latent_frames)

    @property
    def visible(self) -> int:
        """Total number of visible frames."""
        return self.sink + self.recent


class KVCache(Protocol):
    """Remembers keys and values of finished frames; what is visible follows from the window."""

    @property
    def end(self) -> int:
        """Frames remembered: the position where the video continues."""
        ...

    @property
    def window(self) -> Window: ...

    def reset(self) -> None:
        """Start a new video."""
        ...

    def view(self, span: range) -> KVView:
        """For denoising `span`, which must begin at `end`, in any number of passes; `end` and the frames that `span` sees do not change.

        The cache may overwrite frames that `span` cannot see: until the next `record`, do not ask for a view of a shorter span.
        """
        ...

    def record(self, span: range) -> AbstractContextManager[KVView]:
        """For one pass over `span`, without gradient, that is remembered when the context ends without an exception."""
        ...

    def skip(self, num_frames: int) -> None:
        """Count the next frames as remembered although they were not recorded: `forget` or `clear` must follow."""
        ...

    def forget(self, *, keep_sink: bool) -> range:
        """At a prompt switch: move `end` back to the first frame that must be recorded again under the new prompt.

        Returns the frames to record, in order, before anything else; empty when the cache is empty.
        """
        ...

    def clear(self) -> None:
        """Drop everything; the video continues at the same position as if it began there, its next frames being the sink."""
        ...


class Extent:
    """Which frames a cache holds, and which of them a span may see: all of the arithmetic of a window, and no tensor.

    What a span sees is two ranges of frames, in the order in which attention reads them: sink and recent. The span's own frames
    are the last.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self.end = 0  # frames remembered: the position where the video continues
        self._begin(0)

    def _begin(self, frame: int) -> None:
        self.sink = range(frame, frame + self.window.sink)  # the frames that are the sink, or will be once they are made
        self._oldest = self.sink.stop  # no recent frame before this one is held

    def visible(self, span: range) -> tuple[range, range]:
        """The frames of sink and recent window that `span` may see, its own included.

        Raises:
            ValueError: when `span` does not begin where the video ends, is empty or is longer than the window.
        """
        if span.start != self.end or span.step != 1:
            raise ValueError(f"frames {span.start}..{span.stop - 1} do not continue the video, which ends before frame {self.end}")
        oldest = self.oldest_recent(span)
        if not 0 < len(span) <= self.window.visible or oldest > max(span.start, self.sink.stop):
            raise ValueError(
                f"a span of {len(span)} frames does not fit a window of {self.window.visible} whose sink has {self.window.sink}"
            )
        return range(self.sink.start, min(self.sink.stop, span.stop)), range(oldest, span.stop)

    def slot(self, frame: int) -> int:
        """Where a cache of `window.visible` slots holds a frame: the sink in the first slots, then the recent frames in turn."""
        if frame in self.sink:
            return frame - self.sink.start
        return self.window.sink + (frame - self.window.sink) % self.window.recent

    def oldest_recent(self, span: range) -> int:
        """The oldest frame after the sink that `span` may see."""
        return max(self._oldest, span.stop - self.window.recent)

    def forget(self, *, keep_sink: bool) -> range:
        """At a prompt switch: go back to the first frame that must be read again; returns the frames to read.

        With the sink kept these are the recent ones: the sink's frames would be queries whose keys are thrown away, and leaving
        them out does not change the others. Otherwise, and while the video is no longer than the window, these are all visible frames,
        the first of which are the new sink.
        """
        end = self.end
        held = end - self.sink.start  # since the video began or was cleared
        if keep_sink and held > self.window.visible:
            self._oldest = self.end = end - self.window.recent
        else:
            self.end = end - min(self.window.visible, held)
            self._begin(self.end)
        return range(self.end, end)

    def clear(self) -> None:
        """Drop everything; the next frames are the sink."""
        self._begin(self.end)

    def state(self) -> dict[str, int]:
        """Three numbers from which `load` restores it."""
        return {"end": self.end, "sink_start": self.sink.start, "oldest": self._oldest}

    def load(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self._begin(state["sink_start"])
        self.end, self._oldest = state["end"], state["oldest"]


class WindowedCache:
    """What every `KVCache` here does with the arithmetic of its window alone."""

    def __init__(self, window: Window) -> None:
        self.window, self._extent = window, Extent(window)

    @property
    def end(self) -> int:
        """See `KVCache`, as for all methods."""
        return self._extent.end

    def reset(self) -> None:
        """Start a new video, in the same buffers."""
        self._extent.reset()

    def skip(self, num_frames: int) -> None:
        self._extent.end += num_frames

    def forget(self, *, keep_sink: bool) -> range:
        return self._extent.forget(keep_sink=keep_sink)

    def clear(self) -> None:
        self._extent.clear()


def block_mask(
    queries: Sequence[int], keys: Sequence[int], *, block: int, window: Window, tokens_per_frame: int = 1
) -> Bool[Tensor, "N K"]:
    """Which key frames the block of each query frame sees, without a cache: past and own block, inside sink or window."""
    q, k = torch.tensor(list(queries))[:, None], torch.tensor(list(keys))[None, :]
    block_end = (q // block + 1) * block
    mask = (k < block_end) & ((k < window.sink) | (k >= block_end - window.recent))
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
