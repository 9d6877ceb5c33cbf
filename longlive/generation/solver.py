"""How noisy latents go from one timestep to the next. Knows nothing of networks, caches or prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from longlive.generation.denoiser import Prediction
from longlive.ops.flow_matching import add_noise
from longlive.types import Latents

Draw = Callable[[Latents], Latents]
"""Gaussian noise shaped like the given latents."""

Step = Callable[[Prediction, int], Latents]
"""(prediction at timestep i, i) -> noisy latents at timestep i + 1."""


class Solver(Protocol):
    """A schedule of timesteps and a rule to go down it."""

    @property
    def timesteps(self) -> Sequence[float]:
        """Timesteps t of the denoising passes, decreasing, e.g. 1000, 937.5, 833.33, 625 (`ops.flow_matching.warp_steps`)."""
        ...

    def start(self) -> Step:
        """The rule for one block, with whatever it remembers of earlier steps of that block."""
        ...


def _checked(timesteps: Sequence[float]) -> tuple[float, ...]:
    if not timesteps:
        raise ValueError("a solver needs at least one denoising step")
    return tuple(timesteps)


@dataclass(frozen=True)
class FewStep:
    """Adds fresh noise to the predicted clean latents at each step, as few-step models are trained to expect (Yin et al. 2024)."""

    timesteps: Sequence[float]
    draw: Draw

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", _checked(self.timesteps))

    def start(self) -> Step:
        return lambda prediction, i: _at(self.timesteps[i + 1], prediction, self.draw(prediction.x0))


@dataclass(frozen=True)
class Euler:
    """Euler steps of the flow: the noise is the one that the network predicts. For networks that were not distilled."""

    timesteps: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", _checked(self.timesteps))

    def start(self) -> Step:
        return lambda prediction, i: _at(self.timesteps[i + 1], prediction, prediction.noise)


def _at(t: float, prediction: Prediction, noise: Latents) -> Latents:
    return add_noise(prediction.x0, noise, torch.full((1, 1), t, device=noise.device))
