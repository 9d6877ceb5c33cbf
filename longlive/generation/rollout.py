"""How a video is made, block after block: the one block loop, of inference and of training.

Knows nothing of storage (a `KVCache` does), of losses or of users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longlive.cache.window import KVCache
from longlive.generation.denoiser import Denoiser
from longlive.ops.flow_matching import add_noise
from longlive.types import Latents, Text, TextKV

Draw = Callable[[Latents], Latents]
"""Gaussian noise shaped like the given latents."""

OnStep = Callable[[int, float, Latents], "Latents | None"]
"""Called after each denoising pass with its number, timestep and clean latents; what it returns, if anything, replaces them."""

Recache = Literal["joint", "causal", "none", "clear"]
"""What a prompt switch does with the past: the recent frames pass again together (KV-recache) or block by block in order;
only the text changes and old keys and values are kept; or everything is dropped. The last two are for comparison."""


class BlockAborted(Exception):
    """A block was not wanted any more; it has left nothing behind."""


class Rollout:
    """Makes blocks of clean latents from noise, each seeing what the cache shows of the video so far.

    Args:
        steps: timesteps t of the denoising passes, falling, e.g. 1000, 937.5, 833.33, 625 (`ops.flow_matching.warp_steps`).
        draw: fresh noise for going from one step to the next (the few-step models are trained so). None uses the noise
            the network itself predicts: one Euler step of the flow, for a network that was not distilled.
        context_t: timestep at which finished frames are remembered.
        on_step: a caller that wants to watch every denoising pass, or to change what it made.
        recache: what `switch` does with the past.
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
        recache: Recache = "joint",
    ) -> None:
        if not steps:
            raise ValueError("a rollout needs at least one denoising step")
        if recache not in get_args(Recache):
            raise ValueError(f"recache {recache!r} is unknown; choose from {', '.join(get_args(Recache))}")
        self.denoiser, self.cache = denoiser, cache
        self.steps, self.draw, self.context_t, self.on_step = list(steps), draw, context_t, on_step
        self.recache: Recache = recache
        self._clean: Latents | None = None  # the frames a prompt switch may have to read again
        self._block = 0  # frames of the newest block
        self._finite: list[Tensor] = []  # of each pass over the newest block

    @property
    def end(self) -> int:
        """Frames made and remembered so far."""
        return self.cache.end

    def block(
        self,
        noise: Latents,
        text: Text | TextKV,
        *,
        stop_at: int | None = None,
        grad: bool = False,
        guided: bool = True,
        should_abort: Callable[[], bool] | None = None,
    ) -> Latents:
        """The clean latents of the next block; leaves nothing behind (`remember` does).

        Args:
            noise: `[B, K, C, H, W]`, Gaussian.
            stop_at: number of denoising passes, all of them if None.
            grad: whether the last pass (and only that) carries a gradient.
            guided: whether the denoiser's guidance, if it has any, is used.
            give_up: asked between two passes whether the block is not wanted any more.

        Raises:
            GivenUp: when it is not.

        Whether the result is finite is not looked at here, where asking would make a GPU wait at every block: see `check_finite`.
        """
        steps = self.steps[: len(self.steps) if stop_at is None else stop_at]
        span = range(self.end, self.end + noise.shape[1])
        self._block = len(span)
        view = self.cache.view(span)
        noisy = noise
        self._finite = []
        for number, t in enumerate(steps):
            last = number == len(steps) - 1
            with torch.set_grad_enabled(grad and last):
                prediction = self.denoiser(noisy, t, text, view, guided=guided)
                x0 = prediction.x0
            self._finite.append(torch.isfinite(x0).all())
            if self.on_step is not None and (changed := self.on_step(number, t, x0)) is not None:
                x0 = changed
            if last:
                return x0
            if should_abort is not None and should_abort():
                raise BlockAborted
            implied = prediction.noise if self.draw is None else self.draw(x0)
            noisy = add_noise(x0, implied, torch.full(noise.shape[:2], steps[number + 1], device=noise.device))
        raise ValueError(f"stop_at must be 1 to {len(self.steps)}, got {stop_at}")

    def check_finite(self) -> None:
        """Look at the newest block, which is not remembered yet.

        Raises:
            FloatingPointError: with block and step, when a pass gave a value that is not finite.
        """
        finite = torch.stack(self._finite).tolist() if self._finite else []
        if not all(finite):
            where = f"block {self.end // self._block} (frames {self.end}-{self.end + self._block - 1}), step {finite.index(False) + 1}"
            raise FloatingPointError(f"latents are not finite in {where}")

    @torch.no_grad()
    def remember(self, x0: Latents, text: Text | TextKV, span: range | None = None) -> None:
        """Pass clean latents through the network at the context level, so that later blocks see them."""
        x0 = x0.detach()
        if span is None:
            span = range(self.end, self.end + x0.shape[1])
            self._block = len(span)
            known = x0 if self._clean is None else torch.cat([self._clean, x0], dim=1)
            self._clean = known[:, -self.cache.window.visible :]
        with self.cache.record(span) as view:
            self.denoiser.write_kv(x0, self.context_t, text, view)

    def switch(self, text: Text | TextKV, *, keep_sink: bool) -> None:
        """KV-recache: the recent frames pass again, together, under the new prompt; old words leave the cache, the picture stays.

        So it is with `recache="joint"`; "causal" passes them block by block, "none" does nothing, "clear" drops the past.
        """
        if self.end == 0 or self.recache == "none":
            return
        if self.recache == "clear":
            self.cache.clear()
            self._clean = None
            return
        assert self._clean is not None
        end = self.end
        span = self.cache.forget(keep_sink=keep_sink)
        first = end - self._clean.shape[1]
        step = self._block if self.recache == "causal" else len(span)
        for start in range(span.start, span.stop, step):
            part = range(start, min(start + step, span.stop))
            self.remember(self._clean[:, part.start - first : part.stop - first], text, part)

    def state(self) -> dict[str, Any]:
        """The clean frames that a switch may read again; the cache has a state of its own."""
        return {"clean": None if self._clean is None else self._clean.cpu(), "block": self._block}

    def load(self, state: dict[str, Any], *, device: torch.device | str = "cpu") -> None:
        """The inverse of `state`."""
        self._clean = None if state["clean"] is None else state["clean"].to(device)
        self._block = state["block"]

    def reset(self) -> None:
        """Start a new video, in a cache that was reset."""
        self._clean, self._finite = None, []
