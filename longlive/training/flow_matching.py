"""Flow matching for a bidirectional network: the teacher's objective. Knows no trainer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import add_noise
from longlive.types import Latents, Text, Timesteps


class FlowMatching:
    """Mean of (v - (noise - x))^2 over whole clips (Lipman et al. 2023)."""

    def __init__(self, network: WanTransformer) -> None:
        self.network = network

    def __call__(self, clip: Latents, text: Text, *, t: Float[Tensor, " B"] | Timesteps, noise: Latents) -> Tensor:
        """The loss of clean clips at timesteps `t`, one per clip or one per frame; `noise` is Gaussian, of the clips' shape."""
        timesteps = t[:, None].expand(-1, clip.shape[1]) if t.ndim == 1 else t
        velocity = self.network(add_noise(clip, noise, timesteps), timesteps, text)
        return (velocity.float() - (noise - clip).float()).square().mean()
