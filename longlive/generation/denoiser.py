"""Network to clean latent: the only place that converts velocity, noise and clean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longlive.models.wan import WanTransformer
from longlive.ops import flow_matching
from longlive.types import KVView, Latents, Text, TextKV, Timesteps


@dataclass(frozen=True)
class Prediction:
    """What the network makes of noisy latents at `t`: three ways to say the same velocity."""

    noisy: Latents
    velocity: Latents
    t: Timesteps

    @property
    def x0(self) -> Latents:
        """x0 = x_t - sigma flow."""
        return flow_matching.x0_from_velocity(self.velocity, self.noisy, self.t)

    @property
    def noise(self) -> Latents:
        """x_t + (1 - sigma) flow."""
        return flow_matching.noise_from_velocity(self.velocity, self.noisy, self.t)


class Denoiser:
    """A `WanTransformer` asked for clean latents instead of velocities.

    With `guidance` w > 0 the velocity is v + w (v - v_n), v_n that under the text `negative` (classifier-free guidance; w = scale - 1):
    two passes over the same view. Distilled models need none.
    """

    def __init__(self, network: WanTransformer, *, guidance: float = 0.0, negative: Text | TextKV | None = None) -> None:
        if guidance < 0 or (guidance > 0) != (negative is not None):
            raise ValueError(f"guidance {guidance} {'needs' if guidance > 0 else 'takes no'} negative text; w is 0 (none) or more")
        self.network, self.guidance, self.negative = network, guidance, negative

    def __call__(
        self, noisy: Latents, t: float | Timesteps, text: Text | TextKV, view: KVView | None = None, *, guided: bool = True
    ) -> Prediction:
        """Predict at timestep `t` (0 to 1000): one number for all frames, or `[B, F]`. `guided=False` leaves guidance out."""
        if not isinstance(t, torch.Tensor):
            t = torch.full(noisy.shape[:2], t, dtype=torch.float32, device=noisy.device)
        velocity = self.network(noisy, t, text, view)
        if self.negative is not None and guided:
            velocity = velocity + self.guidance * (velocity - self.network(noisy, t, self.negative, view))
        return Prediction(noisy, velocity, t)

    def write_kv(self, x0: Latents, t: float, text: Text | TextKV, view: KVView) -> None:
        """Pass clean latents through the network for the keys and values they leave in `view`; the output is of no use."""
        self.network(x0, torch.full(x0.shape[:2], t, dtype=torch.float32, device=x0.device), text, view)
