"""Who may talk to the server, and how much. Knows nothing about sessions."""

from __future__ import annotations

import ipaddress
import secrets
import time
from urllib.parse import urlsplit


def is_local(host: str) -> bool:
    """Whether an address to bind to is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Checks of every request.

    Args:
        token: what a client must know; None: nothing, since only this machine reaches the server.
        host: the address the server is bound to.
    """

    def __init__(self, token: str | None, *, host: str) -> None:
        self._token, self._host = token, host

    def knows_token(self, authorization: str | None, query: str | None) -> bool:
        """Whether a request carries the token, in its header or its address; takes as long for every wrong one."""
        if self._token is None:
            return True
        given = (authorization or "").removeprefix("Bearer ") or query or ""
        return secrets.compare_digest(given.encode(), self._token.encode())

    def right_host(self, host: str | None) -> bool:
        """Whether a request was meant for this server: a page elsewhere whose name was made to point here is not."""
        if not is_local(self._host):
            return True  # known under names that only its owner knows; the token protects it
        name = urlsplit(f"//{host or ''}").hostname
        return name is not None and is_local(name)

    def right_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a WebSocket comes from the server's own page, or from a program that is no browser."""
        return origin is None or urlsplit(origin).netloc == host


class Allowance:
    """So many messages a second, with some at once in reserve."""

    def __init__(self, per_second: float, *, reserve: float = 2.0) -> None:
        self._rate, self._most = per_second, max(1.0, reserve * per_second)
        self._left, self._at = self._most, time.monotonic()

    def take(self) -> bool:
        """One message, if it is allowed."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    @property
    def wait(self) -> float:
        """Seconds until the next one is allowed."""
        return max(0.0, (1 - self._left) / self._rate)
