"""Deviations of the public v1.0 code from its paper, one class each, for the experiment that measures their cost (spec: training 9).

The project's own cache and rollout know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from longlive.cache.history import HistoryCache, HistoryView, Page
from longlive.generation.rollout import Rollout
from longlive.ops.flow_matching import add_noise
from longlive.types import Heads, Latents, Seen, Text, TextKV

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
        self._pages = tuple(
            Page(page.frames, tuple(map(torch.zeros_like, page.keys)), tuple(map(torch.zeros_like, page.values))) for page in self._pages
        )
        return span


class NoisedContext(Rollout):
    """Finished blocks are written to the cache with a little noise, as in the public training code, but not in its inference code.

    A recache uses the clean frames. Needs `draw`.
    """

    @torch.no_grad()
    def remember(self, x0: Latents, text: Text | TextKV, span: range | None = None) -> None:
        if span is not None:
            super().remember(x0, text, span)
            return
        if self.draw is None:
            raise ValueError("context noise is drawn by `draw`; give the rollout one")
        x0 = x0.detach()
        super().remember(add_noise(x0, self.draw(x0), torch.full(x0.shape[:2], CONTEXT_T)), text)
        assert self._clean is not None
        self._clean = torch.cat([self._clean[:, : -x0.shape[1]], x0], dim=1)


class _Watching(HistoryView):
    """A view that stores the keys and values of the pass with gradient in `kept`."""

    def __init__(self, view: HistoryView, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.__dict__.update(view.__dict__)
        self._kept = kept

    def extend(self, layer: int, k: Heads, v: Heads) -> tuple[Seen, Seen]:
        if k.requires_grad:
            self._kept[layer] = (k, v)
        return super().extend(layer, k, v)


class LeakyCache(HistoryCache):
    """Straight-through context: cached values are those of the clean pass, with the gradient of the block's last denoising pass.

    So later blocks of a clip train earlier ones through values that were never used. In the public code the leak ends where a full cache
    overwrites its slots; here it lasts to the end of the clip. Pages of an earlier clip, or recached at a switch, are constants.
    """

    def reset(self) -> None:
        super().reset()
        self._exit: dict[int, tuple[Tensor, Tensor]] = {}

    def view(self, span: range) -> HistoryView:
        self._exit = {}
        return _Watching(super().view(span), self._exit)

    @contextmanager
    def record(self, span: range) -> Iterator[HistoryView]:
        made = self._exit
        with super().record(span) as view:
            yield view
        if not made:  # a clip without gradient, or a recache
            self._pages = tuple(
                Page(page.frames, tuple(k.detach() for k in page.keys), tuple(v.detach() for v in page.values)) for page in self._pages
            )
            return
        *before, page = self._pages
        with torch.enable_grad():
            keys = tuple(k + (made[layer][0] - made[layer][0].detach()) for layer, k in enumerate(page.keys))
            values = tuple(v + (made[layer][1] - made[layer][1].detach()) for layer, v in enumerate(page.values))
        self._pages = (*before, Page(page.frames, keys, values))
        self._exit = {}
