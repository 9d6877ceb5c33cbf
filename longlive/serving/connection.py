"""One WebSocket: what the client says goes to its session, what the session makes goes to the client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from longlive.config import ServeConfig
from longlive.serving.access import Allowance
from longlive.serving.hub import Hub
from longlive.serving.live import Live, piece_messages
from longlive.serving.messages import VERSION, Ack, Format, Refused, Resume, Start, Stop, Update, prompt_of, read_first, read_later
from longlive.serving.metrics import Metrics

FIRST_SECONDS = 10.0  # that a client may take to say what it wants
QUEUED = 100  # messages that are kept for a client that does not read; of more the oldest go


class Connection:
    """A client of a session. What other threads tell it is sent by its own coroutine.

    Args:
        model: what `hello` says of the model.
    """

    def __init__(self, socket: WebSocket, hub: Hub, config: ServeConfig, metrics: Metrics, model: dict[str, Any]) -> None:
        self._socket, self._hub, self._config, self._metrics, self._model = socket, hub, config, metrics, model
        self._loop = asyncio.get_running_loop()
        self._something = asyncio.Event()
        self._messages: deque[dict[str, Any]] = deque(maxlen=QUEUED)
        self._live: Live | None = None
        self._format: Format = "mp4"
        self._sent = 0  # number of the next chunk to send
        self._over = False

    # called from any thread

    def changed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed: the server ends
            self._loop.call_soon_threadsafe(self._something.set)

    def told(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self.changed()

    def place(self, number: int) -> None:
        self.told({"type": "queued", "place": number})

    def admitted(self, live: Live) -> None:
        self._live = live
        live.attach(self)
        self.told({"type": "admitted"})
        self.told(self._hello(live, resumed=False))

    # the connection's own

    async def run(self) -> None:
        """From the first message until either side ends it."""
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._begin()
            tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Refused as refused:
            await self._refuse(refused)
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError):
            pass  # gone: starlette says so in one way or the other
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._hub.leave(self)
            if self._live is not None:
                self._live.detach(self)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close()

    async def _begin(self) -> None:
        first = read_first(await asyncio.wait_for(self._text(), FIRST_SECONDS))
        self._format = first.format
        if isinstance(first, Start):
            prompt = prompt_of(first.prompts, self._config.prompt_chars)
            self._hub.open(self, prompt, seed=first.seed, keep_sink=first.keep_sink)
        else:
            self._resume(first)

    def _resume(self, wanted: Resume) -> None:
        live = self._hub.find(wanted.session)
        self._live, self._sent = live, wanted.next
        self.told(self._hello(live, resumed=True))
        live.attach(self, next_chunk=wanted.next)

    def _hello(self, live: Live, *, resumed: bool) -> dict[str, Any]:
        limits = {"prompt_chars": self._config.prompt_chars, "messages_per_second": self._config.messages_per_second}
        state = {name: value for name, value in live.state().items() if name != "type"}
        return {
            "type": "hello",
            "version": VERSION,
            "session": live.name,
            "model": self._model,
            "limits": limits,
            "resumed": resumed,
            "prompt": live.prompt,
            **state,
        }

    async def _text(self) -> str:
        """The next text message. Raises Refused for a binary one."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        if text is None:
            raise Refused("bad_message", "binary messages come from the server only; send JSON as text")
        return text

    async def _receive(self) -> None:
        allowance = Allowance(self._config.messages_per_second)
        late: Update | None = None  # what came too fast; of its kind the newest counts
        while True:
            try:
                text = await asyncio.wait_for(self._text(), allowance.wait if late is not None else None)
                message = read_later(text)
                if isinstance(message, Stop):
                    if self._live is None:
                        return
                    self._live.end("stopped")  # once the recording is whole the client is told, and the connection ends
                elif isinstance(message, Ack):
                    self._acknowledge(message)
                elif late is not None or not allowance.take():
                    if late is None:
                        self.told(Refused("rate_limited", "too many messages; of those that come too fast the newest counts").told())
                    late = message
                else:
                    self._update(message)
            except asyncio.TimeoutError:
                if late is not None and allowance.take():
                    late = self._update(late)
            except Refused as refused:
                if refused.fatal:
                    raise
                self._metrics.errors.labels(refused.code).inc()
                if allowance.take():
                    self.told(refused.told())

    def _acknowledge(self, ack: Ack) -> None:
        if self._live is not None:
            self._live.acknowledge(min(ack.chunk, self._sent - 1), ack.ahead)

    def _update(self, update: Update) -> None:
        live = self._live
        if live is None:
            raise Refused("busy", "the session has not begun; wait until it is admitted")
        if update.prompts is not None:
            transition = update.transition
            live.update_prompt(prompt_of(update.prompts, self._config.prompt_chars), transition.keep_sink if transition else None)
        elif update.transition is not None:
            raise Refused("bad_message", "a transition goes with the prompts it is for")
        if update.reset_cache:
            live.restart(update.seed)
        elif update.seed is not None:
            raise Refused("bad_message", "a seed takes effect with reset_cache; send both")
        if update.paused is not None:
            live.pause(update.paused)

    async def _send(self) -> None:
        header_sent, take = False, 0
        while True:
            await self._something.wait()
            self._something.clear()
            while self._messages:
                message = self._messages.popleft()
                await self._socket.send_json(message)
                if message.get("fatal"):
                    return
            live = self._live
            if live is None:
                continue
            for piece in live.pieces_from(self._sent):
                if not header_sent:
                    about, binary = live.header(self._format)
                    await self._socket.send_json(about)
                    if binary is not None:
                        await self._socket.send_bytes(binary)
                    header_sent = True
                if piece.about["take"] != take:
                    take = piece.about["take"]
                    await self._socket.send_json(live.state())
                about, binaries = await asyncio.to_thread(piece_messages, piece, self._format)  # JPEG files are made here
                await self._socket.send_json(about)
                for binary in binaries:
                    await self._socket.send_bytes(binary)
                    live.cost.bytes += len(binary)
                    self._metrics.bytes_sent.inc(len(binary))
                self._sent = piece.number + 1
            if live.ended is not None and not live.pieces_from(self._sent) and not live.is_working:
                if live.error is not None:
                    code = "idle" if live.ended == "idle" else "failed"
                    self._metrics.errors.labels(code).inc()
                    await self._socket.send_json({"type": "error", "code": code, "message": live.error, "fatal": True})
                else:
                    await self._socket.send_json({"type": "ended", "reason": live.ended})
                return

    async def _refuse(self, refused: Refused) -> None:
        self._metrics.errors.labels(refused.code).inc()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.send_json(refused.told() | {"fatal": True})
