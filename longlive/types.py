"""The legend of letters, and the protocol where model and cache meet.

B batch · F latent frames · C H W latent channels, height, width · N tokens of a span of frames · K tokens visible ·
A D attention heads, head width · L E text tokens, text width · T pixel frames. "Frames" are latent frames; pixel frames
are `images`. `sigma` is a noise level in [0, 1]; `t` is 1000 sigma and exists only at the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

Latents = Float[Tensor, "B F C H W"]
Images = Float[Tensor, "B 3 T Y X"]
Timesteps = Float[Tensor, "B F"]
Text = Float[Tensor, "B L E"]
Heads = Float[Tensor, "B N A D"]
Seen = Float[Tensor, "B K A D"]
Mask = Bool[Tensor, "N K"]


class TextKV(NamedTuple):
    """A prompt as the cross-attention of every layer reads it: keys and values `[B, L, A, D]`, one pair a layer."""

    keys: tuple[Heads, ...]
    values: tuple[Heads, ...]


class Estimate(Protocol):
    """What noisy latents are taken for: two ways to say the same."""

    @property
    def x0(self) -> Latents: ...

    @property
    def velocity(self) -> Latents: ...


class Score(Protocol):
    """A view of what clean latents look like: a denoising network, or the exact answer where it is known."""

    def __call__(self, noisy: Latents, t: Timesteps, text: Text, /) -> Estimate: ...


class KVView(Protocol):
    """What a span of frames may attend to. Its past never changes while the span is being denoised."""

    @property
    def frames(self) -> Sequence[int]:
        """Position in the video of every frame of the span; hashable."""
        ...

    @property
    def mask(self) -> Mask | None:
        """Which keys a query may see; None: all that `extend` returns (always so at inference)."""
        ...

    def extend(self, layer: int, k: Heads, v: Heads) -> tuple[Seen, Seen]:
        """Visible past and the span's own keys (rotated to `frames`) and values, in any order."""
        ...
