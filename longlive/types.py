"""Letters for tensor dimensions, aliases for tensors, and the protocols where model and cache meet.

B batch · F latent frames · C H W latent channels, height, width · N tokens of a span of frames · K tokens visible ·
A D attention heads, head width · M = A D model width · L E text tokens, text width · T Y X pixel frames, rows, columns.
In modules that know only latents "frames" are latent frames; pixel frames are `images`. `sigma` is a noise level in [0, 1], the
timestep `t` is 1000 sigma.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

Latents = Float[Tensor, "B F C H W"]
Images = Float[Tensor, "B 3 T Y X"]
Timesteps = Float[Tensor, "#B #F"]  # [1, 1]: the same for all
Text = Float[Tensor, "B L E"]
Heads = Float[Tensor, "B N A D"]
Visible = Float[Tensor, "B K A D"]
Mask = Bool[Tensor, "N K"]


class TextKV(NamedTuple):
    """A prompt as the cross-attention of every layer reads it: keys and values `[B, L, A, D]`, one pair per layer."""

    keys: tuple[Heads, ...]
    values: tuple[Heads, ...]


class X0Prediction(Protocol):
    """A prediction from noisy latents, in two equivalent parametrisations."""

    @property
    def x0(self) -> Latents: ...

    @property
    def velocity(self) -> Latents: ...


class X0Predictor(Protocol):
    """Predicts clean latents from noisy ones under a text: a denoising network, or the exact posterior mean where it is known.

    It gives distribution matching its scores, since the score is (x0 (1 - sigma) - x_t) / sigma^2.
    """

    def __call__(self, noisy: Latents, t: Timesteps, text: Text, /) -> X0Prediction: ...


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angle of every pair, float32 `[N, D / 2]` (N tokens, or 1 when all have the same angle)."""

    cos: Float[Tensor, "N halfD"]
    sin: Float[Tensor, "N halfD"]


class AttentionBackend(Protocol):
    """An attention backend: queries `[B, N, A, D]`, keys and values `[B, K, A, D]` -> `[B, N, A, D]`.

    `mask` `[N, K]` says which keys a query may see; None: all of them.
    """

    def __call__(self, q: Heads, k: Visible, v: Visible, mask: Mask | None = None, /) -> Heads: ...


class Memory(Protocol):
    """What one layer may attend to besides its own tokens: a `NamedTuple` of tensors, so that one compiled graph serves every layer."""

    def write(self, k: Heads, v: Heads) -> None:
        """Store the span's rotated keys and its values where `attend` would store them, if it does."""
        ...

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        """Attention of the span's queries over what it may see, its own keys and values included; may write these into the cache.

        q, k, v: `[B, N, A, D]` of the span, q and k rotated; `backend`: computes it. Returns `[B, N, A, D]`.
        """
        ...


class KVView(Protocol):
    """What a span of frames may attend to. Its past never changes while the span is being denoised."""

    @property
    def rotation(self) -> Rotation:
        """Cosines and sines of the span's tokens, `[N, D / 2]`, on the device of the cache; computed once per view."""
        ...

    def at(self, layer: int) -> Memory:
        """The memory of one layer."""
        ...


class Decoder(Protocol):
    """Makes images from the latents of one video, a few frames at a time and in order."""

    def decode(self, latents: Latents) -> Images:
        """The next images, in [-1, 1]."""
        ...

    def reset(self) -> None:
        """Start a new video."""
        ...
