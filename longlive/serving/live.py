"""One live session of the server: made blocks become chunks that a client takes, a recording and a timeline.

Two threads work on it: whoever owns the model calls `make`, and a thread of its own decodes, encodes and records. Clients come
and go (`attach`, `detach`); they are called back from these threads. Knows nothing about WebSockets.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from longlive.generation.session import DecodedBlock, Session, Take
from longlive.generation.stream import LatentBlock
from longlive.generation.timeline import Timeline
from longlive.serving.fragments import FragmentEncoder, jpegs
from longlive.serving.messages import Format
from longlive.serving.recorder import Piece, Recorder

UNACKNOWLEDGED = 3  # chunks that may be made before the client has said that it has them
MARGIN = 0.1  # seconds by which a chunk should come before it is needed

log = logging.getLogger(__name__)


class Client(Protocol):
    """Whoever shows a session; called from any thread, and never waits."""

    def changed(self) -> None:
        """There is something new: a piece, a state, an end."""
        ...

    def told(self, message: dict[str, Any]) -> None:
        """Something to be passed on."""
        ...


@dataclass
class Cost:
    """What a session has used: seconds of the model, of decoding and encoding; bytes and chunks."""

    seconds: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    images: int = 0
    bytes: int = 0


class Live:
    """A session among others.

    Args:
        first: the prompt that the session begins with, and what later ones that do not say do with the sink.
        prepare: begins to read a prompt; done when it can be switched to without waiting.
        scale: every pixel so many times, in what is sent and recorded.
        realtime: make no more than is about to be shown, once the client says how much it has left to play.
        wake: called when there may be something to make.
        observe: called with what is measured, by name.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        *,
        first: tuple[str, bool | None],
        prepare: Callable[[str], Future[Any]],
        folder: Path,
        fps: float,
        scale: int,
        realtime: bool,
        wake: Callable[[], None],
        observe: Callable[[str, float], None] = lambda name, value: None,
        encoder: Callable[..., FragmentEncoder] = FragmentEncoder,
    ) -> None:
        self.name, self.session, self.fps, self.realtime = name, session, fps, realtime
        self.prompt, self._keep_sink = first
        self.cost, self.began, self.heard = Cost(), time.monotonic(), time.monotonic()
        self.client: Client | None = None
        self.lost_at: float | None = time.monotonic()  # since when there is no client
        self.ended: str | None = None
        self.error: str | None = None
        self._finished = False
        self._prepare, self._wake, self._observe = prepare, wake, observe
        self._encoder = encoder(fps=fps, scale=scale)
        self._lock = threading.Lock()
        self._made = self._acknowledged = 0  # chunks
        self._due = 0.0  # when the next block should be begun
        self._speed = 0.0  # seconds from when a block should be begun until its chunk is there
        self._length = 0.0  # seconds of the newest chunk
        self._asked: tuple[str, float] | None = None  # the newest prompt, and when it was asked for
        self._pieces: deque[Piece] = deque(maxlen=UNACKNOWLEDGED + 1)
        self._recorder = Recorder(folder / name)
        self._blocks: queue.Queue[tuple[Take, LatentBlock, float] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"live-{name[:6]}", daemon=True)
        self._thread.start()
        self._read = False  # whether the first prompt can be used without waiting
        prepare(self.prompt).add_done_callback(self._begin)

    def _begin(self, read: Future[Any]) -> None:
        if not read.cancelled() and (error := read.exception()) is not None:
            self.end("failed", f"the prompt cannot be read: {error}")
            return
        self._read = True
        self._wake()

    # what clients do

    def attach(self, client: Client, *, next_chunk: int = 0) -> None:
        """`client` takes the session over; the one before is told so."""
        with self._lock:
            before, self.client, self.lost_at = self.client, client, None
            self._acknowledged = max(self._acknowledged, min(next_chunk, self._made))
            self._due, self.heard = 0.0, time.monotonic()
        if before is not None:
            before.told({"type": "error", "code": "taken_over", "message": "another window shows this session now", "fatal": True})
        client.changed()
        self._wake()

    def detach(self, client: Client) -> None:
        """The connection of `client` is gone; if it still had the session, the session waits for another."""
        with self._lock:
            if self.client is client:
                self.client, self.lost_at = None, time.monotonic()

    def acknowledge(self, chunk: int, ahead: float | None) -> None:
        """The client has chunks up to `chunk`, and this many seconds left to play."""
        now = time.monotonic()
        with self._lock:
            self._acknowledged = max(self._acknowledged, min(chunk + 1, self._made))
            self.heard = now
            if ahead is not None and self.realtime:
                under_way = (self._made - 1 - chunk) * self._length
                self._due = now + ahead + under_way - 1.1 * self._speed - MARGIN
        self._wake()

    def update_prompt(self, text: str, keep_sink: bool | None) -> None:
        """The prompt from the next block on, or from the first one after it has been read."""
        keep_sink = self._keep_sink if keep_sink is None else keep_sink
        self.prompt, self.heard = text, time.monotonic()
        asked = (text, time.monotonic())
        self._asked = asked

        def known(future: Future[Any]) -> None:
            if future.cancelled() or self._asked is not asked:  # a newer one is on its way
                return
            if (error := future.exception()) is not None:
                self._tell({"type": "error", "code": "bad_prompt", "message": f"the prompt cannot be read: {error}", "fatal": False})
                return
            self.session.prompt(text, keep_sink=keep_sink)
            self._tell({"type": "accepted", "prompt": text, "keep_sink": keep_sink})
            self._wake()

        self._prepare(text).add_done_callback(known)

    def pause(self, paused: bool) -> None:
        """No more blocks, or blocks again."""
        self.heard = time.monotonic()
        if paused:
            self.session.pause()
        else:
            self._due = 0.0
            self.session.resume()
        self._tell(self.state())
        self._wake()

    def restart(self, seed: int | None) -> None:
        """Another video with the prompt in force."""
        self.heard, self._due = time.monotonic(), 0.0
        self.session.restart(seed)
        self._wake()

    @property
    def recording(self) -> Path:
        """Of the take that is running."""
        return self._recorder.path

    @property
    def timeline_file(self) -> Path:
        return self._recorder.timeline_path

    def pieces_from(self, number: int) -> list[Piece]:
        """The pieces from `number` on that are still kept."""
        with self._lock:
            return [piece for piece in self._pieces if piece.number >= number]

    def header(self, kind: Format) -> tuple[dict[str, Any], bytes | None]:
        """What comes before the first piece that is sent."""
        if kind == "jpeg":
            return {"type": "header", "format": "jpeg", "mime": "image/jpeg"}, None
        return {"type": "header", "format": "mp4", "mime": self._encoder.mime}, self._encoder.header

    def state(self) -> dict[str, Any]:
        return {"type": "state", "paused": self.session.paused, "seed": self.session.timeline.seed, "take": self.session.take}

    def about(self) -> dict[str, Any]:
        """For a list of sessions."""
        return {
            "session": self.name,
            "state": self.ended or ("paused" if self.session.paused else "waiting" if self.client is None else "running"),
            "prompt": self.prompt,
            "age_seconds": round(time.monotonic() - self.began, 1),
            "chunks": self.cost.chunks,
            "images": self.cost.images,
            "bytes": self.cost.bytes,
            "seconds": {name: round(value, 3) for name, value in self.cost.seconds.items()},
        }

    # what the owner of the model does

    def preempt(self) -> bool:
        """Whether a block under way may be begun anew for a prompt that has come: when it is in time all the same, or late anyway."""
        left = self._due + 1.1 * self._speed + MARGIN - time.monotonic()  # until it is needed
        return not 0 < left < self._speed

    def ready_at(self) -> float | None:
        """When the next block may be begun (`time.monotonic`, may have passed); None while something else must happen first."""
        with self._lock:
            if (
                not self._read
                or self.ended
                or self.session.paused
                or self._made - self._acknowledged >= UNACKNOWLEDGED
                or self.client is None
            ):
                return None
            return self._due

    def make(self) -> None:
        """One block. What breaks it ends this session and no other."""
        began = min(time.monotonic(), self._due or float("inf"))
        try:
            block = self.session.advance()
        except Exception as error:  # whatever it is, the other sessions go on
            log.exception("session %s: a block failed", self.name)
            self.end("failed", f"the model failed: {type(error).__name__}: {error}")
            return
        if block is None:
            self.end("finished")
            return
        with self._lock:
            self._made += 1
            if self._due:
                self._due += self._length  # until the client says how much it has left
        self._blocks.put((*block, began))

    def end(self, reason: str, error: str | None = None) -> None:
        """No more chunks; the recording is finished in the session's own thread. The first reason counts."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended, self.error = reason, error
        self.session.stop()
        self._blocks.put(None)
        if (client := self.client) is not None:
            client.changed()

    @property
    def is_working(self) -> bool:
        """Whether chunks may still come, or the recording is not whole yet."""
        return not self._finished

    def join(self) -> None:
        """Waits until the recording of an ended session is whole."""
        self._thread.join()

    # what its own thread does

    def _work(self) -> None:
        number = 0
        while (block := self._blocks.get()) is not None:
            take, made, began = block
            try:
                piece = self._piece(number, self.session.decode(take, made), began)
            except Exception as error:  # the encoder's, mostly; the other sessions go on
                log.exception("session %s: a chunk failed", self.name)
                self.end("failed", f"the video cannot be encoded: {type(error).__name__}: {error}")
                break
            number += 1
            self._record(piece, take.timeline)
            with self._lock:
                self._pieces.append(piece)
                client = self.client
            if client is not None:
                client.changed()
        self._recorder.close()
        self._finished = True
        if (client := self.client) is not None:
            client.changed()

    def _piece(self, number: int, chunk: DecodedBlock, began: float) -> Piece:
        encoding = time.monotonic()
        images = chunk.images[0].numpy()
        fragment = self._encoder.encode(images)
        now, self._length = time.monotonic(), len(images) / self.fps
        timings = asdict(chunk.seconds) | {"encode": now - encoding}
        self._speed = now - began if not self._speed else 0.8 * self._speed + 0.2 * (now - began)
        asked = self._asked
        if chunk.switched and asked is not None and asked[0] == chunk.prompt:
            self._observe("answer", now - asked[1])
            if self._asked is asked:
                self._asked = None  # a restart shows the same prompt anew and answers nobody
        for name, value in timings.items():
            self._observe(name, value)
        self.cost.seconds.update(timings)
        self.cost.chunks, self.cost.images = self.cost.chunks + 1, self.cost.images + len(images)
        about = {
            "type": "chunk",
            "chunk": number,
            "frames": [chunk.frames.start, chunk.frames.stop],
            "images": len(images),
            "seconds": self._length,
            "prompt": chunk.prompt,
            "switched": chunk.switched,
            "take": chunk.take,
            "timings": {name: round(value, 4) for name, value in timings.items()},
            "fps": round(len(images) / sum(timings.values()), 1),
        }
        return Piece(about, fragment, images)

    def _record(self, piece: Piece, timeline: Timeline) -> None:
        """`timeline`: of the piece's own take; a restart may have begun another meanwhile."""
        try:
            self._recorder.write(piece, self._encoder.header, timeline)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            log.warning("session %s: %s; the recording ends here", self.name, why)
            self._tell({"type": "error", "code": "disk_full", "message": f"the recording ends here: {why}", "fatal": False})

    def _tell(self, message: dict[str, Any]) -> None:
        if (client := self.client) is not None:
            client.told(message)


def piece_messages(piece: Piece, kind: Format) -> tuple[dict[str, Any], list[bytes]]:
    """A piece as it is sent: JSON, then the binary messages that follow."""
    return piece.about, [piece.fragment] if kind == "mp4" else jpegs(piece.images)
