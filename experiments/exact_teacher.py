"""The state world's perfect denoiser: the posterior mean over all of its videos, in closed form.

A prompt has 12288 equally likely videos x_k, one for each identity, all of the same norm. So the posterior of noisy latents
x_t = (1 - sigma) x + sigma noise, with its own sigma for each frame f, is

    softmax_k  sum_f (1 - sigma_f) / sigma_f^2 <x_t[f], x_k[f]>.

A frame is a sum of orthogonal parts, one for each attribute, and so is the inner product: given the motion, the posterior is a
product over size, texture, x and y (and over shape, colour and background where no caption says them), a few small softmaxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.state_world import CELLS, DRAWN, IDENTITY, LATENT_SHAPE, Prompt, captions_of, indices, offsets, tables
from longlive.miniature.world import MOTIONS, Captioned
from longlive.ops import flow_matching
from longlive.ops.flow_matching import NUM_TIMESTEPS
from longlive.types import KVView, Latents, Text, Timesteps

ANYTHING = Captioned("circle", "red", "black", "still")  # a placeholder where the prompt is None


@dataclass(frozen=True)
class ExactPrediction:
    """The posterior mean of noisy latents at `t`, with the properties of a denoiser's `Prediction`."""

    noisy: Latents
    x0: Latents
    t: Timesteps

    @property
    def velocity(self) -> Latents:
        """(x_t - x0) / sigma."""
        return flow_matching.velocity_from_x0(self.x0, self.noisy, self.t)

    @property
    def noise(self) -> Latents:
        """x_t + (1 - sigma) velocity."""
        return flow_matching.noise_from_velocity(self.velocity, self.noisy, self.t)


def _probabilities(logits: Tensor, nearest: bool) -> Tensor:
    """Softmax over the last axis; one-hot on the largest if `nearest`."""
    return one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits) if nearest else logits.softmax(dim=-1)


def _evidence(logits: Tensor, nearest: bool) -> Tensor:
    """Log of the sum of exp over the last axis; the largest if `nearest`."""
    return logits.amax(dim=-1) if nearest else logits.logsumexp(dim=-1)


def _hypotheses(prompts: Sequence[Prompt | None], num_latent_frames: int) -> Tensor:
    """Cells from the first frame `[B, M, F, 2]` under each possible motion: one if all prompts name it, otherwise all five."""
    if all(prompt is not None for prompt in prompts):
        return offsets([prompt for prompt in prompts if prompt is not None], num_latent_frames)[:, None]
    # A known prompt is repeated five times: equal hypotheses with equal weights change nothing.
    ways = [[Captioned("circle", "red", "black", way) if prompt is None else prompt for prompt in prompts] for way in MOTIONS]
    return torch.stack([offsets(way, num_latent_frames) for way in ways], dim=1)


def _expected(weighted: Float[Tensor, "B F 128"], prompts: Sequence[Prompt | None], *, nearest: bool) -> Float[Tensor, "B F 128"]:
    """The mean of the prompts' videos, weighted by exp of their inner product with `weighted`, or the video of the largest weight."""
    num_latent_frames, device = weighted.shape[1], weighted.device
    scores = {name: weighted @ table.to(weighted).T for name, table in tables().items()}  # [B, F, V]
    chances: dict[str, Tensor] = {}  # [B, F or 1, V]

    said = indices([ANYTHING if prompt is None else prompt for prompt in prompts], num_latent_frames)
    known = torch.tensor([prompt is not None for prompt in prompts], device=device)[:, None, None]
    for name in DRAWN.keys() - {"x", "y"}:
        chances[name] = _probabilities(scores[name].sum(dim=1), nearest)[:, None]
        if name not in IDENTITY:
            chances[name] = torch.where(known, one_hot(said[name], DRAWN[name]).to(weighted), chances[name])

    moved = _hypotheses(prompts, num_latent_frames).to(device)
    cells = torch.arange(CELLS, device=device)
    starts: dict[str, Tensor] = {}  # [B, M, 8]: log-likelihood of the position at the first frame
    for axis, name in enumerate(("x", "y")):
        shown = (cells + moved[..., axis, None]) % CELLS  # [B, M, F, 8]
        starts[name] = scores[name][:, None].expand(shown.shape).gather(-1, shown).sum(dim=2)
    motion = _probabilities(_evidence(starts["x"], nearest) + _evidence(starts["y"], nearest), nearest)  # [B, M]
    for axis, name in enumerate(("x", "y")):
        begun = (cells - moved[..., axis, None]) % CELLS
        given = _probabilities(starts[name], nearest)[:, :, None].expand(begun.shape).gather(-1, begun)
        chances[name] = (motion[..., None, None] * given).sum(dim=1)
    mean = torch.zeros_like(weighted)
    for name, table in tables().items():
        mean = mean + chances[name] @ table.to(weighted)
    return mean


