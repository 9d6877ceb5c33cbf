"""Sessions that share one model: which of them are admitted, which clients wait, which session makes the next block.

One thread owns the model and makes one block at a time, for every session that is ready in turn. Knows nothing about WebSockets.
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
from longlive.generation.transition import Transition
from longlive.serving.audience import Client
from longlive.serving.flow_control import FlowControl
from longlive.serving.keys import Keys
from longlive.serving.live_session import LiveSession
from longlive.serving.messages import Refused

SWEEP_SECONDS = 0.25  # between two checks for sessions that have ended, or lost their client
RECONNECT_SECONDS = 30.0  # that a session waits for its client to connect again
MAX_QUEUED_CLIENTS = 100

log = logging.getLogger(__name__)


class QueuedClient(Client, Protocol):
    """A client that waits until it is admitted."""

    def queued(self, position: int) -> None:
        """Its position in the queue: 1 is next."""
        ...

    def admitted(self, session: LiveSession) -> None:
        """It has a session of its own now."""
        ...


class _Request(NamedTuple):
    """What a client asks for when it opens a session."""

    prompt: str
    seed: int | None
    transition: Transition


class SessionScheduler:
    """The model, its sessions, and the queue of clients that wait for one.

    Args:
        pipe: the model, on its device.
        folder: where recordings and timelines are written, and the secret that `keys` are made from.
        max_sessions: at a time.
        height, width: of the videos, in pixels.
        idle_seconds: after which a session ends when its client neither takes nor asks for anything.
        reconnect_seconds: after which a session ends when its client is gone.
        realtime: as in `FlowControl`.
        decoders: how many sessions may decode at the same time.
        scale, observe: as in `LiveSession`.
    """

    def __init__(
        self,
        pipe: LongLivePipeline,
        *,
        folder: Path,
        max_sessions: int,
        height: int,
        width: int,
        scale: int,
        idle_seconds: float = 600.0,
        reconnect_seconds: float = RECONNECT_SECONDS,
        realtime: bool = True,
        decoders: int = 8,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self.pipe, self.folder, self.max_sessions = pipe, folder, max_sessions
        self.height, self.width, self.scale, self.realtime = height, width, scale, realtime
        self.idle_seconds, self.reconnect_seconds = idle_seconds, reconnect_seconds
        self.sessions: OrderedDict[str, LiveSession] = OrderedDict()
        self.keys = Keys(folder)
        self._observe, self._decoding = observe, threading.Semaphore(decoders)
        self._queue: OrderedDict[QueuedClient, _Request] = OrderedDict()
        self._changed = threading.Condition()
        self._stopping = False
        self.failure: str | None = None  # why no block can be made any more
        self._next_index = 0  # of the session that is asked first for the next block
        self._swept_at = 0.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every session and wait until their recordings are complete."""
        with self._changed:
            self._stopping = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for session in list(self.sessions.values()):
            session.end("the server stops")
        for session in list(self.sessions.values()):
            session.join()

    @property
    def queue_length(self) -> int:
        return len(self._queue)

    def open(self, client: QueuedClient, prompt: str, *, seed: int | None, transition: Transition) -> None:
        """Give a client a session of its own, at once or when there is room. Raises Refused when it cannot even wait for one."""
        with self._changed:
            if self._stopping or self.failure is not None:
                raise Refused("busy", self.failure or "the server is stopping", fatal=True)
            if len(self._queue) >= MAX_QUEUED_CLIENTS:
                raise Refused("busy", f"{MAX_QUEUED_CLIENTS} clients wait already; try again later", fatal=True)
            self._queue[client] = _Request(prompt, seed, transition)
            self._admit()
            if client in self._queue:
                client.queued(len(self._queue))

    def leave(self, client: QueuedClient) -> None:
        """Remove a client from the queue, if it is there."""
        with self._changed:
            if self._queue.pop(client, None) is not None:
                self._send_positions()

    def running(self, name: str) -> LiveSession:
        """The running session of this name. Raises Refused when there is none."""
        session = self.sessions.get(name)
        if session is None or session.ended is not None:
            raise Refused("unknown_session", "this session has ended; start a new one", fatal=True)
        return session

    def wake(self) -> None:
        """A session may have become ready."""
        with self._changed:
            self._changed.notify_all()

    def _admit(self) -> None:
        """Admit queued clients in order, as long as there is room; tell the others when they move up. The caller holds the lock."""
        waiting = len(self._queue)
        while self._queue and sum(session.ended is None for session in self.sessions.values()) < self.max_sessions:
            client, request = self._queue.popitem(last=False)
            try:
                session = self._create(request)
            except Exception as error:  # whatever it is, memory mostly: the thread that calls this makes the blocks of all others
                log.exception("a session could not begin")
                client.send(Refused("failed", f"the session could not begin: {type(error).__name__}: {error}", fatal=True).to_message())
                continue
            self.sessions[session.name] = session
            client.admitted(session)
        if len(self._queue) < waiting:
            self._send_positions()

    def _send_positions(self) -> None:
        for position, client in enumerate(self._queue, 1):
            client.queued(position)

    def _create(self, request: _Request) -> LiveSession:
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        flow = FlowControl(realtime=self.realtime)
        session = self.pipe.stepped_session(request.prompt, height=self.height, width=self.width, seed=seed, preempt=flow.may_preempt)
        return LiveSession(
            secrets.token_urlsafe(12),
            session,
            flow,
            transition=request.transition,
            folder=self.folder,
            fps=self.pipe.info.fps,
            scale=self.scale,
            wake=self.wake,
            decoding=self._decoding,
            observe=self._observe,
        )

    def _run(self) -> None:
        """Make one block after the other until the server stops. An error outside of the sessions' own work ends all of them, in words."""
        try:
            self._make_blocks()
        except Exception as error:
            log.exception("the thread that makes the blocks has ended")
            with self._changed:
                self.failure = f"the server makes no blocks any more, restart it: {type(error).__name__}: {error}"
                waiting = list(self._queue)
                self._queue.clear()
            for client in waiting:
                client.send(Refused("failed", self.failure, fatal=True).to_message())
            for session in list(self.sessions.values()):
                session.end("failed", self.failure)

    def _make_blocks(self) -> None:
        while True:
            with self._changed:
                self._sweep()
                session, wait = self._next_ready()
                while session is None and not self._stopping:
                    self._changed.wait(wait)
                    self._sweep()
                    session, wait = self._next_ready()
                if self._stopping:
                    return
            assert session is not None
            with torch.no_grad():
                session.make_block()

    def _next_ready(self) -> tuple[LiveSession | None, float]:
        """The session that makes the next block (round robin); when none is ready, None and for how many seconds that is known."""
        now, wait = time.monotonic(), SWEEP_SECONDS
        sessions = list(self.sessions.values())
        for step in range(len(sessions)):
            index = (self._next_index + step) % len(sessions)
            ready_at = sessions[index].ready_at()
            if ready_at is None:
                continue
            if ready_at <= now:
                self._next_index = (index + 1) % len(sessions)
                return sessions[index], 0.0
            wait = min(wait, ready_at - now)
        return None, wait

    def _sweep(self) -> None:
        """Every `SWEEP_SECONDS`: end abandoned and idle sessions, remove complete ones, admit clients. The caller holds the lock."""
        now = time.monotonic()
        if now - self._swept_at < SWEEP_SECONDS:
            return
        self._swept_at = now
        for session in list(self.sessions.values()):
            session.end_if_abandoned(reconnect_seconds=self.reconnect_seconds, idle_seconds=self.idle_seconds, needed=bool(self._queue))
            if session.ended is not None and not session.is_working:
                del self.sessions[session.name]
        self._admit()
