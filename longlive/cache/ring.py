"""The cache of inference: fixed buffers in which nothing ever moves.

Attention does not care about the order of keys. With the rotation already in the keys, a new frame overwrites the oldest
recent one in place and attention runs over the buffer as it lies: no roll, no copy, no concatenation, any number of
frames. Slots 0..sink-1 hold the sink; frame f beyond it sits in slot sink + (f - sink) mod recent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from longlive.cache.window import Window, check_span, frames_to_reread
from longlive.ops.rope import rotate, turn_in_time
from longlive.types import Heads, Mask, Seen


class Run(NamedTuple):
    """Consecutive frames in consecutive slots; starts and length in tokens."""

    slot: int
    source: int
    length: int


class RingView:
    """A span's place in the ring: its own slots, and the slots it may see."""

    mask: Mask | None = None

    def __init__(self, ring: RingCache, span: range, runs: list[Run], seen: slice | Tensor) -> None:
        self.frames = span
        self._ring, self._runs, self._seen = ring, runs, seen

    def extend(self, layer: int, k: Heads, v: Heads) -> tuple[Seen, Seen]:
        """Write the span's keys and values into its own slots (whose old frames it may not see anyway); see the buffer."""
        keys, values = self._ring.keys[layer], self._ring.values[layer]
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("a RingCache is overwritten in place and cannot carry gradients; use a HistoryCache")
        for slot, source, length in self._runs:
            keys[:, slot : slot + length] = k[:, source : source + length]
            values[:, slot : slot + length] = v[:, source : source + length]
        return keys[:, self._seen], values[:, self._seen]


class RingCache:
    """Keys and values of the sink and the recent frames, `[layers, B, slots * tokens, A, D]`, allocated once.

    `relative=True` is the infinite mode: before each block the sink's keys are turned so that they sit just before the
    oldest recent frame. Only differences of positions matter to attention, so this equals numbering the visible frames
    0, 1, 2, … and keeps distances inside the trained range at any length.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        tokens_per_frame: int,
        num_heads: int,
        head_dim: int,
        window: Window,
        relative: bool = False,
        theta: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window, self.relative, self._theta, self._tokens = window, relative, theta, tokens_per_frame
        shape = (num_layers, batch, window.visible * tokens_per_frame, num_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # The sink's keys as they were recorded: turning a turned key again would add rounding at every block.
        self._sink_keys = torch.zeros_like(self.keys[:, :, : window.sink * tokens_per_frame]) if relative else None
        self.reset()

    def reset(self) -> None:
        """Start a new video in the same buffers."""
        self.end = 0
        self._sink_start = 0  # position of the first frame in the sink
        self._recent_start = self.window.sink  # no recent frame before this one is held
        self._turned = 0  # frames by which the sink's keys in the buffer are turned

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers, which never grows."""
        buffers = [self.keys, self.values] + ([] if self._sink_keys is None else [self._sink_keys])
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def view(self, span: range) -> RingView:
        check_span(span, self.end, self.window)
        oldest = max(self._recent_start, span.stop - self.window.recent)
        if self.relative:
            self._turn_sink(oldest)
        sink = range(self._sink_start, min(self._sink_start + self.window.sink, span.stop))
        visible = {self._slot(frame) for frame in (*sink, *range(max(oldest, sink.stop), span.stop))}
        return RingView(self, span, self._runs(span), self._tokens_of(visible))

    @contextmanager
    def record(self, span: range) -> Iterator[RingView]:
        view = self.view(span)
        yield view
        self.end = span.stop
        if self._sink_keys is not None and span.start < self._sink_start + self.window.sink:
            self._sink_keys.copy_(self.keys[:, :, : self._sink_keys.shape[2]])

    def forget(self, *, keep_sink: bool) -> range:
        span = frames_to_reread(self.end, self.window, keep_sink=keep_sink)
        if keep_sink and self.end > self.window.visible:
            self._recent_start = span.start
        else:
            self._sink_start, self._recent_start, self._turned = span.start, span.start + self.window.sink, 0
        self.end = span.start
        return span

    def clear(self) -> None:
        """Drop everything; the next frames are the sink."""
        self._sink_start, self._recent_start, self._turned = self.end, self.end + self.window.sink, 0

    def _slot(self, frame: int) -> int:
        if self._sink_start <= frame < self._sink_start + self.window.sink:
            return frame - self._sink_start
        return self.window.sink + (frame - self.window.sink) % self.window.recent

    def _runs(self, span: range) -> list[Run]:
        runs: list[Run] = []
        for offset, frame in enumerate(span):
            slot, source = self._slot(frame) * self._tokens, offset * self._tokens
            if runs and runs[-1].slot + runs[-1].length == slot:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + self._tokens)
            else:
                runs.append(Run(slot, source, self._tokens))
        return runs

    def _tokens_of(self, slots: set[int]) -> slice | Tensor:
        if slots == set(range(len(slots))):  # always so, but in a recache that goes block by block
            return slice(0, len(slots) * self._tokens)
        starts = torch.tensor(sorted(slots), device=self.keys.device) * self._tokens
        return (starts[:, None] + torch.arange(self._tokens, device=self.keys.device)).flatten()

    def _turn_sink(self, oldest: int) -> None:
        """Move the sink's keys to the positions just before frame `oldest`."""
        assert self._sink_keys is not None
        by = oldest - (self._sink_start + self.window.sink)
        if by == self._turned or self.end < self._sink_start + self.window.sink:
            return
        turn = turn_in_time(by, self.keys.shape[-1], theta=self._theta, device=self.keys.device)
        self.keys[:, :, : self._sink_keys.shape[2]] = rotate(self._sink_keys, turn)
        self._turned = by
