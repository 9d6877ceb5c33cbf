"""Distribution matching distillation: the losses of generator and critic on a given clip. Knows no rollout and no trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longlive.ops.flow_matching import NUM_TIMESTEPS, add_noise, shifted
from longlive.types import Latents, Text, Timesteps, X0Predictor


class GeneratorLoss(NamedTuple):
    """`loss` carries the gradient; `gradient` is the direction g for each element of the clip; `noisy` is the clip with noise."""

    loss: Tensor
    gradient: Latents
    noisy: Latents


class DMD:
    """Score distillation between a frozen teacher and a critic that follows the generator (DMD2, Yin et al. 2024).

    Args:
        teacher: the real score, bidirectional, guided: r = r_n + s (r_c - r_n) with s = `guidance_scale` (1: no guidance).
        critic: the fake score, bidirectional, without guidance.
        guidance_rescale: factor phi, 0 to 1, by which the guided prediction is rescaled to the norm of the conditional one (Lin et al.
            2024, equations 15 and 16). Guidance at high noise overshoots whatever of the picture's mean the prompt determines, and the
            generator would learn that.
        shift: of the timesteps, which are clamped to `min_t` and `max_t`.
    """

    def __init__(
        self,
        teacher: X0Predictor,
        critic: X0Predictor,
        *,
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        shift: float = 5.0,
        min_t: float = 20.0,
        max_t: float = 980.0,
    ) -> None:
        self.teacher, self.critic, self.guidance_scale, self.guidance_rescale = teacher, critic, guidance_scale, guidance_rescale
        self.shift, self.min_t, self.max_t = shift, min_t, max_t

    def timesteps(self, drawn: Float[Tensor, "B F"]) -> Timesteps:
        """t of uniform integers n in 0..999: 1000 s u / (1 + (s - 1) u) with u = n / 1000, clamped."""
        return (NUM_TIMESTEPS * shifted(drawn / NUM_TIMESTEPS, self.shift)).clamp(self.min_t, self.max_t)

    def draw_timesteps(self, clip: Latents, generator: torch.Generator) -> Timesteps:
        """One random timestep per sample, shared by its frames."""
        n = torch.randint(NUM_TIMESTEPS, (clip.shape[0], 1), generator=generator).float()
        return self.timesteps(n).expand(-1, clip.shape[1]).to(clip.device)

    def generator_loss(
        self,
        clip: Latents,
        text: Text,
        negative: Text,
        *,
        t: Timesteps,
        noise: Latents,
        fresh: Bool[Tensor, "B F"] | None = None,
        exact: Callable[[Latents, Timesteps], Latents] | None = None,
    ) -> GeneratorLoss:
        """L = 1/2 mean over fresh frames of (x - stopgrad(x - g))^2, g = (f - r) / mean|x - r| of each sample.

        f, r: x0 predictions of critic and teacher for the noisy clip; `exact`, where the real score is known, replaces the teacher. The
        value is 1/2 mean g^2, the gradient g / count; frames outside `fresh` get exactly 0. The difference is computed in float32; NaN
        becomes 0. The target is float64, so that x - (x - g) is g.
        """
        with torch.no_grad():
            noisy = add_noise(clip, noise, t)
            fake = self.critic(noisy, t, text).x0.float()
            real = self._guided(noisy, t, text, negative) if exact is None else exact(noisy, t)
            scale = (clip.float() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = torch.nan_to_num((fake - real) / scale)
            target = clip.double() - gradient
        squares = (clip - target).square()
        if fresh is not None:
            squares = squares[fresh]
        return GeneratorLoss(0.5 * squares.mean(), gradient, noisy)

    def _guided(self, noisy: Latents, t: Timesteps, text: Text, negative: Text) -> Latents:
        """The teacher's guided prediction, rescaled."""
        with_text, without = (self.teacher(noisy, t, words).x0.float() for words in (text, negative))
        real = with_text + (self.guidance_scale - 1) * (with_text - without)
        if self.guidance_rescale:
            norms = [one.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt() for one in (with_text, real)]
            real = real * (1 - self.guidance_rescale + self.guidance_rescale * norms[0] / norms[1])
        return real

    def critic_loss(self, clip: Latents, text: Text, *, t: Timesteps, noise: Latents, fresh: Bool[Tensor, "B F"] | None = None) -> Tensor:
        """Flow matching of the critic on the generator's clip: mean of (v - (noise - x))^2, over all frames if `fresh` is None."""
        clip = clip.detach()
        velocity = self.critic(add_noise(clip, noise, t), t, text).velocity
        squares = (velocity.float() - (noise.float() - clip.float())).square()
        return (squares if fresh is None else squares[fresh]).mean()
