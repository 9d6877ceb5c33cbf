"""The clients of one live session: the one that owns it, and those that watch. Knows nothing about WebSockets or video."""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from longlive.serving.messages import Refused

MAX_WATCHERS = 20  # of a session


class Client(Protocol):
    """Shows a session to somebody. Its methods are called from any thread and return at once."""

    def notify(self) -> None:
        """There is something new: a segment, the end."""
        ...

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        ...


class Audience:
    """Passes what a session says to its owner, or to everybody. For any thread."""

    def __init__(self) -> None:
        self.owner: Client | None = None
        self.owner_left_at: float | None = time.monotonic()  # since when there has been no owner
        self._watchers: set[Client] = set()
        self._lock = threading.Lock()

    def own(self, client: Client) -> None:
        """Connect the owner; the client that was the owner before is told that it was replaced."""
        with self._lock:
            before, self.owner, self.owner_left_at = self.owner, client, None
        if before is not None:
            before.send({"type": "error", "code": "taken_over", "message": "another window shows this session now", "fatal": True})
        client.notify()

    def watch(self, client: Client) -> None:
        """Connect a watcher. Raises Refused when there are too many."""
        with self._lock:
            if len(self._watchers) >= MAX_WATCHERS:
                raise Refused("busy", f"{MAX_WATCHERS} others watch this session already; no more are admitted", fatal=True)
            self._watchers.add(client)
        client.notify()

    def leave(self, client: Client) -> None:
        """The connection of `client` is lost."""
        with self._lock:
            self._watchers.discard(client)
            if self.owner is client:  # otherwise another one has replaced it
                self.owner, self.owner_left_at = None, time.monotonic()

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def notify(self) -> None:
        """Tell everybody that there is something new."""
        for client in self._everybody():
            client.notify()

    def tell_owner(self, message: dict[str, Any]) -> None:
        if (owner := self.owner) is not None:
            owner.send(message)

    def tell(self, message: dict[str, Any]) -> None:
        for client in self._everybody():
            client.send(message)

    def _everybody(self) -> list[Client]:
        with self._lock:
            return [client for client in (self.owner, *self._watchers) if client is not None]
