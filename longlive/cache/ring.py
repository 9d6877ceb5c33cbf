"""The cache of inference: fixed buffers; entries are overwritten, never copied from slot to slot.

Attention does not depend on the order of keys. With the rotation already in the keys, a new frame overwrites the oldest
recent one in place and attention runs over the buffer as it lies: no roll, no copy, no concatenation, any number of
frames. Slots 0..sink-1 hold the sink; a later frame f is in slot sink + (f - sink) mod recent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from longlive.cache.memory import CacheView, RingMemory, TokenIndices, token_indices
from longlive.cache.window import Window, WindowedCache
from longlive.ops.rope import Rope, rotate


class RingCache(WindowedCache):
    """Keys and values of the sink and the recent frames, `[layers, B, slots * tokens, A, D]`, allocated once.

    `relative=True` is the infinite mode: before each block the sink's keys are rotated so that they sit just before the
    oldest recent frame. Attention depends only on differences of positions, so this equals numbering the visible frames
    0, 1, 2, … and keeps distances inside the trained range at any length.

    Args:
        num_layers, batch, num_heads: of the network and the videos.
        rope: of a frame's grid of tokens; the buffers are on its device.
        window: which frames are visible; the capacity of the buffers.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        rope: Rope,
        window: Window,
        relative: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(window)
        self.relative, self._rope, self._tokens = relative, rope, rope.tokens_per_frame
        shape = (num_layers, batch, window.visible * self._tokens, num_heads, rope.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=rope.device)
        self.values = torch.zeros(shape, dtype=dtype, device=rope.device)
        # The sink's keys as they were recorded: rotating a rotated key again would add rounding at every block.
        self._sink_keys = torch.zeros_like(self.keys[:, :, : window.sink * self._tokens]) if relative else None
        self._shifted = 0  # frames by which the sink's keys in the buffer are moved

    def view(self, span: range) -> CacheView:
        """See `KVCache`. A pass writes into the span's own slots, whose old frames the span may not see anyway."""
        sink, recent = self._extent.visible(span)
        if self.relative:
            self._shift_sink(self._extent.oldest_recent(span))
        slots = {self._extent.slot(frame) for frame in (*sink, *recent)}
        length, own = len(slots) * self._tokens, self._indices([self._extent.slot(frame) for frame in span])
        keys, values = self.keys, self.values
        if slots == set(range(len(slots))):  # always so, except after `clear` or during a block-by-block recache
            memory = lambda layer: RingMemory(keys[layer][:, :length], values[layer][:, :length], own)  # noqa: E731
            return CacheView(self._rope.at(span), memory, (own,) if len(slots) == self.window.visible else None)
        visible = self._indices(sorted(slots))
        return CacheView(self._rope.at(span), lambda layer: RingMemory(keys[layer], values[layer], own, visible))

    @contextmanager
    def record(self, span: range) -> Iterator[CacheView]:
        yield self.view(span)
        self._extent.end = span.stop
        if self._sink_keys is not None and span.start < self._extent.sink.stop:
            self._sink_keys.copy_(self.keys[:, :, : self._sink_keys.shape[2]])

    def _indices(self, slots: Sequence[int]) -> TokenIndices:
        return token_indices(slots, self._tokens, self.keys.device)

    def _shift_sink(self, oldest: int) -> None:
        """Move the sink's keys to the positions just before frame `oldest`."""
        assert self._sink_keys is not None
        by = oldest - self._extent.sink.stop  # 0 for a span that records the sink: what is moved back then is overwritten
        if by != self._shifted:
            self.keys[:, :, : self._sink_keys.shape[2]] = rotate(self._sink_keys, self._rope.time_shift(by))
            self._shifted = by
