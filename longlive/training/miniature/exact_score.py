"""The exact score of the miniature's world: what a teacher without error would predict.

The world is finite. The clips of a caption are `len(RADII) * LIGHTS` videos (templates), each at every cell of the torus; with an
autoencoder that pads circularly, the latents of a moved video are the moved latents. The posterior mean of clean latents given noisy ones is
therefore a weighted sum of moved templates, with weights softmax(-|x_t - (1 - sigma) x_0|^2 / 2 sigma^2); correlations with all
positions at once are products in the frequency domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.generation.dimensions import Timing
from longlive.miniature.captions import parse
from longlive.miniature.world import LIGHTS, MOTIONS, RADII, Captioned, Identity, render
from longlive.models.vae import encode_video, spatial_padding
from longlive.ops.flow_matching import NUM_TIMESTEPS
from longlive.training.miniature.latent_videos import to_float
from longlive.types import Latents, Timesteps

Spoken = tuple[Captioned, Captioned]
"""The captions of a clip before and from the frame of the switch; twice the same: no switch."""

SETTLED = 4  # latent frames after which the encoder has forgotten a start or a switch: the others are moved copies of the last


def _light_weights() -> Tensor:
    """How latents of all lights follow from those of every second one: `[LIGHTS, LIGHTS / 2]`.

    Shading is linear in cosine and sine of the light's angle, the encoder nearly so (rms 0.003 where latents deviate by 0.7).
    """
    angle = torch.arange(LIGHTS) * (2 * torch.pi / LIGHTS)
    waves = torch.stack([torch.ones(LIGHTS), angle.cos(), angle.sin(), (2 * angle).cos()], dim=1)
    return waves @ torch.linalg.pinv(waves[::2])


LIGHT_WEIGHTS = _light_weights()


class ExactScore:
    """Posterior means of clips of `num_frames` latent frames; switches happen at latent frame `switch_at`.

    Raises:
        ValueError: for an autoencoder without circular padding, whose latents do not move with the video.
    """

    def __init__(self, vae: AutoencoderKLWan, *, num_frames: int, switch_at: int, spread: float = 0.0, path: Path | None = None) -> None:
        if spatial_padding(vae) != "circular":
            raise ValueError("the exact score needs an autoencoder with circular padding: moved latents are not those of the moved video")
        self.vae, self.num_frames, self.switch_at, self.spread = vae, num_frames, switch_at, spread
        self._known: dict[Spoken, Tensor] = torch.load(path, weights_only=False) if path else {}

    def of(self, earlier: Sequence[str], prompts: Sequence[str]) -> Callable[[Latents, Timesteps], Latents]:
        """The score of clips whose prompts were `earlier` before their switch."""
        spoken = [(Captioned(**parse(before)), Captioned(**parse(after))) for before, after in zip(earlier, prompts, strict=True)]
        return partial(self.x0, spoken=spoken)

    @torch.no_grad()
    def templates(self, spoken: Spoken) -> Tensor:
        """Latents `[24, F, C, h, w]` of a caption's clips that start at the origin, all sizes and lights."""
        if spoken not in self._known:
            before, after = spoken
            settled = SETTLED if before == after else self.switch_at + SETTLED
            frames = min(settled, self.num_frames)
            timing = Timing()
            first, count = timing.first_frame(self.switch_at), timing.num_frames(frames)
            captions = [before if number < first else after for number in range(count)]
            identities = [Identity(radius, 0, 0, light) for radius in RADII for light in range(0, LIGHTS, 2)]
            videos = render([captions] * len(identities), identities, count)
            self._known[spoken] = encode_video(self.vae, to_float(videos)).half()
        known = self._known[spoken].float().unflatten(0, (len(RADII), -1))
        known = torch.einsum("lk,rkfchw->rlfchw", LIGHT_WEIGHTS, known).flatten(0, 1)
        x, y = MOTIONS[spoken[1].motion]
        missing = self.num_frames - known.shape[1]
        rolled = [known[:, -1:].roll((y * by, x * by), (-2, -1)) for by in range(1, missing + 1)]
        return torch.cat([known, *rolled], dim=1)

    @torch.no_grad()
    def x0(self, noisy: Latents, t: Timesteps, spoken: Sequence[Spoken]) -> Latents:
        """E[x_0 | x_t] for each sample's captions; all frames of a sample have the same timestep.
        """
        return torch.stack([self._one(*sample) for sample in zip(noisy.float(), t[:, 0] / NUM_TIMESTEPS, spoken, strict=True)])

    def _one(self, noisy: Tensor, sigma: Tensor, spoken: Spoken) -> Tensor:
        templates = self.templates(spoken)
        size, keep = noisy.shape[-2:], 1 - sigma
        variance = sigma**2 + (keep * self.spread) ** 2
        spectrum = torch.fft.rfft2(templates)
        products = (spectrum.conj() * torch.fft.rfft2(noisy)).sum(dim=(1, 2))
        energy = templates.square().sum(dim=(1, 2, 3, 4))[:, None, None]
        logits = (keep * torch.fft.irfft2(products, s=size) - keep**2 / 2 * energy) / variance
        weights = logits.flatten().softmax(0).view_as(logits)
        mean = torch.fft.irfft2((torch.fft.rfft2(weights)[:, None, None] * spectrum).sum(dim=0), s=size)
        return mean + keep * self.spread**2 / variance * (noisy - keep * mean)
