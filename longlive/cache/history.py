"""The cache of training: slots are appended and never overwritten while a gradient may need them.

A view reads slots that stay as they are, so that recomputing a layer under activation checkpointing sees exactly what the
forward pass saw, whatever was recorded since. Remembered keys and values are detached: context is a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longlive.cache.memory import CacheView, HistoryMemory, TokenIndices, token_indices
from longlive.cache.window import Window, WindowedCache
from longlive.ops.rope import Rope


class HistoryCache(WindowedCache):
    """Keys and values of the sink and the recent frames, one buffer `[B, slots * tokens, A, D]` per layer and kind.

    When the buffers are full, the frames that can still be seen are copied to new ones; the old ones live as long as a
    gradient refers to them.

    Args:
        num_layers, batch, num_heads: of the network and the videos.
        rope: of a frame's grid of tokens; the buffers are on its device.
        window: which frames are visible.
        dtype: of the keys and values that the network computes.
        slots: capacity of the buffers in frames, by default twice the number of visible frames; it grows when it does not suffice.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        rope: Rope,
        window: Window,
        dtype: torch.dtype = torch.float32,
        slots: int | None = None,
    ) -> None:
        super().__init__(window)
        self._rope, self._tokens = rope, rope.tokens_per_frame
        self._num_slots = 2 * window.visible if slots is None else slots
        self._shape = (num_layers, batch, num_heads, dtype)
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        super().reset()
        self._allocate_all()
        self._slot: dict[int, int] = {}  # slot of the newest copy of each frame that is still visible
        self._used = 0  # slots that are taken: they are never written again

    def reserve(self, num_frames: int) -> None:
        """Make room for `num_frames` more, so that no frame has to be copied while they are made."""
        if self._used + num_frames > self._num_slots:
            self._num_slots = max(self._num_slots, len(self._slot) + num_frames)
            self._compact()

    def view(self, span: range) -> CacheView:
        """See `KVCache`. A pass leaves what is remembered as it is, and carries gradients."""
        return self._view(span, self._slots_of(span), written=[self._num_slots] * len(span))

    @contextmanager
    def record(self, span: range) -> Iterator[CacheView]:
        slots = self._slots_of(span)
        yield self._view(span, slots, written=slots[-len(span) :])
        self._slot |= dict(zip(span, slots[-len(span) :]))
        self._used += len(span)
        self._extent.end = span.stop
        self._drop_unseen()

    def forget(self, *, keep_sink: bool) -> range:
        span = super().forget(keep_sink=keep_sink)
        self._slot = {frame: slot for frame, slot in self._slot.items() if frame < span.start and frame in self._extent.sink}
        return span

    def clear(self) -> None:
        super().clear()
        self._slot = {}

    def state(self) -> dict[str, Any]:
        """All that later blocks depend on, on the CPU: what a run stopped in the middle of a video saves."""
        indices = self._indices(list(self._slot.values()))
        keys, values = ([buffer.index_select(1, indices).cpu() for buffer in buffers] for buffers in (self._keys, self._values))
        return {"extent": self._extent.state(), "frames": list(self._slot), "keys": keys, "values": values}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._num_slots = max(self._num_slots, len(state["frames"]))
        self.reset()
        self._extent.load(state["extent"])
        self._copy_in(state["frames"], state["keys"], state["values"])

    def _allocate_all(self) -> None:
        self._keys: tuple[Tensor, ...] = ()  # free before new ones are made, unless a gradient refers to them
        self._values: tuple[Tensor, ...] = ()
        self._keys, self._values = self._allocate(), self._allocate()

    def _allocate(self) -> tuple[Tensor, ...]:
        num_layers, batch, num_heads, dtype = self._shape
        tokens = (self._num_slots + 1) * self._tokens  # the last slot is scratch: passes that are not recorded write there
        shape = (batch, tokens, num_heads, self._rope.head_dim)
        return tuple(torch.empty(shape, dtype=dtype, device=self._rope.device) for _ in range(num_layers))

    def _view(self, span: range, slots: Sequence[int], *, written: Sequence[int]) -> CacheView:
        visible, own = self._indices(slots), self._indices(range(len(slots) - len(span), len(slots)))
        keys, values, stored = self._keys, self._values, self._indices(written)
        return CacheView(self._rope.at(span), lambda layer: HistoryMemory(keys[layer], values[layer], visible, own, stored))

    def _slots_of(self, span: range) -> list[int]:
        """Slots of all frames that `span` may see, its own, which are still free, at the end."""
        sink, recent = self._extent.visible(span)
        self.reserve(len(span))
        past = [frame for frame in (*sink, *recent) if frame < span.start]
        return [self._slot[frame] for frame in past] + list(range(self._used, self._used + len(span)))

    def _indices(self, slots: Sequence[int]) -> TokenIndices:
        return token_indices(slots, self._tokens, self._rope.device)

    def _drop_unseen(self) -> None:
        oldest = self.end + 1 - self.window.recent  # for the next frame alone
        self._slot = {frame: slot for frame, slot in self._slot.items() if frame in self._extent.sink or frame >= oldest}

    def _compact(self) -> None:
        """New buffers with the frames that can still be seen; views of the old ones stay valid."""
        indices = self._indices(list(self._slot.values()))
        keys, values = ([buffer.index_select(1, indices) for buffer in buffers] for buffers in (self._keys, self._values))
        self._allocate_all()
        self._copy_in(list(self._slot), keys, values)

    def _copy_in(self, frames: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        length = len(frames) * self._tokens
        for buffers, contents in ((self._keys, keys), (self._values, values)):
            for buffer, content in zip(buffers, contents, strict=True):
                buffer[:, :length] = content.to(buffer.device)
        self._slot, self._used = {frame: slot for slot, frame in enumerate(frames)}, len(frames)
