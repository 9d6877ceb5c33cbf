"""When the next block of a live session may begin. Knows nothing about models, video or clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MAX_UNACKNOWLEDGED = 3  # segments that are made before the client has acknowledged the first of them
MARGIN = 0.1  # seconds by which a segment should arrive before it is needed


class FlowControl:
    """Limits a session to what its client takes and plays. A segment is the encoded video of one block. For any thread.

    At most `MAX_UNACKNOWLEDGED` segments are on their way to the client. With `realtime` and a client that reports how much it has left
    to play, a block begins as late as its segment is still in time: the later it begins, the sooner a new prompt is shown.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, *, realtime: bool = True, now: Callable[[], float] = time.monotonic) -> None:
        self._realtime, self._now = realtime, now
        self._lock = threading.Lock()
        self._made = self._acknowledged = 0  # segments
        self._begin_at = 0.0  # when the next block should begin; 0: at once
        self._latency = 0.0  # seconds from when a block should begin until its segment is encoded, smoothed
        self._segment_seconds = 0.0  # length of the newest segment

    def begin_at_once(self) -> None:
        """Do not wait with the next block until the client reports again what it has left to play."""
        with self._lock:
            self._begin_at = 0.0

    def reconnect(self, next_segment: int) -> None:
        """A client has connected, which has all segments before `next_segment`."""
        with self._lock:
            self._acknowledged = max(self._acknowledged, min(next_segment, self._made))
            self._begin_at = 0.0

    def acknowledge(self, segment: int, buffered: float | None) -> None:
        """The client has the segments up to `segment`, and `buffered` seconds of them left to play; None when it does not play."""
        with self._lock:
            self._acknowledged = max(self._acknowledged, min(segment + 1, self._made))
            if buffered is not None and self._realtime:
                on_the_way = (self._made - 1 - segment) * self._segment_seconds
                self._begin_at = self._now() + buffered + on_the_way - 1.1 * self._latency - MARGIN

    def ready_at(self) -> float | None:
        """When the next block may begin, which may be past; None while too many segments are not acknowledged."""
        with self._lock:
            return None if self._made - self._acknowledged >= MAX_UNACKNOWLEDGED else self._begin_at

    def begin_block(self) -> float:
        """When the block that begins now should have begun."""
        with self._lock:
            return min(self._now(), self._begin_at or float("inf"))

    def end_block(self) -> None:
        """A block is made; its segment is not encoded yet."""
        with self._lock:
            self._made += 1
            if self._begin_at:
                self._begin_at += self._segment_seconds  # until the client reports again

    def end_segment(self, due_at: float, seconds: float) -> None:
        """The segment of the block that should have begun at `due_at` is encoded; it plays for `seconds`."""
        with self._lock:
            latency = self._now() - due_at
            self._latency = latency if not self._latency else 0.8 * self._latency + 0.2 * latency
            self._segment_seconds = seconds

    def may_preempt(self) -> bool:
        """Whether the block that is being made may be dropped and made again: when it would still be in time, or is late anyway."""
        with self._lock:
            left = self._begin_at + 1.1 * self._latency + MARGIN - self._now()  # seconds until its segment is needed
            return not 0 < left < self._latency
