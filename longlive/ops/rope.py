"""Rotary embedding in three axes (time, height, width) at any position.

A head of width d is split into d - 4 (d // 6) numbers for time and 2 (d // 6) each for height and width; neighbouring
pairs turn together by position * theta^(-2 i / width of the axis). Angles are computed in float64, so that positions far
beyond the trained range stay exact; there is no table to run past.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longlive.types import Heads


class Rotation(NamedTuple):
    """Cosine and sine of the angle of every pair, float32 `[N, D / 2]` (N tokens, or 1 for all alike)."""

    cos: Float[Tensor, "N halfD"]
    sin: Float[Tensor, "N halfD"]


def _axis_widths(head_dim: int) -> tuple[int, int, int]:
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _frequencies(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


@lru_cache(maxsize=16)  # five passes of a block ask for the same
def rotation(
    frames: Sequence[int], height: int, width: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | None = None
) -> Rotation:
    """Angles of the tokens of `frames` (positions in the video), each `height` x `width` tokens, in (frame, row, column) order."""
    time_width, side_width, _ = _axis_widths(head_dim)
    with torch.inference_mode(False):  # what is cached here may later be used under autograd
        return _rotation(frames, height, width, _frequencies(time_width, theta), _frequencies(side_width, theta), device)


def _rotation(frames: Sequence[int], height: int, width: int, time: Tensor, side: Tensor, device: torch.device | None) -> Rotation:
    shape = (len(frames), height, width)
    f = torch.tensor(list(frames), dtype=torch.float64)[:, None, None, None] * time
    h = torch.arange(height, dtype=torch.float64)[None, :, None, None] * side
    w = torch.arange(width, dtype=torch.float64)[None, None, :, None] * side
    angles = torch.cat([axis.expand(*shape, -1) for axis in (f, h, w)], dim=-1).flatten(0, 2)
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def turn_in_time(num_latent_frames: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | None = None) -> Rotation:
    """The rotation that moves keys `num_latent_frames` later (earlier when negative) and leaves their place in the picture."""
    time_width, side_width, _ = _axis_widths(head_dim)
    angles = torch.cat([num_latent_frames * _frequencies(time_width, theta), torch.zeros(side_width, dtype=torch.float64)])[None]
    return Rotation(angles.cos().float().to(device), angles.sin().float().to(device))


def rotate(x: Heads, turn: Rotation) -> Heads:
    """Turn neighbouring pairs of the last dimension of `[B, N, A, D]`; computed in float32, returned in the dtype of `x`."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.cos[:, None, :], turn.sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
