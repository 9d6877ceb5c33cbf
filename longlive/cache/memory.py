"""What a cache hands to each layer: its buffers, which of their tokens a span may see, and how to attend over them.

There are two, each a `NamedTuple` of tensors. `RingMemory` writes the span's keys and values into the buffers and attends over
them (inference); `HistoryMemory` attends over a copy and carries gradients (training).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from longlive.ops.transfer import to_device
from longlive.types import AttentionBackend, Heads, Memory, Rotation, Visible

TokenIndices = Int[Tensor, " n"]
"""Positions of tokens in a buffer."""


def token_indices(slots: Sequence[int], tokens: int, device: torch.device) -> TokenIndices:
    """Positions in a buffer of the tokens of the frames in these slots, `tokens` per slot."""
    starts = to_device(torch.tensor(slots, dtype=torch.long), device) * tokens
    return (starts[:, None] + torch.arange(tokens, device=device)).flatten()


class RingMemory(NamedTuple):
    """Writes the span's keys and values into the buffers, then attends over the buffers as they lie.

    Attributes:
        own: where in the buffers the span's own tokens go.
        visible: places in the buffers to attend to, the span's own among them; None: all of them.
    """

    keys: Visible
    values: Visible
    own: TokenIndices
    visible: TokenIndices | None = None

    def write(self, k: Heads, v: Heads) -> None:
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("a RingCache is overwritten in place and cannot carry gradients; use a HistoryCache")
        self.keys[:, self.own] = k.to(self.keys.dtype)  # under autocast they may differ
        self.values[:, self.own] = v.to(self.values.dtype)

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        self.write(k, v)
        keys, values = self.keys, self.values
        if self.visible is not None:
            keys, values = keys.index_select(1, self.visible), values.index_select(1, self.visible)
        return backend(q, keys, values)


class HistoryMemory(NamedTuple):
    """Gathers what is visible and puts the span's keys and values, with their gradients, into the copy.

    Attributes:
        visible: places in the buffers to attend to; what is there for the span's own tokens does not matter.
        own: where the span's own tokens are in `visible`.
        written: where in the buffers the span's own keys and values are stored, detached: in their own slots during a recorded pass,
            else in a scratch slot that is never read.
    """

    keys: Visible
    values: Visible
    visible: TokenIndices
    own: TokenIndices
    written: TokenIndices

    def gathered(self, k: Heads, v: Heads) -> tuple[Visible, Visible]:
        """Visible keys and values, the span's own among them."""
        keys, values = self.keys.index_select(1, self.visible), self.values.index_select(1, self.visible)
        keys[:, self.own] = k.to(keys.dtype)
        values[:, self.own] = v.to(values.dtype)
        return keys, values

    def write(self, k: Heads, v: Heads) -> None:
        self.keys[:, self.written] = k.detach().to(self.keys.dtype)
        self.values[:, self.written] = v.detach().to(self.values.dtype)

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        keys, values = self.gathered(k, v)
        self.write(k, v)
        return backend(q, keys, values)


class CacheView(NamedTuple):
    """A span's view of a cache: the rotation of its tokens, and a memory for every layer.

    Attributes:
        moving: of a full window, those tensors of the memories that differ from span to span; all else are the cache's own buffers.
            None: of another window, whose memories may have other shapes.
    """

    rotation: Rotation
    memory: Callable[[int], Memory]
    moving: tuple[Tensor, ...] | None = None

    def at(self, layer: int) -> Memory:
        """The memory of one layer."""
        return self.memory(layer)
