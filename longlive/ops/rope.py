"""Rotary position embedding in three axes (time, height, width) at any position.

A head of width D gives D - 4 (D // 6) channels to time and 2 (D // 6) each to height and width. Adjacent channels form a
pair; pair i of an axis with w channels is rotated by position * theta^(-2 i / w). Angles are computed in float64 when they are needed:
positions are exact at any distance, and no table limits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from longlive.ops.transfer import to_device
from longlive.types import Rotation


def _frequencies(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


class Rope:
    """Rotary angles of frames of `rows` x `columns` tokens, in (frame, row, column) order.

    An angle depends on one axis only, so the table of height and width is made once and only that of time per span.
    """

    def __init__(self, rows: int, columns: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | str = "cpu") -> None:
        self.rows, self.columns, self.head_dim, self.device = rows, columns, head_dim, torch.device(device)
        side = 2 * (head_dim // 6)
        self._time = _frequencies(head_dim - 2 * side, theta)
        frequencies = _frequencies(side, theta)
        height = (torch.arange(rows)[:, None] * frequencies)[:, None].expand(-1, columns, -1)
        width = (torch.arange(columns)[:, None] * frequencies)[None].expand(rows, -1, -1)
        angles = torch.cat([height, width], dim=-1).flatten(0, 1)
        self._spatial = Rotation(angles.cos().float().to(device), angles.sin().float().to(device))

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns

    def at(self, frames: Sequence[int]) -> Rotation:
        """The rotation of every token of `frames` (positions in the video), `[N, D / 2]`."""
        with torch.inference_mode(False):  # it may be kept and later be used under autograd
            angles = torch.tensor(list(frames))[:, None] * self._time
            cos, sin = (
                self._over_frames(to_device(time.float(), self.device), spatial)
                for time, spatial in zip((angles.cos(), angles.sin()), self._spatial)
            )
        return Rotation(cos, sin)

    def time_shift(self, num_frames: int) -> Rotation:
        """The rotation that moves keys `num_frames` later (earlier when negative) at the same place in the frame, `[1, D / 2]`."""
        angles = torch.cat([num_frames * self._time, torch.zeros(self.head_dim // 2 - len(self._time))])[None]
        return Rotation(to_device(angles.cos().float(), self.device), to_device(angles.sin().float(), self.device))

    def _over_frames(self, time: Tensor, spatial: Tensor) -> Tensor:
        tokens = self.tokens_per_frame
        return torch.cat([time[:, None].expand(-1, tokens, -1), spatial[None].expand(len(time), -1, -1)], dim=-1).flatten(0, 1)


@lru_cache(maxsize=8)
def rope_for(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """The `Rope` of these arguments, made once and shared."""
    return Rope(rows, columns, head_dim, theta=theta, device=device)


def near_again(head_dim: int, *, theta: float = 10000.0, beyond: int, up_to: int, count: int = 2) -> list[int]:
    """Distances in latent frames, above `beyond` and up to `up_to`, at which two frames look near again to the temporal rotation: the
    `count` highest peaks of the mean over its pairs of cos(d theta_i), in order.

    At these lengths a sink whose position is absolute takes the picture over (LoL, arXiv 2601.16914): 132 and 201 for Wan's heads.
    """
    frequencies = _frequencies(head_dim - 4 * (head_dim // 6), theta)
    cosine = (torch.arange(up_to + 2)[:, None] * frequencies).cos().mean(dim=1).tolist()
    peaks = [d for d in range(beyond + 1, up_to + 1) if cosine[d - 1] < cosine[d] > cosine[d + 1]]
    return sorted(sorted(peaks, key=cosine.__getitem__)[-count:])


def rotate(x: Float[Tensor, "*B N A D"], rotation: Rotation) -> Float[Tensor, "*B N A D"]:
    """Rotate adjacent pairs of the last dimension of `[B, N, A, D]`; computed in float32, returned in the dtype of `x`."""
    pairs = x.float().unflatten(-1, (-1, 2))  # explicitly float32: gradients are then summed in it
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    if not torch.compiler.is_compiling():  # a compiler fuses the real numbers, and knows no complex ones
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    # (even, odd) cos + (odd, even) (-sin, sin), without a stack, which a compiler would write to memory
    signs = 2 * torch.arange(2, device=x.device) - 1
    return (pairs * cos[..., None] + pairs.flip(-1) * (signs * sin[..., None])).flatten(-2).to(x.dtype)
