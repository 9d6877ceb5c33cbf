"""Which requests the server answers, and how many messages a client may send. Knows nothing about sessions."""

from __future__ import annotations

import ipaddress
import secrets
import time
from urllib.parse import urlsplit


def is_local(host: str) -> bool:
    """Whether an address to bind to can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """The checks of every request.

    Args:
        token: what a client must present; None: nothing, when only this machine can reach the server.
        host: the address that the server is bound to.
    """

    def __init__(self, token: str | None, *, host: str) -> None:
        self._token, self._host = token, host

    def has_token(self, authorization: str | None, query: str | None) -> bool:
        """Whether a request has the token in its header or its address. The time does not depend on how a wrong one differs."""
        if self._token is None:
            return True
        given = (authorization or "").removeprefix("Bearer ") or query or ""
        return secrets.compare_digest(given.encode(), self._token.encode())

    def is_own_host(self, host: str | None) -> bool:
        """Whether a request names this server: a foreign page whose host name was pointed at it (DNS rebinding) does not."""
        if not is_local(self._host):
            return True  # its names are known to its owner only; the token protects it
        name = urlsplit(f"//{host or ''}").hostname
        return name is not None and is_local(name)

    def is_own_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a WebSocket is opened by the server's own page, or by a program other than a browser."""
        return origin is None or urlsplit(origin).netloc == host


class RateLimiter:
    """A token bucket: `per_second` messages per second, and `burst` seconds' worth of them at once."""

    def __init__(self, per_second: float, *, burst: float = 2.0) -> None:
        self._rate, self._capacity = per_second, max(1.0, burst * per_second)
        self._left, self._updated_at = self._capacity, time.monotonic()

    def allow(self) -> bool:
        """Count one message; whether it is allowed."""
        self._refill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    @property
    def wait(self) -> float:
        """Seconds until the next message is allowed."""
        self._refill()
        return max(0.0, (1 - self._left) / self._rate)

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._capacity, self._left + (now - self._updated_at) * self._rate)
        self._updated_at = now
