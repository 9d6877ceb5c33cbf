"""The cache of training: immutable pages, one for every finished span.

A view holds its own tuple of pages, so that recomputing a layer under activation checkpointing sees exactly what the
forward pass saw, whatever was recorded since. Remembered keys and values are detached: context is a constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longlive.cache.window import Window, check_span, frames_to_reread
from longlive.ops.rope import rotate, turn_in_time
from longlive.types import Heads, Mask, Seen


class Page(NamedTuple):
    """Keys and values of some frames, one tensor `[B, N, A, D]` a layer; never written after it is made."""

    frames: range
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def cut(self, frames: range) -> Page:
        """The part of the page that lies in `frames`."""
        kept = range(max(self.frames.start, frames.start), min(self.frames.stop, frames.stop))
        tokens = self.keys[0].shape[1] // len(self.frames)
        part = slice((kept.start - self.frames.start) * tokens, (kept.stop - self.frames.start) * tokens)
        return Page(kept, tuple(k[:, part] for k in self.keys), tuple(v[:, part] for v in self.values))

    def only(self, frames: range) -> Page:
        """`cut`, in memory of its own: the rest of a page (a recache makes long ones) is let go."""
        part = self.cut(frames)
        if part.frames == self.frames:
            return self
        return Page(part.frames, tuple(k.clone() for k in part.keys), tuple(v.clone() for v in part.values))


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


class HistoryView:
    """A span and the pages it may see, fixed when the view was made."""

    mask: Mask | None = None

    def __init__(self, span: range, sink: tuple[Page, ...], recent: tuple[Page, ...], sink_turn: int, theta: float) -> None:
        self.frames = span
        self._sink, self._recent, self._sink_turn, self._theta = sink, recent, sink_turn, theta

    def extend(self, layer: int, k: Heads, v: Heads) -> tuple[Seen, Seen]:
        sink_keys = [page.keys[layer] for page in self._sink]
        if self._sink_turn:
            turn = turn_in_time(self._sink_turn, k.shape[-1], theta=self._theta, device=k.device)
            sink_keys = [rotate(keys, turn) for keys in sink_keys]
        keys = torch.cat([*sink_keys, *(page.keys[layer] for page in self._recent), k], dim=1)
        values = torch.cat([*(page.values[layer] for page in (*self._sink, *self._recent)), v], dim=1)
        return keys, values


class _Recorder(HistoryView):
    """A view that also keeps what passes through it, detached."""

    def __init__(self, view: HistoryView) -> None:
        self.__dict__.update(view.__dict__)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Heads, v: Heads) -> tuple[Seen, Seen]:
        self.kept[layer] = (k.detach(), v.detach())
        return super().extend(layer, k, v)


class HistoryCache:
    """Pages of the sink and the recent frames; pages that no later block can see are dropped."""

    def __init__(self, *, window: Window, relative: bool = False, theta: float = 10000.0) -> None:
        self.window, self.relative, self._theta = window, relative, theta
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self.end = 0
        self._sink_start = 0
        self._recent_start = self.window.sink
        self._pages: tuple[Page, ...] = ()

    def view(self, span: range) -> HistoryView:
        check_span(span, self.end, self.window)
        oldest = max(self._recent_start, span.stop - self.window.recent)
        sink = range(self._sink_start, self._sink_start + self.window.sink)
        turn = oldest - sink.stop if self.relative and self.end >= sink.stop else 0
        recent = range(max(oldest, sink.stop), self.end)
        return HistoryView(span, self._cut(sink), self._cut(recent), turn, self._theta)

    @contextmanager
    def record(self, span: range) -> Iterator[HistoryView]:
        recorder = _Recorder(self.view(span))
        yield recorder
        layers = [recorder.kept[layer] for layer in sorted(recorder.kept)]
        page = Page(span, tuple(k for k, _ in layers), tuple(v for _, v in layers))
        self.end = span.stop
        sink = range(self._sink_start, self._sink_start + self.window.sink)
        still_seen = range(self.end - self.window.recent, self.end)
        pages = (*self._pages, page)
        self._pages = tuple(
            p if _overlap(p.frames, still_seen) else p.only(sink)
            for p in pages
            if _overlap(p.frames, sink) or _overlap(p.frames, still_seen)
        )

    def forget(self, *, keep_sink: bool) -> range:
        span = frames_to_reread(self.end, self.window, keep_sink=keep_sink)
        if keep_sink and self.end > self.window.visible:
            sink = range(self._sink_start, self._sink_start + self.window.sink)
            self._pages, self._recent_start = self._cut(sink), span.start
        else:
            self._pages, self._sink_start, self._recent_start = (), span.start, span.start + self.window.sink
        self.end = span.start
        return span

    def clear(self) -> None:
        """Drop everything; the next frames are the sink."""
        self._pages, self._sink_start, self._recent_start = (), self.end, self.end + self.window.sink

    def state(self) -> dict[str, Any]:
        """All that later blocks depend on, on the CPU: what a run stopped in the middle of a video saves."""
        pages = [  # cloned: a page may be a part of a larger one, which would be saved whole
            {"start": p.frames.start, "keys": [k.cpu().clone() for k in p.keys], "values": [v.cpu().clone() for v in p.values]}
            for p in self._pages
        ]
        ends = [p.frames.stop for p in self._pages]
        return {"end": self.end, "sink_start": self._sink_start, "recent_start": self._recent_start, "pages": pages, "ends": ends}

    def load(self, state: dict[str, Any], *, device: torch.device | str = "cpu") -> None:
        """The inverse of `state`."""
        self.end, self._sink_start, self._recent_start = state["end"], state["sink_start"], state["recent_start"]
        self._pages = tuple(
            Page(range(page["start"], end), tuple(k.to(device) for k in page["keys"]), tuple(v.to(device) for v in page["values"]))
            for page, end in zip(state["pages"], state["ends"], strict=True)
        )

    def _cut(self, frames: range) -> tuple[Page, ...]:
        return tuple(page.cut(frames) for page in self._pages if _overlap(page.frames, frames))
