"""One WebSocket: passes the client's messages to its session, and the session's segments and messages to the client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any, NamedTuple

from fastapi import WebSocket, WebSocketDisconnect

from longlive.config import ServeConfig
from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature.captions import hint
from longlive.serving.access import Intake, RateLimiter
from longlive.serving.keys import Role
from longlive.serving.live_session import LiveSession, segment_messages
from longlive.serving.messages import (
    VERSION,
    Ack,
    Format,
    LaterMessage,
    Refused,
    Resume,
    Start,
    Stop,
    Update,
    Watch,
    parse_first,
    parse_later,
    prompt_text,
)
from longlive.serving.metrics import Metrics
from longlive.serving.recorder import Segment
from longlive.serving.scheduler import SessionScheduler

FIRST_MESSAGE_SECONDS = 10.0  # within which a client must send its first message
MAX_QUEUED_MESSAGES = 100  # kept for a client that does not read; the oldest are dropped
READ_PER_UPDATE = 10  # messages of any kind that are read for each update that is allowed
BYTES_PER_SECOND = 65_536
LONG_MESSAGE = 2048  # characters; longer ones are parsed in another thread
TELL_SECONDS = 10.0  # between two messages that a client sends too many
WATCHER_LEAD = 2  # segments that a watcher gets at once


class Seat(NamedTuple):
    """Where a connection sits: its session, and what it may do there."""

    session: LiveSession
    role: Role


def about_prompt(pipe: LongLivePipeline, prompt: str, *, few_words: bool) -> dict[str, Any]:
    """How much of a prompt the model reads, as messages say it, and what its author should know. Takes a moment: call it in a thread.

    `few_words`: whether it is the miniature, whose words are few.
    """
    pieces = pipe.prompt_pieces(prompt)
    cut = pieces.read < pieces.given
    notice = hint(prompt) if few_words else None
    if cut and notice is None:
        notice = f'the model reads {pieces.read} of {pieces.given} pieces: it does not read "{pieces.first_unread} …"'
    return {"pieces": {**pieces._asdict(), "limit": pipe.transformer.config.text_len, "cut": cut}, "notice": notice}


class Connection:
    """A client of a session, its owner or a watcher. What other threads send is passed on by its own coroutine.

    Args:
        model: the description of the model that `hello` carries.
        may_start: whether the client has shown the server's token, without which it can use a session but begin none.
    """

    def __init__(
        self,
        socket: WebSocket,
        scheduler: SessionScheduler,
        config: ServeConfig,
        metrics: Metrics,
        model: dict[str, Any],
        *,
        may_start: bool = True,
    ) -> None:
        self._socket, self._scheduler, self._config, self._metrics, self._model = socket, scheduler, config, metrics, model
        self._may_start = may_start
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._messages: deque[dict[str, Any]] = deque(maxlen=MAX_QUEUED_MESSAGES)
        self._intake = Intake(messages_per_second=READ_PER_UPDATE * config.messages_per_second, bytes_per_second=BYTES_PER_SECOND)
        self._told_at = float("-inf")  # when the client was told that it sends too many messages
        self._seat: Seat | None = None
        self._format: Format = "mp4"
        self._next_segment = 0  # index of the next one to send
        self._video: dict[str, int] = {}  # of the segment that was sent last
        self._position: int | None = None  # in the queue, as told last
        self._pieces: dict[str, Any] | None = None  # of the first prompt

    # called from any thread

    def notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed when the server stops
            self._loop.call_soon_threadsafe(self._changed.set)

    def send(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self.notify()

    def queued(self, position: int) -> None:
        if position != self._position:
            self._position = position
            self.send({"type": "queued", "position": position})

    def admitted(self, session: LiveSession) -> None:
        self.send({"type": "admitted"})
        self._take_seat(Seat(session, "owner"), 0, resumed=False)
        session.attach(self)

    # run in the event loop

    async def run(self) -> None:
        """Serve the connection until either side ends it."""
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._open()
            tasks = [asyncio.create_task(self._receive_messages()), asyncio.create_task(self._send_messages())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Refused as refused:
            await self._refuse(refused)
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError):
            pass  # the client is gone; starlette raises one or the other
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._scheduler.leave(self)
            if self._seat is not None:
                self._seat.session.audience.leave(self)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close()

    async def _open(self) -> None:
        text = await asyncio.wait_for(self._receive_text(), FIRST_MESSAGE_SECONDS)
        first = await asyncio.to_thread(parse_first, text)
        self._format = first.format
        if isinstance(first, Start):
            if not self._may_start:
                raise Refused("no_token", "the key of a session begins no other one; that needs the server's token", fatal=True)
            prompt = prompt_text(first.prompts, self._config.prompt_chars)
            self._pieces = await self._look_at(prompt)
            self._scheduler.open(self, prompt, seed=first.seed, transition=self._scheduler.pipe.transition.with_sink(first.keep_sink))
        else:
            self._enter(first)

    async def _look_at(self, prompt: str) -> dict[str, Any]:
        """How much of a prompt is read; tells the client what its author should know."""
        few_words = self._model["words"] is not None
        about = await asyncio.to_thread(about_prompt, self._scheduler.pipe, prompt, few_words=few_words)
        if about["notice"] is not None:
            self.send({"type": "notice", "message": about["notice"]})
        return about["pieces"]

    def _enter(self, message: Resume | Watch) -> None:
        role = self._scheduler.keys.role(message.session, message.key)
        if role is None or (role == "watcher" and isinstance(message, Resume)):
            kind = "the owner's key of this session" if isinstance(message, Resume) else "a key of this session"
            raise Refused("wrong_key", f"the key is not {kind}", fatal=True)
        session = self._scheduler.running(message.session)
        if message.next is not None:
            session.check_next(message.next)
        if isinstance(message, Resume):
            self._take_seat(Seat(session, "owner"), message.next, resumed=True)
            session.attach(self, next_segment=message.next)
        else:
            first = max(0, session.num_segments - WATCHER_LEAD) if message.next is None else message.next
            self._take_seat(Seat(session, "watcher"), first, resumed=message.next is not None)
            session.audience.watch(self)

    def _take_seat(self, seat: Seat, next_segment: int, *, resumed: bool) -> None:
        """Say hello; to be called before the session knows the client, so that nothing else is said before."""
        session, role = seat
        self._seat, self._next_segment, self._video = seat, next_segment, session.video_before(next_segment)
        keys = self._scheduler.keys
        hello = {
            "type": "hello",
            "version": VERSION,
            "session": session.name,
            "role": role,
            "watch_key": keys.key("watcher", session.name),
            "model": self._model,
            "limits": {
                "prompt_chars": self._config.prompt_chars,
                "messages_per_second": self._config.messages_per_second,
                "bytes_per_second": BYTES_PER_SECOND,
            },
            "resumed": resumed,
            "next": next_segment,
            "prompt": session.stepped.newest_prompt,
            "paused": session.stepped.paused,
        }
        if role == "owner":
            hello["owner_key"] = keys.key("owner", session.name)
        if self._pieces is not None:
            hello["pieces"] = self._pieces
        self.send(hello | self._video)

    async def _receive_text(self) -> str:
        """The next text message, once the client may send another one. Raises Refused for a binary one."""
        if (wait := self._intake.wait) > 0:
            if (now := time.monotonic()) - self._told_at > TELL_SECONDS:
                self._told_at = now
                self.send(Refused("rate_limited", "too many messages; they are read more slowly").to_message())
            await asyncio.sleep(wait)
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        self._intake.count(len(text.encode() if text is not None else message.get("bytes") or b""))
        self._metrics.messages_read.inc()
        if text is None:
            raise Refused("bad_message", "clients send JSON as text; only the server sends binary messages")
        return text

    async def _receive_messages(self) -> None:
        limiter, deferred = RateLimiter(self._config.messages_per_second), None  # deferred: the updates that came too fast, as one
        while True:
            try:
                message = await self._next_message(None if deferred is None else limiter.wait)
                if isinstance(message, Stop):
                    if self._seat is None:
                        return
                    self._owned("end it").end("stopped")  # once the recording is complete the client is told, and the connection ends
                elif isinstance(message, Ack):
                    self._acknowledge(message)
                elif isinstance(message, Update):
                    self._check(message)
                    if deferred is None and limiter.wait > 0:
                        self.send(Refused("rate_limited", "too many messages; their newest values take effect soon").to_message())
                    deferred = message if deferred is None else deferred.merged(message)
                if deferred is not None and limiter.allow():
                    update, deferred = deferred, None
                    await self._update(update)
            except Refused as refused:
                if refused.fatal:
                    raise
                self._metrics.errors.labels(refused.code).inc()
                if limiter.allow():
                    self.send(refused.to_message())

    async def _next_message(self, seconds: float | None) -> LaterMessage | None:
        """The next message; None when there is none within so many seconds. Raises Refused when it is no such message."""
        try:
            text = await asyncio.wait_for(self._receive_text(), seconds)
        except asyncio.TimeoutError:
            return None
        return parse_later(text) if len(text) < LONG_MESSAGE else await asyncio.to_thread(parse_later, text)

    def _owned(self, what: str) -> LiveSession:
        """The session, if the client owns it. Raises Refused otherwise; `what`: what the client asks for."""
        if self._seat is None:
            raise Refused("busy", "the session has not started; wait until it is admitted")
        if self._seat.role != "owner":
            raise Refused("watch_only", f"you watch this session; only its owner can {what}")
        return self._seat.session

    def _acknowledge(self, ack: Ack) -> None:
        if self._seat is not None and self._seat.role == "owner":
            self._seat.session.acknowledge(min(ack.segment, self._next_segment - 1), ack.buffered)

    def _check(self, update: Update) -> None:
        """Raises Refused unless an update can take effect, alone or merged with others."""
        self._owned("change it")
        if update.prompts is not None:
            prompt_text(update.prompts, self._config.prompt_chars)
        elif update.transition is not None:
            raise Refused("bad_message", "a transition belongs in the same message as the prompts that it is for")
        if update.seed is not None and not update.reset_cache:
            raise Refused("bad_message", "a seed takes effect with reset_cache; send both")

    async def _update(self, update: Update) -> None:
        session = self._owned("change it")
        if update.prompts is not None:
            keep_sink = update.transition.keep_sink if update.transition else None
            prompt = prompt_text(update.prompts, self._config.prompt_chars)
            about = {"pieces": await self._look_at(prompt)}
            session.update_prompt(prompt, session.transition.with_sink(keep_sink), about=about)
        if update.reset_cache:
            session.restart(update.seed)
        if update.paused is not None:
            session.pause(update.paused)

    async def _send_messages(self) -> None:
        header_sent = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._messages:
                message = self._messages.popleft()
                await self._socket.send_json(message | self._video if message["type"] == "state" else message)
                if message.get("fatal"):
                    return
            if self._seat is None:
                continue
            session = self._seat.session
            for segment in session.segments_from(self._next_segment):
                if not header_sent:
                    await self._send_header(session)
                    header_sent = True
                await self._send_segment(session, segment)
            if session.ended is not None and not session.segments_from(self._next_segment) and not session.is_working:
                await self._send_end(session)
                return

    async def _send_header(self, session: LiveSession) -> None:
        header, initialization = session.header(self._format)
        await self._socket.send_json(header)
        if initialization is not None:
            await self._socket.send_bytes(initialization)

    async def _send_segment(self, session: LiveSession, segment: Segment) -> None:
        if segment.video != self._video:
            self._video = segment.video
            await self._socket.send_json({"type": "state", "paused": session.stepped.paused} | self._video)
        message, parts = await asyncio.to_thread(segment_messages, segment, self._format)  # encodes the JPEG files
        await self._socket.send_json(message)
        for part in parts:
            await self._socket.send_bytes(part)
            session.cost.bytes += len(part)
            self._metrics.bytes_sent.inc(len(part))
        self._next_segment = segment.index + 1

    async def _send_end(self, session: LiveSession) -> None:
        if session.error is None:
            await self._socket.send_json({"type": "ended", "reason": session.ended})
            return
        code = "idle" if session.ended == "idle" else "failed"
        self._metrics.errors.labels(code).inc()
        await self._socket.send_json({"type": "error", "code": code, "message": session.error, "fatal": True})

    async def _refuse(self, refused: Refused) -> None:
        self._metrics.errors.labels(refused.code).inc()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.send_json(refused.to_message() | {"fatal": True})
