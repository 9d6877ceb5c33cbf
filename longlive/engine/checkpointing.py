"""Activation checkpointing: blocks recompute their activations in the backward pass instead of storing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longlive.engine.blocks import blocks_of


def _checkpointed(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # Blocks draw no random numbers, so their state need not be saved.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def checkpoint_blocks(network: nn.Module) -> None:
    """Make every block of `network` recompute its activations in the backward pass, in place.

    What a block reads besides its inputs must not change before the backward pass: a view of a `HistoryCache` does not, a ring that is
    overwritten in place would. A second call changes nothing.
    """
    for block in blocks_of(network):
        forward = block.forward
        if not (isinstance(forward, partial) and forward.func is _checkpointed):
            block.forward = partial(_checkpointed, forward)  # type: ignore[method-assign]
