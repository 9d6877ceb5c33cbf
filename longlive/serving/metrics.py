"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longlive.serving.hub import Hub

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._parts = Counter("longlive_seconds", "Seconds of work, by part", ["part"], registry=self._registry)
        self._chunks = Counter("longlive_chunks", "Chunks that were made", registry=self._registry)
        self._switch = Histogram(
            "longlive_switch_seconds", "From a prompt's arrival until its first chunk is encoded", buckets=SECONDS, registry=self._registry
        )
        self._running = Gauge("longlive_sessions", "Sessions that run", registry=self._registry)
        self._waiting = Gauge("longlive_waiting", "Clients that wait for room", registry=self._registry)
        self.bytes_sent = Counter("longlive_sent_bytes", "Bytes of video sent", registry=self._registry)
        self.errors = Counter("longlive_errors", "Errors told to clients, by code", ["code"], registry=self._registry)

    def observe(self, name: str, value: float) -> None:
        """A measured time: "answer", from a prompt to its first chunk, or a part of a block's work."""
        if name == "answer":
            self._switch.observe(value)
            return
        self._parts.labels(name).inc(value)
        if name == "encode":  # the last part of each
            self._chunks.inc()

    def text(self, hub: Hub) -> bytes:
        self._running.set(len(hub.sessions))
        self._waiting.set(hub.num_waiting)
        return generate_latest(self._registry)
