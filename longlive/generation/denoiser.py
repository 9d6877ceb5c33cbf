"""From network to clean latents: the only place that converts between velocity, noise and x0."""

from __future__ import annotations

import torch

from longlive.models.wan import WanTransformer
from longlive.ops import flow_matching
from longlive.types import KVView, Latents, Text, TextKV, Timesteps


class Prediction:
    """The velocity that a network predicts for noisy latents at `t`, and what follows from it.

    With `x0` given (see `edited`), `noise` and `velocity` remain those that the network predicted.
    """

    def __init__(self, noisy: Latents, velocity: Latents, t: Timesteps, x0: Latents | None = None) -> None:
        self.noisy, self.velocity, self.t, self._x0 = noisy, velocity, t, x0

    @property
    def x0(self) -> Latents:
        """x0 = x_t - sigma velocity."""
        if self._x0 is None:
            self._x0 = flow_matching.x0_from_velocity(self.velocity, self.noisy, self.t)
        return self._x0

    @property
    def noise(self) -> Latents:
        """x_t + (1 - sigma) velocity."""
        return flow_matching.noise_from_velocity(self.velocity, self.noisy, self.t)

    def edited(self, x0: Latents) -> Prediction:
        """The same noise around other clean latents."""
        return Prediction(self.noisy, self.velocity, self.t, x0)


class Denoiser:
    """A `WanTransformer` asked for clean latents instead of velocities.

    With a `guidance_scale` s > 1 the velocity is v_n + s (v - v_n), where v_n is that under the text `negative` (classifier-free
    guidance, Ho & Salimans 2022): two passes over the same view. Distilled models need none (s = 1).

    Raises:
        ValueError: for a guidance_scale below 1, one above 1 without `negative`, or `negative` without guidance.
    """

    def __init__(self, network: WanTransformer, *, guidance_scale: float = 1.0, negative: Text | TextKV | None = None) -> None:
        if guidance_scale < 1 or (guidance_scale > 1) != (negative is not None):
            wants = "needs" if guidance_scale > 1 else "takes no"
            raise ValueError(f"guidance_scale {guidance_scale} {wants} negative text; it is 1 (no guidance) or more")
        self.network, self.guidance_scale, self.negative = network, guidance_scale, negative

    def __call__(
        self, noisy: Latents, t: float | Timesteps, text: Text | TextKV, view: KVView | None = None, *, guided: bool = True
    ) -> Prediction:
        """Predict at timestep `t` (0 to 1000): one number for all frames, or `[B, F]`. `guided=False` leaves guidance out."""
        if not isinstance(t, torch.Tensor):
            t = torch.full((1, 1), t, dtype=torch.float32, device=noisy.device)
        velocity = self.network(noisy, t, text, view)
        if self.negative is not None and guided:
            velocity = velocity + (self.guidance_scale - 1) * (velocity - self.network(noisy, t, self.negative, view))
        return Prediction(noisy, velocity, t)

    def write_kv(self, x0: Latents, t: float, text: Text | TextKV, view: KVView) -> None:
        """Pass clean latents through the network to write their keys and values through `view`."""
        self.network.write_kv(x0, torch.full((1, 1), t, dtype=torch.float32, device=x0.device), text, view)