def _check(latents: Latents, prompts: Sequence[Prompt | None]) -> None:
    if latents.ndim != 5 or latents.shape[2:] != LATENT_SHAPE or len(latents) != len(prompts):
        raise ValueError(
            f"latents {list(latents.shape)} for {len(prompts)} prompts; the state world's are [B, F, {', '.join(map(str, LATENT_SHAPE))}]"
        )


def nearest_clip(latents: Latents, prompts: Sequence[Prompt | None]) -> Latents:
    """The nearest of each prompt's 12288 videos; of the videos of all 750 captions where the prompt is None."""
    _check(latents, prompts)
    return _expected(latents.detach().flatten(2).double(), prompts, nearest=True).to(latents.dtype).view_as(latents)


def manifold_distance(latents: Latents, prompts: Sequence[Prompt | None]) -> Float[Tensor, " B"]:
    """Distance to `nearest_clip` over its norm: 0 for a video of this world, 1 for the mean of all."""
    near = nearest_clip(latents, prompts)
    return (latents.detach() - near).flatten(1).norm(dim=1) / near.flatten(1).norm(dim=1)


class ExactTeacher:
    """The real score of the state world, without error; replaces a `Denoiser` where no view is used.

    Text is what `state_world.text_of` returns, or captions; empty text (`state_world.negative`) means the mixture over all 750 captions,
    so guidance works too. With `clean_past` it is causal: the past also weights the videos.

    Args:
        past_sigma: assumed noise of a clean past; a past from a network is never exactly on the manifold.
    """

    def __init__(self, *, past_sigma: float = 0.05) -> None:
        if not past_sigma > 0:
            raise ValueError(f"past_sigma must be above 0, got {past_sigma}")
        self.past_sigma = past_sigma

    def __call__(
        self,
        noisy: Latents,
        t: float | Timesteps,
        text: Text | Sequence[Prompt | None],
        view: KVView | None = None,
        *,
        guided: bool = True,
        clean_past: Latents | None = None,
        past_text: Text | Sequence[Prompt | None] | None = None,
    ) -> ExactPrediction:
        """Predict at timestep `t` (above 0, to 1000): one number for all frames, or `[B, F]`; in float64, returned in `noisy`'s dtype.

        Args:
            text: `[B, L, E]`, or captions: one for a video, or one for each frame (those of `clean_past` first, unless `past_text`
                has them); None: empty text.
            view: must be None; a cache of keys and values means nothing to this teacher.
            guided: without effect, as in a `Denoiser` without guidance.
            clean_past: the frames just before these, `[B, P, C, H, W]`.
            past_text: their prompts, if they differ (a prompt switch).

        Raises:
            ValueError: for a view, for t outside (0, 1000], for text that is not a caption.
        """
        if view is not None:
            raise ValueError("the exact teacher cannot read a cache's view; give it clean_past")
        levels: Tensor = t if isinstance(t, Tensor) else torch.full(noisy.shape[:2], t, dtype=torch.float32, device=noisy.device)
        lowest, highest = levels.min().item(), levels.max().item()
        if not 0 < lowest <= highest <= NUM_TIMESTEPS:
            raise ValueError(f"t must be above 0 and at most {NUM_TIMESTEPS}, got {lowest} to {highest}")
        prompts = captions_of(text) if isinstance(text, Tensor) else list(text)
        _check(noisy, prompts)
        sigma = (levels.double() / NUM_TIMESTEPS)[..., None].to(noisy.device)
        weighted = (1 - sigma) / sigma.square() * noisy.flatten(2).double()
        if clean_past is not None:
            _check(clean_past, prompts)
            if past_text is not None:
                old = captions_of(past_text) if isinstance(past_text, Tensor) else list(past_text)
                prompts = _joined(old, clean_past.shape[1], prompts, noisy.shape[1])
            weighted = torch.cat([clean_past.flatten(2).double() / self.past_sigma**2, weighted], dim=1)
        elif past_text is not None:
            raise ValueError("past_text without clean_past; give both or neither")
        x0 = _expected(weighted, prompts, nearest=False)[:, -noisy.shape[1] :]
        return ExactPrediction(noisy, x0.to(noisy.dtype).view_as(noisy), levels)


def _joined(old: Sequence[Prompt | None], num_old: int, new: Sequence[Prompt | None], num_new: int) -> list[Prompt | None]:
    """One caption for each frame of the past and of the present."""
    if len(old) != len(new):
        raise ValueError(f"{len(old)} prompts of the past for {len(new)} of the present; their numbers must be equal")
    joined: list[Prompt | None] = []
    for before, after in zip(old, new, strict=True):
        if before is None or after is None:
            raise ValueError("a prompt switch is between two captions, not empty text")
        joined.append(_each(before, num_old) + _each(after, num_new))
    return joined


def _each(prompt: Prompt, num_latent_frames: int) -> list[Captioned]:
    return [prompt] * num_latent_frames if isinstance(prompt, Captioned) else list(prompt)
