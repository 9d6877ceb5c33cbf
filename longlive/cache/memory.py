"""What a cache hands to each layer: its buffers, which of their tokens a span may see, and how to attend over them.

There are two, each a `NamedTuple` of tensors. `WritingMemory` writes the span's keys and values into the buffers (inference, and
every recorded pass); `ReadingMemory` leaves the buffers as they are and carries gradients (denoising in training).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from longlive.types import Attend, Heads, Memory, Rotation, Visible

Places = Int[Tensor, " n"]
"""Positions of tokens in a buffer."""


def places_of(slots: Sequence[int], tokens: int, device: torch.device) -> Places:
    """Positions in a buffer of the tokens of the frames in these slots, `tokens` per slot."""
    starts = torch.tensor(slots, dtype=torch.long).to(device, non_blocking=True) * tokens
    return (starts[:, None] + torch.arange(tokens, device=device)).flatten()


class WritingMemory(NamedTuple):
    """Writes the span's keys and values into the buffers, then attends over them.

    Attributes:
        own: where in the buffers the span's own tokens go.
        visible: places in the buffers to attend to, the span's own among them; None: all, in the order in which they lie.
    """

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
    """Gathers what is visible and puts the span's keys and values into the copy; the buffers stay as they are.

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
