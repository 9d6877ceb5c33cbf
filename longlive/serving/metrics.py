"""What the server counts, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longlive.serving.scheduler import SessionScheduler

BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # seconds


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = Counter("longlive_seconds", "Seconds of computation, by part", ["part"], registry=self._registry)
        self._segments = Counter("longlive_segments", "Video segments that were encoded", registry=self._registry)
        words = "From a prompt's arrival until its first segment is encoded"
        self._switch = Histogram("longlive_switch_seconds", words, buckets=BUCKETS, registry=self._registry)
        self._running = Gauge("longlive_sessions", "Running sessions", registry=self._registry)
        self._queued = Gauge("longlive_queued_clients", "Clients that wait for a session", registry=self._registry)
        self.messages_read = Counter("longlive_read_messages", "Messages of clients that were read", registry=self._registry)
        self.bytes_sent = Counter("longlive_sent_bytes", "Bytes of video sent", registry=self._registry)
        self.errors = Counter("longlive_errors", "Errors sent to clients, by code", ["code"], registry=self._registry)

    def observe(self, name: str, seconds: float) -> None:
        """A measured time: "switch_latency", from a prompt's arrival to its first segment, or a part of the work on a block."""
        if name == "switch_latency":
            self._switch.observe(seconds)
            return
        self._seconds.labels(name).inc(seconds)
        if name == "encode":  # the last part of every segment
            self._segments.inc()

    def text(self, scheduler: SessionScheduler) -> bytes:
        """All of them, as Prometheus reads them."""
        self._running.set(len(scheduler.sessions))
        self._queued.set(scheduler.queue_length)
        return generate_latest(self._registry)
