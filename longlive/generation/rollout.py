"""How a video is made, block after block: the one block loop, of inference and of training.

Knows nothing of storage (a `KVCache` does), of losses or of users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longlive.cache.window import KVCache
from longlive.generation.denoiser import Denoiser
from longlive.ops.flow import add_noise
from longlive.types import Latents, Text, TextKV

Draw = Callable[[Latents], Latents]
"""Gaussian noise shaped like the given latents."""

OnStep = Callable[[int, float, Latents], "Latents | None"]
"""Called after each denoising pass with its number, timestep and clean latents; what it returns, if anything, replaces them."""


class Rollout:
    """Makes blocks of clean latents from noise, each seeing what the cache shows of the video so far.

    Args:
        steps: timesteps t of the denoising passes, falling, e.g. 1000, 937.5, 833.33, 625 (`ops.flow.warp_steps`).
        draw: fresh noise for going from one step to the next (the few-step models are trained so). None uses the noise
            the network itself predicts: one Euler step of the flow, for a network that was not distilled.
        context_t: timestep at which finished frames are remembered.
        on_step: a caller that wants to watch every denoising pass, or to change what it made.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cache: KVCache,
        *,
        steps: Sequence[float],
        draw: Draw | None,
        context_t: float = 0.0,
        on_step: OnStep | None = None,
    ) -> None:
        if not steps:
            raise ValueError("a rollout needs at least one denoising step")
        self.denoiser, self.cache = denoiser, cache
        self.steps, self.draw, self.context_t, self.on_step = list(steps), draw, context_t, on_step
        self._clean: Latents | None = None  # the frames a prompt switch may have to read again

    @property
    def end(self) -> int:
        """Frames made and remembered so far."""
        return self.cache.end

    def block(self, noise: Latents, text: Text | TextKV, *, stop_at: int | None = None, grad: bool = False, guided: bool = True) -> Latents:
        """The clean latents of the next block; leaves nothing behind (`remember` does).

        Args:
            noise: `[B, K, C, H, W]`, Gaussian.
            stop_at: number of denoising passes, all of them if None.
            grad: whether the last pass (and only that) carries a gradient.
            guided: whether the denoiser's guidance, if it has any, is used.

        Raises:
            FloatingPointError: when a pass gives a value that is not finite.
        """
        steps = self.steps[: len(self.steps) if stop_at is None else stop_at]
        span = range(self.end, self.end + noise.shape[1])
        view = self.cache.view(span)
        noisy = noise
        finite: list[Tensor] = []  # looked at once, at the end: asking a GPU at every step would make it wait
        for number, t in enumerate(steps):
            last = number == len(steps) - 1
            with torch.set_grad_enabled(grad and last):
                prediction = self.denoiser(noisy, t, text, view, guided=guided)
                clean = prediction.clean
            finite.append(torch.isfinite(clean).all())
            if self.on_step is not None and (changed := self.on_step(number, t, clean)) is not None:
                clean = changed
            if last:
                self._check(torch.stack(finite).tolist(), span)
                return clean
            implied = prediction.noise if self.draw is None else self.draw(clean)
            noisy = add_noise(clean, implied, torch.full(noise.shape[:2], steps[number + 1], device=noise.device))
        raise ValueError(f"stop_at must be 1 to {len(self.steps)}, got {stop_at}")

    @staticmethod
    def _check(finite: list[bool], span: range) -> None:
        if not all(finite):
            where = f"block {span.start // len(span)} (frames {span.start}-{span.stop - 1}), step {finite.index(False) + 1}"
            raise FloatingPointError(f"latents are not finite in {where}")

    @torch.no_grad()
    def remember(self, clean: Latents, text: Text | TextKV, span: range | None = None) -> None:
        """Pass clean latents through the network at the context level, so that later blocks see them."""
        clean = clean.detach()
        if span is None:
            span = range(self.end, self.end + clean.shape[1])
            known = clean if self._clean is None else torch.cat([self._clean, clean], dim=1)
            self._clean = known[:, -self.cache.window.visible :]
        with self.cache.record(span) as view:
            self.denoiser.read_only(clean, self.context_t, text, view)

    def switch(self, text: Text | TextKV, *, keep_sink: bool) -> None:
        """KV-recache: the recent frames pass again, together, under the new prompt; old words leave the cache, the picture stays."""
        if self.end == 0:
            return
        assert self._clean is not None
        end = self.end
        span = self.cache.forget(keep_sink=keep_sink)
        first = end - self._clean.shape[1]
        self.remember(self._clean[:, span.start - first : span.stop - first], text, span)
