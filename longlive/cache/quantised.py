"""The ring in 8 bits: half the memory of a bfloat16 ring, a quarter of a float32 one.

Keys and values are put into 8 bits once, when a span writes them, with a scale for each head and frame; a frame that is remembered is
never quantised again. Keys are stored without their mean over the frame's tokens, which makes them smaller and the scales finer. Softmax
ignores a vector that is subtracted from all keys that a query sees, but every frame has a mean of its own: the means are stored too, in
float32, and are added when keys are read.

Attention reads keys and values back in the type of the queries, a layer at a time, and runs in whatever backend the network uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from longlive.cache.memory import CacheView
from longlive.cache.window import Window, WindowedCache
from longlive.ops.eight_bits import Quantised, dtype_of, quantise
from longlive.ops.rope import Rope, rotate
from longlive.ops.transfer import to_device
from longlive.types import AttentionBackend, Heads, Rotation

Frames8 = Shaped[Tensor, "B S n A D"]  # S slots of n tokens; int8 or float8
FrameScales = Float[Tensor, "B S 1 A 1"]
FrameMeans = Float[Tensor, "B S 1 A D"]
Slots = Int[Tensor, " F"]


class QuantisedMemory(NamedTuple):
    """Writes the span's keys and values into the buffers in 8 bits, then attends over what the buffers hold, the span's own included.

    Attributes:
        own: slots of the span's frames.
        visible: slots to attend to, the span's own among them, in increasing order. They are gathered in 8 bits, also when they are the
            first ones or all: a slice is contiguous when the buffers are full and not before, for which Dynamo makes two graphs.
        sink, shift: which of the visible frames are the sink, and the rotation that moves their keys to other positions (one row).
    """

    keys: Frames8
    key_scales: FrameScales
    key_means: FrameMeans
    values: Frames8
    value_scales: FrameScales
    own: Slots
    visible: Slots
    sink: Slots | None = None
    shift: Rotation | None = None

    def write(self, k: Heads, v: Heads) -> None:
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("a QuantisedRing is overwritten in place and cannot carry gradients; use a HistoryCache")
        k, v = (part.unflatten(1, (-1, self.keys.shape[2])).float() for part in (k, v))  # [B, F, n, A, D]
        mean = k.mean(2, keepdim=True)
        self.key_means[:, self.own] = mean
        for x, values, scales in ((k - mean, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            new = quantise(x, values.dtype, (2, 4))
            values.view(torch.int8)[:, self.own] = new.values.view(torch.int8)  # not every device can index float8
            scales[:, self.own] = new.scales

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        self.write(k, v)
        return backend(q, *(part.to(q.dtype) for part in self._read()))

    def _read(self) -> tuple[Float[Tensor, "B K A D"], Float[Tensor, "B K A D"]]:
        """The visible keys, at their places, and values, in float32."""
        seen = self._gather(self.keys, self.key_scales).add_(self.key_means.index_select(1, self.visible))
        if self.sink is not None and self.shift is not None:
            moved = rotate(seen.index_select(1, self.sink).flatten(1, 2), self.shift)
            seen[:, self.sink] = moved.unflatten(1, (-1, seen.shape[2]))
        return seen.flatten(1, 2), self._gather(self.values, self.value_scales).flatten(1, 2)

    def _gather(self, values: Frames8, scales: FrameScales) -> Float[Tensor, "B s n A D"]:
        seen = values.view(torch.int8).index_select(1, self.visible).view(values.dtype)
        return Quantised(seen, scales.index_select(1, self.visible)).dequantised()


class QuantisedRing(WindowedCache):
    """A `RingCache` in 8 bits (see there): the same frames in the same slots, `[layers, B, slots, tokens, A, D]`, allocated once.

    In the infinite mode the sink's keys stay in the buffers as they were recorded and are rotated when they are read.

    Args:
        num_layers, batch, num_heads: of the network and the videos.
        rope: of a frame's grid of tokens; the buffers are on its device.
        window: which frames are visible; the capacity of the buffers.
        kind: "int8" or "fp8".

    Raises:
        ValueError: for another kind.
    """

    def __init__(
        self, *, num_layers: int, batch: int, num_heads: int, rope: Rope, window: Window, kind: str, relative: bool = False
    ) -> None:
        super().__init__(window)
        self.relative, self._rope = relative, rope
        slots, tokens, width, device = window.visible, rope.tokens_per_frame, rope.head_dim, rope.device
        values, one = (num_layers, batch, slots, tokens, num_heads, width), (num_layers, batch, slots, 1, num_heads)
        self.keys, self.values = (torch.zeros(values, dtype=dtype_of(kind), device=device) for _ in range(2))
        self.key_scales, self.value_scales = (torch.zeros((*one, 1), device=device) for _ in range(2))
        self.key_means = torch.zeros((*one, width), device=device)
        # One place for every block, as the buffers have: a recorded pass reads it there.
        self._shift = Rotation(*(part.clone() for part in rope.time_shift(0))) if relative else None

    def view(self, span: range) -> CacheView:
        """See `KVCache`. A pass writes into the span's own slots, whose old frames the span may not see anyway."""
        sink, recent = self._extent.visible(span)
        own = self._slots([self._extent.slot(frame) for frame in span])
        slots = sorted({self._extent.slot(frame) for frame in (*sink, *recent)})
        visible, moved = self._slots(slots), None
        if self._shift is not None:  # the sink to just before the oldest recent frame
            moved = self._slots(range(len(sink)))
            for part, new in zip(self._shift, self._rope.time_shift(self._extent.oldest_recent(span) - self._extent.sink.stop)):
                part.copy_(new, non_blocking=True)

        def memory(layer: int) -> QuantisedMemory:
            keys, values = (self.keys[layer], self.key_scales[layer], self.key_means[layer]), (self.values[layer], self.value_scales[layer])
            return QuantisedMemory(*keys, *values, own, visible, moved, self._shift)

        moving = (own, visible) if moved is None else (own, visible, moved)
        return CacheView(self._rope.at(span), memory, moving if len(slots) == self.window.visible else None)

    @contextmanager
    def record(self, span: range) -> Iterator[CacheView]:
        yield self.view(span)
        self._extent.end = span.stop

    def _slots(self, slots: Sequence[int]) -> Slots:
        return to_device(torch.tensor(list(slots), dtype=torch.long), self._rope.device)
