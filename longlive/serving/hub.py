"""Sessions that share one model: who is admitted, who waits, whose turn it is.

One thread owns the model and makes a block at a time, of each session that is ready in turn. Knows nothing about WebSockets.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from longlive.generation.pipeline import LongLivePipeline
from longlive.serving.live import Client, Live
from longlive.serving.messages import Refused

SWEEP_SECONDS = 0.25  # between two looks at who has gone
RECONNECT_SECONDS = 30.0  # that a session waits for its client to come back
KEPT = 1000  # ended sessions whose files are still found by name

log = logging.getLogger(__name__)


class Files(NamedTuple):
    """What an ended session has left."""

    recording: Path
    timeline_file: Path


class Waiting(Client, Protocol):
    """A client that may have to wait until it is admitted."""

    def place(self, number: int) -> None:
        """So many sessions come before this one."""
        ...

    def admitted(self, live: Live) -> None: ...


class Hub:
    """The model, its sessions, and those who wait.

    Args:
        pipe: on its device already.
        folder: of recordings and timelines.
        most: sessions at a time.
        idle_seconds: after which a session that nobody takes anything from ends.
        scale, realtime, observe: as in `Live`.
    """

    def __init__(
        self,
        pipe: LongLivePipeline,
        *,
        folder: Path,
        most: int,
        height: int,
        width: int,
        scale: int,
        idle_seconds: float = 600.0,
        reconnect_seconds: float = RECONNECT_SECONDS,
        realtime: bool = True,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self.pipe, self.folder, self.most = pipe, folder, most
        self.height, self.width, self.scale, self.realtime = height, width, scale, realtime
        self.idle_seconds, self.reconnect_seconds = idle_seconds, reconnect_seconds
        self.sessions: OrderedDict[str, Live] = OrderedDict()
        self.over: OrderedDict[str, Files] = OrderedDict()
        self._observe = observe
        self._queue: OrderedDict[Waiting, tuple[str, int | None, bool | None]] = OrderedDict()
        self._changed = threading.Condition()
        self._stopping = False
        self._turn = 0
        self._swept = 0.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every session and waits until their recordings are whole."""
        with self._changed:
            self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for live in list(self.sessions.values()):
            live.end("the server stops")
        for live in list(self.sessions.values()):
            live.join()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def open(self, client: Waiting, prompt: str, *, seed: int | None, keep_sink: bool | None) -> None:
        """Admits a client with a session of its own, now or when there is room."""
        with self._changed:
            if self._stopping:
                raise Refused("busy", "the server stops", fatal=True)
            self._queue[client] = (prompt, seed, keep_sink)
            self._admit()

    def leave(self, client: Waiting) -> None:
        """A client that waits no longer."""
        with self._changed:
            if self._queue.pop(client, None) is not None:
                self._tell_places()

    def find(self, name: str) -> Live:
        """A running session. Raises Refused when there is none of that name."""
        live = self.sessions.get(name)
        if live is None or live.ended is not None:
            raise Refused("unknown_session", "this session has ended; begin a new one", fatal=True)
        return live

    def known(self, name: str) -> Live | Files | None:
        """A session that runs, or the files of one that has ended."""
        return self.sessions.get(name) or self.over.get(name)

    def wake(self) -> None:
        """There may be something to make."""
        with self._changed:
            self._changed.notify_all()

    def _admit(self) -> None:
        """As many as there is room for, in their order; the rest learn their place. Under the lock."""
        while self._queue and sum(live.ended is None for live in self.sessions.values()) < self.most:
            client, (prompt, seed, keep_sink) = self._queue.popitem(last=False)
            live = self._begin(prompt, seed, keep_sink)
            self.sessions[live.name] = live
            client.admitted(live)
        self._tell_places()

    def _tell_places(self) -> None:
        for place, client in enumerate(self._queue, 1):
            client.place(place)

    def _begin(self, prompt: str, seed: int | None, keep_sink: bool | None) -> Live:
        seed = secrets.randbelow(2**32) if seed is None else seed
        made: list[Live] = []
        session = self.pipe.session(prompt, height=self.height, width=self.width, seed=seed, preempt=lambda: made[0].preempt())
        live = Live(
            secrets.token_urlsafe(12),
            session,
            first=(prompt, keep_sink),
            prepare=self.pipe.prepare_prompt,
            folder=self.folder,
            fps=self.pipe.info.fps,
            scale=self.scale,
            realtime=self.realtime,
            wake=self.wake,
            observe=self._observe,
        )
        made.append(live)
        return live

    def _run(self) -> None:
        """A block of each session that is ready, in turn, for ever."""
        while True:
            with self._changed:
                self._sweep()
                live, wait = self._next()
                while live is None and not self._stopping:
                    self._changed.wait(wait)
                    self._sweep()
                    live, wait = self._next()
                if self._stopping:
                    return
            assert live is not None
            with torch.no_grad():
                live.make()

    def _next(self) -> tuple[Live | None, float]:
        """The session whose turn it is; or how long nothing will have to be made."""
        now, soonest = time.monotonic(), SWEEP_SECONDS
        names = list(self.sessions)
        for step in range(len(names)):
            live = self.sessions[names[(self._turn + step) % len(names)]]
            at = live.ready_at()
            if at is None:
                continue
            if at <= now:
                self._turn = (self._turn + step + 1) % len(names)
                return live, 0.0
            soonest = min(soonest, at - now)
        return None, soonest

    def _sweep(self) -> None:
        """Now and then: ends who takes nothing any more, forgets those whose files are whole, lets others in. Under the lock."""
        now = time.monotonic()
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        for live in list(self.sessions.values()):
            if live.ended is None and live.lost_at is not None and now - live.lost_at > self.reconnect_seconds:
                live.end("the connection was lost")
            elif live.ended is None and now - live.heard > self.idle_seconds:
                live.end("idle", "nothing was taken or typed for a while")
            if live.ended is not None and not live.is_working:
                del self.sessions[live.name]
                self.over[live.name] = Files(live.recording, live.timeline_file)
                if len(self.over) > KEPT:
                    self.over.popitem(last=False)
        self._admit()
