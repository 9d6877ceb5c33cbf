"""Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, flow = noise - x0, t = 1000 sigma.

sigma is a function of t everywhere (t / 1000), never a table look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from longlive.types import Latents, Levels

NUM_LEVELS = 1000


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise level sigma = s u / (1 + (s - 1) u) of a uniform time u in [0, 1] (Esser et al. 2024, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def sigmas(shift: float) -> Float[Tensor, 1000]:
    """The 1000 levels sigma_i of u_i = 1 - i / 1000, float32, from 1 down to just above 0."""
    return shifted(torch.linspace(1, 0, NUM_LEVELS + 1)[:-1], shift)


def warp_steps(steps: Sequence[float], shift: float) -> list[float]:
    """Timesteps t of a list of uniform steps in 0..1000: [1000, 750, 500, 250] with shift 5 is 1000, 937.5, 833.33, 625.

    Raises:
        ValueError: when a step is outside [0, 1000] or the steps do not fall.
    """
    if not steps or any(not 0 <= step <= NUM_LEVELS for step in steps):
        raise ValueError(f"denoising steps must lie in 0..{NUM_LEVELS}, got {list(steps)}")
    if any(later >= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"denoising steps must fall, got {list(steps)}")
    u = torch.tensor(steps, dtype=torch.float32) / NUM_LEVELS
    return (NUM_LEVELS * shifted(u, shift)).tolist()


def training_weights(shift: float) -> Float[Tensor, 1000]:
    """Weight of each of the 1000 levels in autoregressive diffusion training: a bell around t = 500 with minimum 0 and mean 1."""
    t = NUM_LEVELS * sigmas(shift)
    y = torch.exp(-2 * ((t - NUM_LEVELS / 2) / NUM_LEVELS) ** 2)
    y = y - y.min()
    return y * (NUM_LEVELS / y.sum())


def nearest_level(t: Levels, shift: float) -> Levels:
    """The timestep of the table's nearest level (1000 `sigmas(shift)`).

    The public v1.0 code looks sigma up so; everything here uses sigma = t / 1000. Needed only to compare with what it recorded
    at timesteps that are not in its table.
    """
    table = NUM_LEVELS * sigmas(shift).to(t.device)
    return table[(t[..., None] - table).abs().argmin(-1)]


def _per_frame(t: Levels, like: Latents) -> Tensor:
    return (t / NUM_LEVELS).to(like.device)[..., None, None, None]


def add_noise(clean: Latents, noise: Latents, t: Levels) -> Latents:
    """(1 - sigma) x0 + sigma noise, in float32, returned in the dtype of `noise`."""
    sigma = _per_frame(t, clean).float()
    return ((1 - sigma) * clean.float() + sigma * noise.float()).to(noise.dtype)


def clean_from_flow(flow: Latents, noisy: Latents, t: Levels) -> Latents:
    """x0 = x_t - sigma flow, in float64, returned in the dtype of `flow`."""
    return (noisy.double() - _per_frame(t, flow).double() * flow.double()).to(flow.dtype)


def noise_from_flow(flow: Latents, noisy: Latents, t: Levels) -> Latents:
    """noise = x_t + (1 - sigma) flow, in float64, returned in the dtype of `flow`."""
    return (noisy.double() + (1 - _per_frame(t, flow).double()) * flow.double()).to(flow.dtype)


def flow_from_clean(clean: Latents, noisy: Latents, t: Levels) -> Latents:
    """flow = (x_t - x0) / sigma, in float64, returned in the dtype of `clean`; sigma must not be 0."""
    return ((noisy.double() - clean.double()) / _per_frame(t, clean).double()).to(clean.dtype)
