"""What a cache hands to each layer: its buffers, the tokens a span may see and the span's own places, and how to attend over them.

Both are tuples of tensors. One writes the span's keys and values into the buffers (inference, and every pass that is
remembered), the other leaves the buffers as they are and carries gradients (denoising passes of training).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from longlive.types import Attend, Heads, Memory, Rotation, Visible

Places = Int[Tensor, " n"]
"""Positions of tokens in a buffer."""


class WritingMemory(NamedTuple):
    """Writes the span's keys and values to their own places, then attends over the buffer as it lies or over some of its places."""

    keys: Visible
    values: Visible
    own: Places
    visible: Places | None = None

    def attend(self, q: Heads, k: Heads, v: Heads, attend: Attend) -> Heads:
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("this cache is overwritten in place and cannot carry gradients; use a HistoryCache and `view`")
        keys, values = self.keys, self.values
        keys.index_copy_(1, self.own, k)
        values.index_copy_(1, self.own, v)
        if self.visible is not None:
            keys, values = keys.index_select(1, self.visible), values.index_select(1, self.visible)
        return attend(q, keys, values)


class ReadingMemory(NamedTuple):
    """Gathers what is visible and puts the span's keys and values where they belong in it; the buffers stay as they are.

    Attributes:
        visible: places in the buffers, those of the span's own tokens (whose contents do not matter) among them.
        own: where the span's own tokens are in `visible`.
    """

    keys: Visible
    values: Visible
    visible: Places
    own: Places

    def attend(self, q: Heads, k: Heads, v: Heads, attend: Attend) -> Heads:
        keys = self.keys.index_select(1, self.visible).index_copy(1, self.own, k)
        values = self.values.index_select(1, self.visible).index_copy(1, self.own, v)
        return attend(q, keys, values)


class CacheView(NamedTuple):
    """A span's view of a cache: the rotation of its tokens, and a memory for every layer."""

    rope: Rotation
    memory: Callable[[int], Memory]

    def at(self, layer: int) -> Memory:
        """The memory of one layer."""
        return self.memory(layer)
