"""How a video is made, block after block: the one block loop, of inference and of training.

Knows nothing of storage (a `KVCache` does), of schedules (a `Solver` does), of losses or of users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longlive.cache.window import KVCache
from longlive.generation.clock import clock
from longlive.generation.denoiser import Denoiser, Prediction
from longlive.generation.solver import Solver
from longlive.generation.transition import Transition
from longlive.types import KVView, Latents, Text, TextKV

OnStep = Callable[[int, float, Latents], "Latents | None"]
"""Called after each denoising pass with its index from 0, its timestep and clean latents; what it returns, if anything, replaces them."""


class BlockAborted(Exception):
    """A block was abandoned between two passes. Nothing was remembered; the noise generators have advanced."""


class Rollout:
    """Makes blocks of clean latents from noise, each seeing what the cache shows of the video so far.

    Args:
        solver: timesteps of the denoising passes, and how to go from one to the next.
        context_t: timestep at which finished frames are recorded, without added noise (`context_noise` of the released configurations).
        on_step: callback after every denoising pass; may replace its clean latents.
    """

    def __init__(
        self, denoiser: Denoiser, cache: KVCache, solver: Solver, *, context_t: float = 0.0, on_step: OnStep | None = None
    ) -> None:
        self.denoiser, self.cache, self.solver, self.context_t, self.on_step = denoiser, cache, solver, context_t, on_step
        self._recent: Latents | None = None  # clean frames that a prompt switch may have to read again
        self._deferred: tuple[Latents, Text | TextKV] | None = None  # the newest block, whose clean pass is still to be made
        self._block = 0  # frames of the newest block
        self._finite: list[Tensor] = []  # of each pass over the newest block

    @property
    def end(self) -> int:
        """Frames made and remembered so far, a deferred block included."""
        return self.cache.end + (0 if self._deferred is None else self._deferred[0].shape[1])

    def block(
        self,
        noise: Latents,
        text: Text | TextKV,
        *,
        num_passes: int | None = None,
        grad: bool = False,
        guided: bool = True,
        should_abort: Callable[[], bool] | None = None,
    ) -> Latents:
        """The clean latents of the next block. Does not change what is remembered; `remember` does. A deferred block is remembered first.

        Does not check that they are finite, which would make the host wait for the GPU: `finite_check` does, when the caller can wait.

        Args:
            noise: `[B, F, C, H, W]`, Gaussian.
            num_passes: number of denoising passes, all of them if None.
            grad: whether gradients are recorded, in the last pass only.
            guided: whether the denoiser's guidance, if it has any, is used.
            should_abort: asked between two passes whether to abandon the block.

        Raises:
            BlockAborted: when `should_abort` says so.
            ValueError: when `num_passes` is not 1 to the number of timesteps, or the frames do not fit the window.
        """
        timesteps = self.solver.timesteps
        passes = len(timesteps) if num_passes is None else num_passes
        if not 1 <= passes <= len(timesteps):
            raise ValueError(f"num_passes must be 1 to {len(timesteps)}, got {num_passes}")
        self.catch_up()
        self._block, self._finite = noise.shape[1], []
        view, step = self.cache.view(range(self.end, self.end + noise.shape[1])), self.solver.start()
        noisy = noise
        for i in range(passes - 1):
            with torch.no_grad():
                prediction = self._predict(noisy, i, text, view, guided)
            if should_abort is not None and should_abort():
                raise BlockAborted
            noisy = step(prediction, i)
        with torch.set_grad_enabled(grad):
            return self._predict(noisy, passes - 1, text, view, guided).x0

    def _predict(self, noisy: Latents, i: int, text: Text | TextKV, view: KVView, guided: bool) -> Prediction:
        t = self.solver.timesteps[i]
        prediction = self.denoiser(noisy, t, text, view, guided=guided)
        self._finite.append(torch.isfinite(prediction.x0).all())
        if self.on_step is not None and (edited := self.on_step(i, t, prediction.x0)) is not None:
            prediction = prediction.edited(edited)
        return prediction

    def finite_check(self) -> Callable[[], None]:
        """A check of the newest block, for when the caller can wait for the device: to be called before or after it is remembered.

        It raises FloatingPointError, with block and step, when a pass gave a value that is not finite.
        """
        flags, frames, block = self._finite, range(self.end, self.end + self._block), self.end // max(1, self._block)
        on_host = torch.stack(flags).to("cpu", non_blocking=True) if flags else torch.ones(1, dtype=torch.bool)
        copied = clock(flags[0].device)() if flags else None

        def check() -> None:
            if copied is not None and copied.event is not None:
                copied.event.synchronize()
            if not all(finite := on_host.tolist()):
                where = f"block {block} (frames {frames.start}-{frames.stop - 1}), step {finite.index(False) + 1}"
                raise FloatingPointError(f"latents are not finite in {where}")

        return check

    def remember(self, x0: Latents, text: Text | TextKV) -> None:
        """Pass the clean latents of the next frames through the network at the context timestep, so that later blocks see them."""
        self.defer(x0, text)
        self.catch_up()

    def defer(self, x0: Latents, text: Text | TextKV) -> None:
        """As `remember`, but the pass is made by `catch_up` or the next `block`; a switch that reads the frames again leaves it out."""
        self.catch_up()
        x0 = x0.detach()
        self._deferred, self._block = (x0, text), x0.shape[1]
        known = x0 if self._recent is None else torch.cat([self._recent, x0], dim=1)
        self._recent = known[:, -self.cache.window.visible :]

    def catch_up(self) -> None:
        """Make the deferred pass, if there is one."""
        if self._deferred is not None:
            (x0, text), self._deferred = self._deferred, None
            self._record(x0, text, range(self.end, self.end + x0.shape[1]))

    @torch.no_grad()
    def _record(self, x0: Latents, text: Text | TextKV, span: range) -> None:
        with self.cache.record(span) as view:
            self.denoiser.write_kv(x0, self.context_t, text, view)

    def switch(self, text: Text | TextKV, transition: Transition) -> None:
        """KV-recache: pass the visible frames through the network again under the new prompt, so that their keys and values
        no longer depend on the old one. Nothing happens before the first block.

        Args:
            text: the new prompt.
            transition: whether the sink is kept, and how the past is encoded again.
        """
        if self._recent is None or transition.recache == "none":
            return
        if self._deferred is not None:  # the pass would write what is now cleared or written again
            self.cache.skip(self._deferred[0].shape[1])
            self._deferred = None
        if transition.recache == "clear":
            self.cache.clear()
            self._recent = None
            return
        end = self.end
        span = self.cache.forget(keep_sink=transition.keep_sink)
        first = end - self._recent.shape[1]
        step = self._block if transition.recache == "causal" else len(span)
        for start in range(span.start, span.stop, step):
            part = range(start, min(start + step, span.stop))
            self._record(self._recent[:, part.start - first : part.stop - first], text, part)

    def state(self) -> dict[str, Any]:
        """The clean frames that a switch may read again; the cache is saved by `HistoryCache.state`, after this call."""
        self.catch_up()
        return {"recent": None if self._recent is None else self._recent.cpu(), "block": self._block}

    def load(self, state: dict[str, Any], *, device: torch.device | str = "cpu") -> None:
        """The inverse of `state`."""
        self._recent = None if state["recent"] is None else state["recent"].to(device)
        self._block, self._deferred = state["block"], None

    def reset(self) -> None:
        """Start a new video, with an empty cache."""
        self.cache.reset()
        self._recent, self._deferred, self._finite = None, None, []
