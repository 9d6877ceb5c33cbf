"""Deviations of the public v1.0 code from its paper, one class each, for the experiment that measures their cost (spec: training 9).

The project's own cache and rollout know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longlive.cache.history import HistoryCache
from longlive.cache.memory import CacheView, HistoryMemory, TokenIndices
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.ops.flow_matching import add_noise
from longlive.types import AttentionBackend, Heads, Latents, Text, TextKV

Deviation = Literal["zero_sink", "context_noise", "gradient_leak"]
CONTEXT_T = 4.98  # the public table's nearest entry to 0: sigma 0.00498


class ZeroSinkCache(HistoryCache):
    """After a switch beyond the first window the sink's keys and values are 0, for the rest of the video.

    A zero key has logit 0 and a zero value: the sink no longer says anything, but still takes its share of the attention.
    """

    def forget(self, *, keep_sink: bool) -> range:
        if self.end <= self.window.visible:
            return super().forget(keep_sink=False)
        span = super().forget(keep_sink=True)
        self._compact()  # into slots that no earlier view reads
        sink = self._indices(list(self._slot.values()))
        for buffer in (*self._keys, *self._values):
            buffer.index_fill_(1, sink, 0.0)
        return span


class NoisedContext(Rollout):
    """Finished blocks are written to the cache with a little noise, as in the public training code, but not in its inference code.

    A recache uses the clean frames. Needs a `FewStep` solver, whose `draw` gives the noise.
    """

    def remember(self, x0: Latents, text: Text | TextKV) -> None:
        if not isinstance(self.solver, FewStep):
            raise ValueError(f"context noise is drawn by the solver; give the rollout FewStep, not {type(self.solver).__name__}")
        x0 = x0.detach()
        super().remember(add_noise(x0, self.solver.draw(x0), torch.full(x0.shape[:2], CONTEXT_T)), text)
        assert self._recent is not None
        self._recent = torch.cat([self._recent[:, : -x0.shape[1]], x0], dim=1)


KeysValues = tuple[Tensor, Tensor]


class _LeakyMemory(NamedTuple):
    """Adds gradients to the past that it reads, and keeps the keys and values of the pass that carries a gradient."""

    inner: HistoryMemory
    leaks: list[tuple[TokenIndices, KeysValues]]  # places among what is visible, and zeros that carry a gradient
    kept: dict[int, KeysValues]
    layer: int

    def write(self, k: Heads, v: Heads) -> None:
        self.inner.write(k, v)

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        if k.requires_grad:
            self.kept[self.layer] = (k, v)
        keys, values = self.inner.gathered(k, v)
        for places, (for_keys, for_values) in self.leaks:
            keys, values = keys.index_add(1, places, for_keys), values.index_add(1, places, for_values)
        return backend(q, keys, values)


class LeakyCache(HistoryCache):
    """Straight-through context: cached values are those of the clean pass, with the gradient of the block's last denoising pass.

    So later blocks of a clip train earlier ones through values that were never used. In the public code the leak ends where a full cache
    overwrites its slots; here it lasts to the end of the clip. Frames of an earlier clip, or recached at a switch, are constants.
    """

    def reset(self) -> None:
        super().reset()
        self._exit: dict[int, KeysValues] = {}
        self._leak: dict[int, dict[int, KeysValues]] = {}  # of each frame and layer

    def view(self, span: range) -> CacheView:
        view, self._exit = super().view(span), {}
        sink, recent = self._extent.visible(span)
        past = [frame for frame in (*sink, *recent) if frame < span.start]
        leaks = [(self._indices([index]), self._leak[frame]) for index, frame in enumerate(past) if frame in self._leak]
        kept = self._exit

        def at(layer: int) -> _LeakyMemory:
            inner = view.at(layer)
            assert isinstance(inner, HistoryMemory)
            return _LeakyMemory(inner, [(places, leak[layer]) for places, leak in leaks], kept, layer)

        return CacheView(view.rotation, at)

    @contextmanager
    def record(self, span: range) -> Iterator[CacheView]:
        made = self._exit
        with super().record(span) as view:
            yield view
        if not made:  # a clip without gradient, or a recache
            self._leak = {}
        with torch.enable_grad():
            zeros = {layer: (k - k.detach(), v - v.detach()) for layer, (k, v) in made.items()}
            for index, frame in enumerate(span if zeros else ()):
                part = slice(index * self._tokens, (index + 1) * self._tokens)
                self._leak[frame] = {layer: (k[:, part], v[:, part]) for layer, (k, v) in zeros.items()}
        self._exit = {}
