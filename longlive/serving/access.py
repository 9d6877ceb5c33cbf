"""Which requests the server answers, and how fast the messages of a client are read. Knows nothing about sessions."""

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

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    def token_problem(self, authorization: str | None, query: str | None) -> str | None:
        """What is wrong with the token in a request's header or else in its address; None when it may pass.

        The time does not depend on how a wrong one differs.
        """
        if self._token is None:
            return None
        scheme, _, value = (authorization or "").strip().partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else query
        if not given:
            return "the token is missing; open the address that the server printed when it started"
        if secrets.compare_digest(given.encode(errors="replace"), self._token.encode()):
            return None
        return "the token is wrong; open the address that the server printed when it started last"

    def is_own_host(self, host: str | None) -> bool:
        """Whether a request names this server: a foreign page whose host name was pointed at it (DNS rebinding) does not."""
        if not is_local(self._host):
            return True  # its names are known to its owner only; the token protects it
        try:
            name = urlsplit(f"//{host or ''}").hostname
        except ValueError:  # no host name at all
            return False
        return name is not None and is_local(name)

    def is_own_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a WebSocket is opened by the server's own page, or by a program other than a browser."""
        try:
            return origin is None or urlsplit(origin).netloc == host
        except ValueError:
            return False


class RateLimiter:
    """A token bucket: `per_second` messages (or bytes) per second, and `burst` seconds' worth of them at once."""

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

    def spend(self, amount: int) -> None:
        """Count what has come in any case; the next one waits the longer for it."""
        self._refill()
        self._left -= amount

    @property
    def wait(self) -> float:
        """Seconds until the next one is allowed."""
        self._refill()
        return max(0.0, (1 - self._left) / self._rate)

    def _refill(self) -> None:
        now = time.monotonic()
        self._left = min(self._capacity, self._left + (now - self._updated_at) * self._rate)
        self._updated_at = now


class Intake:
    """How fast everything that one client sends is read, whatever it is: above so many messages or bytes per second, its next message is
    left where it is, so that the client has to wait and nobody else.
    """

    def __init__(self, *, messages_per_second: float, bytes_per_second: float) -> None:
        self._limits = RateLimiter(messages_per_second), RateLimiter(bytes_per_second)

    @property
    def wait(self) -> float:
        """Seconds until the next message may be read."""
        return max(limit.wait for limit in self._limits)

    def count(self, num_bytes: int) -> None:
        """A message was read."""
        for limit, amount in zip(self._limits, (1, num_bytes)):
            limit.spend(amount)
