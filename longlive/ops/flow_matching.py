"""Flow matching: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0, t = 1000 sigma.

sigma is a function of t everywhere (t / 1000), never a table look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from longlive.types import Latents, Timesteps

NUM_TIMESTEPS = 1000


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise level sigma = s u / (1 + (s - 1) u) of a uniform time u in [0, 1] (Esser et al. 2024, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def sigmas(shift: float) -> Float[Tensor, 1000]:
    """The 1000 levels sigma_i of u_i = 1 - i / 1000, float32, from 1 down to just above 0."""
    return shifted(torch.linspace(1, 0, NUM_TIMESTEPS + 1)[:-1], shift)


def warp_steps(steps: Sequence[float], shift: float) -> list[float]:
    """Timesteps t of a list of uniform steps in 0..1000: [1000, 750, 500, 250] with shift 5 is 1000, 937.5, 833.33, 625.

    Raises:
        ValueError: when a step is outside [0, 1000] or the steps are not decreasing.
    """
    if not steps or any(not 0 <= step <= NUM_TIMESTEPS for step in steps):
        raise ValueError(f"denoising steps must lie in 0..{NUM_TIMESTEPS}, got {list(steps)}")
    if any(later >= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"denoising steps must be decreasing, got {list(steps)}")
    u = torch.tensor(steps) / NUM_TIMESTEPS
    return (NUM_TIMESTEPS * shifted(u, shift)).tolist()


def training_weights(shift: float) -> Float[Tensor, 1000]:
    """Weight of each of the 1000 levels in autoregressive diffusion training: a bell around t = 500 with minimum 0 and mean 1."""
    t = NUM_TIMESTEPS * sigmas(shift)
    y = torch.exp(-2 * ((t - NUM_TIMESTEPS / 2) / NUM_TIMESTEPS) ** 2)
    y = y - y.min()
    return y * (NUM_TIMESTEPS / y.sum())


def nearest_timestep(t: Timesteps, shift: float) -> Timesteps:
    """The timestep of the table's nearest level (1000 `sigmas(shift)`).

    The public v1.0 code looks sigma up so; everything here uses sigma = t / 1000. Needed only to compare with what it recorded
    at timesteps that are not in its table.
    """
    table = NUM_TIMESTEPS * sigmas(shift).to(t.device)
    return table[(t[..., None] - table).abs().argmin(-1)]


def _sigma(t: Timesteps, like: Latents) -> Float[Tensor, "#B #F 1 1 1"]:
    """Noise level of each frame in float64, so that arithmetic with it is promoted to float64."""
    return (t / NUM_TIMESTEPS).to(like.device, torch.float64)[..., None, None, None]


def add_noise(x0: Latents, noise: Latents, t: Timesteps) -> Latents:
    """(1 - sigma) x0 + sigma noise, in float32, returned in the dtype of `noise`."""
    sigma = _sigma(t, x0).float()
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(noise.dtype)


def x0_from_velocity(velocity: Latents, noisy: Latents, t: Timesteps) -> Latents:
    """x0 = x_t - sigma velocity, in float64, returned in the dtype of `velocity`."""
    return (noisy - _sigma(t, velocity) * velocity).to(velocity.dtype)


def noise_from_velocity(velocity: Latents, noisy: Latents, t: Timesteps) -> Latents:
    """noise = x_t + (1 - sigma) velocity, in float64, returned in the dtype of `velocity`."""
    return (noisy + (1 - _sigma(t, velocity)) * velocity).to(velocity.dtype)


def velocity_from_x0(x0: Latents, noisy: Latents, t: Timesteps) -> Latents:
    """velocity = (x_t - x0) / sigma, in float64, returned in the dtype of `x0`; sigma must not be 0."""
    return ((noisy.double() - x0) / _sigma(t, x0)).to(x0.dtype)
