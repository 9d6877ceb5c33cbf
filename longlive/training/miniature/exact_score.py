"""The exact score of the miniature's world: what a teacher without error would predict.

The world is finite. The clips of a caption are `len(RADII) * LIGHTS` videos (templates), each at every cell of the torus; with an
autoencoder that pads circularly, the latents of a moved video are the moved latents. The posterior mean of clean latents given noisy
ones is therefore a weighted sum of moved templates, with weights softmax(-|x_t - (1 - sigma) x_0|^2 / 2 sigma^2); correlations with
all positions at once are products in the frequency domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from longlive.generation.dimensions import Timing
from longlive.miniature.captions import parse
from longlive.miniature.world import ATTRIBUTES, LIGHTS, MOTIONS, RADII, SIZE, Captioned, Identity, render
from longlive.models.vae import encode_video, spatial_padding
from longlive.ops.flow_matching import NUM_TIMESTEPS
from longlive.training.clips import Clip
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


def check_world(prompts: Iterable[str], *, height: int, width: int) -> None:
    """Raises ValueError for a size other than the world's, or a prompt that does not name every attribute of its captions."""
    if (height, width) != (SIZE, SIZE):
        raise ValueError(f"exact_score knows videos of {SIZE}x{SIZE} pixels, not {height}x{width}")
    for prompt in prompts:
        named = parse(prompt)
        if missing := [name for name in ATTRIBUTES if name not in named]:
            raise ValueError(f"exact_score needs prompts of the miniature's world; {prompt!r} names no {', no '.join(missing)}")


class ExactScore:
    """Posterior means of clips of `num_frames` latent frames, with the switch of those that have one at latent frame `switch_at`.

    Templates are encoded when first needed and kept (0.1 MB per caption, 0.2 MB per switch; one to two seconds of one core each).

    Raises:
        ValueError: for an autoencoder without circular padding, whose latents do not move with the video.
    """

    def __init__(self, vae: AutoencoderKLWan, *, num_frames: int, switch_at: int) -> None:
        if spatial_padding(vae) != "circular":
            raise ValueError("exact_score needs an autoencoder that pads circularly; with another, latents do not move with the video")
        self.vae, self.num_frames, self.switch_at = vae, num_frames, switch_at
        self._encoded: dict[Spoken, Tensor] = {}

    def of(self, clip: Clip) -> Callable[[Latents, Timesteps], Latents]:
        """x0 of noisy versions of a clip `[B, F, C, h, w]`; all frames of a sample have the same timestep."""
        spoken = [(Captioned(**parse(before)), Captioned(**parse(after))) for before, after in zip(clip.earlier, clip.prompts, strict=True)]
        return partial(self.x0, spoken=spoken)

    @torch.no_grad()
    def x0(self, noisy: Latents, t: Timesteps, spoken: Sequence[Spoken]) -> Latents:
        """E[x_0 | x_t] `[B, F, C, h, w]`, float32, for each sample's captions."""
        sigma = t[:, 0] / NUM_TIMESTEPS
        return torch.stack([posterior_mean(x, s, self.templates(words)) for x, s, words in zip(noisy.float(), sigma, spoken, strict=True)])

    @torch.no_grad()
    def templates(self, spoken: Spoken) -> Float[Tensor, "T F C h w"]:
        """Latents of a caption's clips that start at the origin: every size with every light, `T = len(RADII) * LIGHTS`."""
        before, after = spoken
        if spoken not in self._encoded:
            frames, timing = min(SETTLED + (self.switch_at if before != after else 0), self.num_frames), Timing()
            captions = [before if n < timing.first_frame(self.switch_at) else after for n in range(timing.num_frames(frames))]
            identities = [Identity(radius, 0, 0, light) for radius in RADII for light in range(0, LIGHTS, 2)]
            images = to_float(render([captions] * len(identities), identities, len(captions)))
            self._encoded[spoken] = encode_video(self.vae, images.to(self.vae.device)).half()
        encoded = self._encoded[spoken].float().unflatten(0, (len(RADII), -1))
        known = torch.einsum("lk,rkfchw->rlfchw", LIGHT_WEIGHTS.to(encoded), encoded).flatten(0, 1)
        x, y = MOTIONS[after.motion]
        moved = [known[:, -1:].roll((y * cells, x * cells), (-2, -1)) for cells in range(1, self.num_frames - known.shape[1] + 1)]
        return torch.cat([known, *moved], dim=1)


def posterior_mean(noisy: Float[Tensor, "F C h w"], sigma: Tensor, templates: Float[Tensor, "T F C h w"]) -> Float[Tensor, "F C h w"]:
    """E[x_0 | x_t = (1 - sigma) x_0 + sigma noise] where x_0 is one of the templates, moved by any number of cells, all equally likely."""
    size, keep = noisy.shape[-2:], 1 - sigma
    spectra = torch.fft.rfft2(templates)
    correlation = torch.fft.irfft2((spectra.conj() * torch.fft.rfft2(noisy)).sum(dim=(1, 2)), s=size)
    energy = templates.square().sum(dim=(1, 2, 3, 4))[:, None, None]
    logits = keep * (correlation - keep / 2 * energy) / sigma**2
    weights = logits.flatten().softmax(0).view_as(logits)
    return torch.fft.irfft2((torch.fft.rfft2(weights)[:, None, None] * spectra).sum(dim=0), s=size)
