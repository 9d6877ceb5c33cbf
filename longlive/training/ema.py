"""Exponential moving average of weights, kept in float32."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """`average <- decay average + (1 - decay) weights` after every step.

    `warm_up`: the decay grows from 0.1, so that the weights of the first steps are forgotten sooner.
    """

    def __init__(self, module: Network, *, decay: float, warm_up: bool = True) -> None:
        self.decay, self.warm_up = decay, warm_up
        self.average: Network = copy.deepcopy(module).float().requires_grad_(False).eval()

    @torch.no_grad()
    def copy(self, module: nn.Module) -> None:
        """Restart the average from the weights of `module`."""
        for mean, now in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.copy_(now)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average toward the weights of `module` after step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        for mean, now in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.lerp_(now.float(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.load_state_dict(state)
