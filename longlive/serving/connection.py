"""One WebSocket: passes the client's messages to its session, and the session's segments and messages to the client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from longlive.config import ServeConfig
from longlive.miniature.captions import hint
from longlive.serving.access import RateLimiter
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
    parse_first,
    parse_later,
    prompt_text,
)
from longlive.serving.metrics import Metrics
from longlive.serving.scheduler import SessionScheduler

FIRST_MESSAGE_SECONDS = 10.0  # within which a client must send its first message
MAX_QUEUED_MESSAGES = 100  # kept for a client that does not read; the oldest are dropped


class Connection:
    """The client of a session. What other threads send is passed on by its own coroutine.

    Args:
        model: the description of the model that `hello` carries.
    """

    def __init__(
        self, socket: WebSocket, scheduler: SessionScheduler, config: ServeConfig, metrics: Metrics, model: dict[str, Any]
    ) -> None:
        self._socket, self._scheduler, self._config, self._metrics, self._model = socket, scheduler, config, metrics, model
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._messages: deque[dict[str, Any]] = deque(maxlen=MAX_QUEUED_MESSAGES)
        self._session: LiveSession | None = None
        self._format: Format = "mp4"
        self._next_segment = 0  # index of the next one to send
        self._position: int | None = None  # in the queue, as told last

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
        self._session = session
        session.attach(self)
        self.send({"type": "admitted"})
        self.send(self._hello(session, resumed=False))

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
            if self._session is not None:
                self._session.detach(self)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close()

    async def _open(self) -> None:
        first = parse_first(await asyncio.wait_for(self._receive_text(), FIRST_MESSAGE_SECONDS))
        self._format = first.format
        if isinstance(first, Start):
            prompt = prompt_text(first.prompts, self._config.prompt_chars)
            self._scheduler.open(self, prompt, seed=first.seed, transition=self._scheduler.pipe.transition.with_sink(first.keep_sink))
            self._hint(prompt)
        else:
            self._resume(first)

    def _hint(self, prompt: str) -> None:
        """Tell the client which words of a prompt the model does not know, if it is one whose words are few."""
        if self._model["words"] is not None and (text := hint(prompt)) is not None:
            self.send({"type": "notice", "message": text})

    def _resume(self, message: Resume) -> None:
        session = self._scheduler.running(message.session)
        self._session, self._next_segment = session, message.next
        self.send(self._hello(session, resumed=True))
        session.attach(self, next_segment=message.next)

    def _hello(self, session: LiveSession, *, resumed: bool) -> dict[str, Any]:
        limits = {"prompt_chars": self._config.prompt_chars, "messages_per_second": self._config.messages_per_second}
        return session.state() | {
            "type": "hello",
            "version": VERSION,
            "session": session.name,
            "model": self._model,
            "limits": limits,
            "resumed": resumed,
            "prompt": session.stepped.newest_prompt,
        }

    async def _receive_text(self) -> str:
        """The next text message. Raises Refused for a binary one."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        if text is None:
            raise Refused("bad_message", "clients send JSON as text; only the server sends binary messages")
        return text

    async def _receive_messages(self) -> None:
        limiter, deferred = RateLimiter(self._config.messages_per_second), None  # deferred: the updates that came too fast, as one
        while True:
            try:
                message = await self._next_message(None if deferred is None else limiter.wait)
                if isinstance(message, Stop):
                    if self._session is None:
                        return
                    self._session.end("stopped")  # once the recording is complete the client is told, and the connection ends
                elif isinstance(message, Ack):
                    self._acknowledge(message)
                elif isinstance(message, Update):
                    self._check(message)
                    if deferred is None and limiter.wait > 0:
                        self.send(Refused("rate_limited", "too many messages; their newest values take effect soon").to_message())
                    deferred = message if deferred is None else deferred.merged(message)
                if deferred is not None and limiter.allow():
                    update, deferred = deferred, None
                    self._update(update)
            except Refused as refused:
                if refused.fatal:
                    raise
                self._metrics.errors.labels(refused.code).inc()
                if limiter.allow():
                    self.send(refused.to_message())

    async def _next_message(self, seconds: float | None) -> LaterMessage | None:
        """The next message; None when there is none within so many seconds. Raises Refused when it is no such message."""
        with contextlib.suppress(asyncio.TimeoutError):
            return parse_later(await asyncio.wait_for(self._receive_text(), seconds))
        return None

    def _acknowledge(self, ack: Ack) -> None:
        if self._session is not None:
            self._session.acknowledge(min(ack.segment, self._next_segment - 1), ack.buffered)

    def _check(self, update: Update) -> None:
        """Raises Refused unless an update can take effect, alone or merged with others."""
        if self._session is None:
            raise Refused("busy", "the session has not started; wait until it is admitted")
        if update.prompts is not None:
            prompt_text(update.prompts, self._config.prompt_chars)
        elif update.transition is not None:
            raise Refused("bad_message", "a transition belongs in the same message as the prompts that it is for")
        if update.seed is not None and not update.reset_cache:
            raise Refused("bad_message", "a seed takes effect with reset_cache; send both")

    def _update(self, update: Update) -> None:
        session = self._session
        assert session is not None  # `_check` was asked
        if update.prompts is not None:
            keep_sink = update.transition.keep_sink if update.transition else None
            prompt = prompt_text(update.prompts, self._config.prompt_chars)
            self._hint(prompt)
            session.update_prompt(prompt, session.transition.with_sink(keep_sink))
        if update.reset_cache:
            session.restart(update.seed)
        if update.paused is not None:
            session.pause(update.paused)

    async def _send_messages(self) -> None:
        header_sent, video_index = False, 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._messages:
                message = self._messages.popleft()
                await self._socket.send_json(message)
                if message.get("fatal"):
                    return
            session = self._session
            if session is None:
                continue
            for segment in session.segments_from(self._next_segment):
                if not header_sent:
                    header, initialization = session.header(self._format)
                    await self._socket.send_json(header)
                    if initialization is not None:
                        await self._socket.send_bytes(initialization)
                    header_sent = True
                if segment.message["video_index"] != video_index:
                    video_index = segment.message["video_index"]
                    await self._socket.send_json(session.state())
                message, parts = await asyncio.to_thread(segment_messages, segment, self._format)  # encodes the JPEG files
                await self._socket.send_json(message)
                for part in parts:
                    await self._socket.send_bytes(part)
                    session.cost.bytes += len(part)
                    self._metrics.bytes_sent.inc(len(part))
                self._next_segment = segment.index + 1
            if session.ended is not None and not session.segments_from(self._next_segment) and not session.is_working:
                await self._send_end(session)
                return

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
