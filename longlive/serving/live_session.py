"""One live session of the server: blocks become segments, which a client takes and a recording keeps.

Two threads work on it: the scheduler's calls `make_block`, and one of its own decodes, encodes and records. Clients come and go
(`audience`) and are called back from these threads. Knows nothing about WebSockets.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longlive.generation.session import SessionVideo, SteppedSession
from longlive.generation.stream import LatentBlock
from longlive.generation.transition import Transition
from longlive.serving.audience import Audience, Client
from longlive.serving.flow_control import MAX_UNACKNOWLEDGED, FlowControl
from longlive.serving.fragments import FragmentEncoder
from longlive.serving.messages import Format, Refused
from longlive.serving.recorder import NotRecorded, Recorder, Segment

WARNING_SECONDS = 60.0  # before a session ends because it is idle

log = logging.getLogger(__name__)


@dataclass
class Cost:
    """What a session has used: seconds of computation by part, segments, pixel frames, bytes sent."""

    seconds: Counter[str] = field(default_factory=Counter)
    segments: int = 0
    frames: int = 0
    bytes: int = 0


class LiveSession:
    """A session of the server, with its encoder, its recording and its clients.

    Args:
        stepped: makes the videos, and knows their prompts.
        flow: decides when the next block begins; `stepped` asks the same one before it drops a block for a new prompt.
        transition: what prompts do with the past that do not say it themselves.
        scale: how many times every pixel is repeated, each way, in what is sent and recorded.
        decoding: entered while a block is decoded; several sessions may share it.
        wake: called when a block may have become ready to be made.
        observe: called with the name and value of what is measured.
    """

    def __init__(
        self,
        name: str,
        stepped: SteppedSession,
        flow: FlowControl,
        *,
        transition: Transition,
        folder: Path,
        fps: float,
        scale: int,
        wake: Callable[[], None],
        decoding: AbstractContextManager[Any] = nullcontext(),  # noqa: B008  # has no state
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self.name, self.stepped, self.flow, self.fps = name, stepped, flow, fps
        self.cost = Cost()
        self.started_at = self.last_activity = time.monotonic()  # activity: the client took, typed or asked for something
        self.audience = Audience()
        self.ended: str | None = None  # why
        self.error: str | None = None
        self.transition, self._wake, self._observe, self._decoding = transition, wake, observe, decoding
        self._lock = threading.Lock()
        self._idle_end: float | None = None  # when it ends because it is idle, once the owner was told
        self._awaited: tuple[str, float] | None = None  # the newest prompt that is not shown yet, and when it came
        self._segments: deque[Segment] = deque(maxlen=MAX_UNACKNOWLEDGED + 1)
        self._encoder = FragmentEncoder(fps=fps, scale=scale)
        self._recorder = Recorder(folder, name)
        self._recording_complete = False
        self._blocks: queue.Queue[tuple[SessionVideo, LatentBlock, float] | None] = queue.Queue()  # to be encoded; None: the end
        self._thread = threading.Thread(target=self._encode_blocks, name=f"live-{name[:6]}", daemon=True)
        self._first_prompt_encoded = False
        self._encode_first_prompt()
        self._thread.start()

    def _encode_first_prompt(self) -> None:
        self.stepped.encode_first_prompt().add_done_callback(self._on_first_prompt)

    def _on_first_prompt(self, encoding: Future[Any]) -> None:
        if encoding.cancelled():  # a newer prompt takes its turn
            return
        if (error := encoding.exception()) is not None:
            self.end("failed", f"the prompt cannot be encoded: {error}")
            return
        self._first_prompt_encoded = True
        self._wake()

    # called for clients

    def attach(self, client: Client, *, next_segment: int = 0) -> None:
        """Connect the owner, which wants the segments from `next_segment` on."""
        self.last_activity = time.monotonic()
        self.flow.reconnect(next_segment)
        self.audience.own(client)
        self._wake()

    def acknowledge(self, segment: int, buffered: float | None) -> None:
        """The owner has the segments up to `segment`, and `buffered` seconds left to play."""
        self.last_activity = time.monotonic()
        self.flow.acknowledge(segment, buffered)
        self._wake()

    def update_prompt(self, text: str, transition: Transition, *, about: dict[str, Any] | None = None) -> None:
        """Switch to `text` at the first block after it has been encoded. `about`: more that `accepted` says."""
        if self.ended is not None:  # the client is told why
            return
        self.last_activity = time.monotonic()
        self._awaited = text, self.last_activity

        def on_queued(queued: Future[bool]) -> None:
            if (error := queued.exception()) is not None:
                refused = Refused("bad_prompt", f"the prompt cannot be encoded: {error}")
                self.audience.tell_owner(refused.to_message())
                if not self._first_prompt_encoded:
                    self._encode_first_prompt()
            elif queued.result():
                self._first_prompt_encoded = True
                self.audience.tell_owner({"type": "accepted", "prompt": text, "keep_sink": transition.keep_sink} | (about or {}))
                self._wake()

        self.stepped.prompt_when_encoded(text, transition=transition).add_done_callback(on_queued)

    def pause(self, paused: bool) -> None:
        """Make no more blocks, or continue."""
        if self.ended is not None:
            return
        self.last_activity = time.monotonic()
        if paused:
            self.stepped.pause()
        else:
            self.flow.begin_at_once()
            self.stepped.resume()
        self.audience.tell({"type": "state", "paused": paused})
        self._wake()

    def restart(self, seed: int | None) -> None:
        """Begin another video with the newest prompt, from `seed` or from the same noise again."""
        if self.ended is not None:
            return
        self.last_activity = time.monotonic()
        self.flow.begin_at_once()
        self.stepped.restart(seed)
        self._wake()

    @property
    def recording(self) -> Path:
        """The recording of the current video."""
        return self._recorder.path

    @property
    def take(self) -> int:
        """The number of the recording of the current video."""
        return self._recorder.take

    @property
    def num_segments(self) -> int:
        """How many there have been."""
        with self._lock:
            return self._segments[-1].index + 1 if self._segments else 0

    def video_before(self, index: int) -> dict[str, int]:
        """The video that is on the screen of a client whose next segment is number `index`, as messages say it."""
        with self._lock:
            kept = [segment.video for segment in self._segments if segment.index < index] or [one.video for one in list(self._segments)[:1]]
        return kept[-1] if kept else {"video_index": self.stepped.video_index, "seed": self.stepped.timeline.seed}

    def check_next(self, index: int) -> None:
        """Raises Refused when a client cannot have all segments before number `index`."""
        if index > (made := self.num_segments):
            words = f"next is {index}, but the session has made {made} segments so far; give the first that you do not have"
            raise Refused("bad_message", words, fatal=True)

    def segments_from(self, index: int) -> list[Segment]:
        """The segments from `index` on that are still kept."""
        with self._lock:
            return [segment for segment in self._segments if segment.index >= index]

    def header(self, kind: Format) -> tuple[dict[str, Any], bytes | None]:
        """What is sent before the first segment: a message and, for mp4, the initialization segment."""
        if kind == "jpeg":
            return {"type": "header", "format": "jpeg", "mime": "image/jpeg"}, None
        return {"type": "header", "format": "mp4", "mime": self._encoder.mime}, self._encoder.header

    def summary(self) -> dict[str, Any]:
        """One entry of the server's list of sessions."""
        return {
            "session": self.name,
            "state": self.ended or ("paused" if self.stepped.paused else "disconnected" if self.audience.owner is None else "running"),
            "watchers": self.audience.num_watchers,
            "age_seconds": round(time.monotonic() - self.started_at, 1),
            "segments": self.cost.segments,
            "frames": self.cost.frames,
            "bytes": self.cost.bytes,
            "seconds": {name: round(value, 3) for name, value in self.cost.seconds.items()},
        }

    # called by the scheduler

    def ready_at(self) -> float | None:
        """When the next block may begin (`time.monotonic`, may be past); None while something else has to happen first."""
        if not self._first_prompt_encoded or self.ended is not None or self.stepped.paused or self.audience.owner is None:
            return None
        return self.flow.ready_at()

    def make_block(self) -> None:
        """Make one block. An error ends this session and no other."""
        due_at = self.flow.begin_block()
        try:
            step = self.stepped.advance()
        except Exception as error:  # whatever it is, the other sessions continue
            log.exception("session %s: a block failed", self.name)
            self.end("failed", f"the model failed: {type(error).__name__}: {error}")
            return
        if step is None:
            self.end("finished")
            return
        self.flow.end_block()
        self._blocks.put((*step, due_at))

    def end(self, reason: str, error: str | None = None) -> None:
        """Make no more blocks; the session's own thread completes the recording. The first reason counts."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended, self.error = reason, error
        self.stepped.stop()
        self._blocks.put(None)
        self.audience.notify()

    def end_if_abandoned(self, *, reconnect_seconds: float, idle_seconds: float, needed: bool) -> None:
        """End when the owner is gone for too long, or neither takes nor asks for anything, of which it is told before.

        `needed`: others wait for a session; otherwise one that is paused stays.
        """
        now, left_at = time.monotonic(), self.audience.owner_left_at
        if self.ended is not None:
            return
        if left_at is not None and now - left_at > reconnect_seconds:
            self.end("the connection was lost")
            return
        warning, paused = min(WARNING_SECONDS, 0.5 * idle_seconds), self.stepped.paused
        if (paused and left_at is None and not needed) or now - self.last_activity < idle_seconds - warning:
            self._idle_end = None
        elif self._idle_end is None:
            self._idle_end = now + warning
            why = "it is paused and others wait" if paused else "nobody takes its video"
            words = f"the session ends in {warning:.0f} seconds because {why}; continue it or send a prompt to keep it"
            self.audience.tell_owner({"type": "notice", "message": words})
        elif now > self._idle_end:
            self.end("idle", "the session was idle for too long")

    @property
    def is_working(self) -> bool:
        """Whether segments may still come, or the recording is not complete yet."""
        return not self._recording_complete

    def join(self) -> None:
        """Wait until the recording of an ended session is complete."""
        self._thread.join()

    # run by its own thread

    def _encode_blocks(self) -> None:
        try:
            self._encode_until_the_end()
        except Exception as error:  # the encoder's, mostly; the other sessions continue
            log.exception("session %s: a segment failed", self.name)
            self.end("failed", f"the video cannot be encoded: {type(error).__name__}: {error}")
        finally:
            try:
                self._recorder.close()
            finally:
                self._recording_complete = True
                self.audience.notify()

    def _encode_until_the_end(self) -> None:
        index = 0
        while (item := self._blocks.get()) is not None:
            video, block, due_at = item
            segment = self._make_segment(index, video, block, due_at)
            index += 1
            self._record(self._recorder.write, segment, self._encoder.header)  # before it is shown: a killed server has recorded it
            with self._lock:
                self._segments.append(segment)
            self.audience.notify()
            self._record(self._recorder.save_timeline, video.timeline)  # after it is shown: this waits for the disk

    def _make_segment(self, index: int, video: SessionVideo, latents: LatentBlock, due_at: float) -> Segment:
        with self._decoding:
            block = video.decode(latents)
        encoding = time.monotonic()
        images = block.images[0].numpy()
        fragment = self._encoder.encode(images)
        now, seconds = time.monotonic(), len(images) / self.fps
        timings = asdict(block.seconds) | {"encode": now - encoding}
        self.flow.end_segment(due_at, seconds)
        awaited = self._awaited
        if block.switched and awaited is not None and awaited[0] == block.prompt:
            self._observe("switch_latency", now - awaited[1])
            if self._awaited is awaited:
                self._awaited = None  # a restart begins with the same prompt, for which nobody waits
        for name, value in timings.items():
            self._observe(name, value)
        self.cost.seconds.update(timings)
        self.cost.segments, self.cost.frames = self.cost.segments + 1, self.cost.frames + len(images)
        message = {
            "type": "segment",
            "index": index,
            "latent_frames": [block.latent_frames.start, block.latent_frames.stop],
            "num_frames": len(images),
            "seconds": seconds,
            "prompt": block.prompt,
            "switched": block.switched,
            "video_index": block.video_index,
            "timings": {name: round(value, 4) for name, value in timings.items()},
            "fps": round(len(images) / sum(timings.values()), 1),
        }
        return Segment(message, fragment, images, video.timeline.seed)

    def _record(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call `write` with `arguments`; tell the owner when the files cannot be written."""
        try:
            write(*arguments)
        except NotRecorded as error:
            log.warning("session %s: %s", self.name, error)
            self.audience.tell_owner(Refused(error.code, str(error)).to_message())


def segment_messages(segment: Segment, kind: Format) -> tuple[dict[str, Any], list[bytes]]:
    """A segment as it is sent: a JSON message, then binary messages."""
    return segment.message, [segment.fragment] if kind == "mp4" else segment.jpegs
