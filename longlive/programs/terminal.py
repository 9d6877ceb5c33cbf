"""Prompts from a terminal or a pipe, one per line, and what a person who types sees meanwhile. Knows nothing about models."""

from __future__ import annotations

import codecs
import importlib.util
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from longlive.generation.cues import Cue, PromptQueue, check_prompt
from longlive.generation.dimensions import Timing
from longlive.generation.session import DecodedBlock

log = logging.getLogger(__name__)

PIPED_SECONDS = 5.0  # that a line of a pipe lasts, unless the next one says when it begins
PREVIEW_COLUMNS = 64
TIMED = re.compile(r"@(\+?)(\d+(?:\.\d+)?)s?\s+(\S.*)")


class PipedPrompts:
    """The lines of a pipe in their order; all are shown, each for a block at least. Thread-safe, a `Cues`.

    `@12.5 prompt` begins 12.5 seconds into the video, `@+3 prompt` 3 seconds after the prompt before it began, and a line without a time
    `PIPED_SECONDS` after that. What is late begins with the next block.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._lines: deque[tuple[bool, float, str]] = deque()  # whether the time counts from the prompt before, seconds, prompt
        self._began = 0  # latent frame of the newest prompt
        self._lock = threading.Lock()

    def put(self, line: str) -> None:
        """Raises ValueError when the line holds no prompt."""
        timed = TIMED.fullmatch(line)
        relative, seconds, prompt = (bool(timed[1]), float(timed[2]), timed[3]) if timed else (True, PIPED_SECONDS, line)
        check_prompt(prompt)
        with self._lock:
            self._lines.append((relative, seconds, prompt))

    def due(self, previous_start: int, start: int) -> Cue | None:
        with self._lock:
            if not self._lines:
                return None
            relative, seconds, prompt = self._lines[0]
            begins = self._timing.block_at(seconds) + (self._began if relative else 0)
            if previous_start >= 0 and start < begins:
                return None
            self._lines.popleft()
            self._began = start
            return Cue(start, prompt)

    @property
    def num_waiting(self) -> int:
        """How many lines were not shown yet."""
        return len(self._lines)

    def is_over(self, latent_frame: int) -> bool:
        """Whether the last line has lasted until `latent_frame`."""
        return not self._lines and latent_frame >= self._began + self._timing.latent_frames_for(PIPED_SECONDS)


class TerminalPrompts:
    """Puts the lines of a file descriptor into a queue of prompts, in another thread, while the `with` block lasts.

    Of what a person types at a terminal the newest line counts; there is an input line of its own below the messages, and below that how
    far the video is. Lines of a pipe are all shown (`PipedPrompts`). It reads a pipe without a buffer and checks every 0.1 s whether the
    block has ended, so that it never delays the end of the program.

    Args:
        first: a prompt that is there from the start.
        hint: what to tell the person who typed a prompt, if anything.
        preview: show the video below the input line, in colours that most terminals know.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        timing: Timing,
        first: str | None = None,
        hint: Callable[[str], str | None] | None = None,
        preview: bool = False,
    ) -> None:
        self._hint, self._descriptor, self._preview = hint, descriptor, preview
        self.typed = os.isatty(descriptor)
        self.has_line = self.typed and can_edit()
        self._prompts: PromptQueue | PipedPrompts | None = None if self.typed else PipedPrompts(timing)
        self._status = Status(timing.fps, preview=preview)
        self._last: str | None = None
        self._app: Any = None  # prompt_toolkit's, while there is an input line
        self._has_prompt, self._ended, self._stop = threading.Event(), threading.Event(), threading.Event()
        if first is not None:
            self._put(first)
        self._thread = threading.Thread(target=self._read, name="prompts", daemon=True)

    def __enter__(self) -> TerminalPrompts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            if (app := self._app) is not None and app.is_running and app.loop is not None:
                app.loop.call_soon_threadsafe(_leave, app)
            self._thread.join(0.1)
        if isinstance(self._prompts, PipedPrompts) and (left := self._prompts.num_waiting):
            log.warning("the video ended before %d of the lines", left)

    def wait(self) -> PromptQueue | PipedPrompts:
        """Wait for the first prompt; returns the queue. Raises ValueError when the input ends without a prompt."""
        while not self._has_prompt.wait(0.1):
            if self._ended.is_set() and not self._has_prompt.is_set():
                raise ValueError("no prompt came from the terminal; type one, or give --prompt or --prompts")
        assert self._prompts is not None
        return self._prompts

    def shown(self, block: DecodedBlock) -> bool:
        """Tell the person about a new block. Returns whether the input has ended and its last prompt was shown."""
        self._status.add(block)
        if not self._ended.is_set():
            return False
        if isinstance(self._prompts, PipedPrompts):
            return self._prompts.is_over(block.latent_frames.stop)
        return block.prompt == self._last

    def _put(self, text: str) -> None:
        try:
            if isinstance(self._prompts, PipedPrompts):
                self._prompts.put(text)
            elif self._prompts is None:
                self._prompts = PromptQueue(text)
            else:
                self._prompts.put(text)
        except ValueError as error:
            log.warning("%s", error)
            return
        self._last = text
        if self._hint is not None and (found := self._hint(text)) is not None:
            log.warning(found)
        if self._has_prompt.is_set() and self.typed:
            log.info('from the next block on: "%s"', text)
        self._has_prompt.set()

    def _read(self) -> None:
        try:
            for line in self._edited_lines() if self.has_line else self._lines():
                if line.strip():
                    self._put(line.strip())
        except OSError as error:
            log.warning("no more prompts can be read: %s", error)
        finally:
            self._ended.set()

    def _lines(self) -> Iterator[str]:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while not self._stop.is_set():
            if not select.select([self._descriptor], [], [], 0.1)[0]:
                continue
            data = os.read(self._descriptor, 65536)
            *lines, rest = (rest + decoder.decode(data, final=not data)).split("\n")
            yield from lines
            if not data:
                yield rest
                return

    def _edited_lines(self) -> Iterator[str]:
        """Lines from an input line that stays at the bottom of the terminal, with its history, while messages scroll above it."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import ANSI
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.styles import Style

        with _messages_above():
            line: PromptSession[str] = PromptSession(
                "prompt> ",
                bottom_toolbar=lambda: ANSI(self._status.text()),
                refresh_interval=0.1 if self._preview else 0.25,
                style=Style([("bottom-toolbar", "noreverse")]),
                color_depth=ColorDepth.TRUE_COLOR if self._preview else None,
                erase_when_done=True,
            )
            self._app = line.app
            while not self._stop.is_set():
                try:
                    yield line.prompt(pre_run=lambda: _leave(line.app) if self._stop.is_set() else None)
                except EOFError:
                    return
                except KeyboardInterrupt:  # a key here, not a signal
                    os.kill(os.getpid(), signal.SIGINT)
                    return


def can_edit() -> bool:
    """Whether there can be an input line of its own: prompt_toolkit is installed, and messages go to a terminal that can move."""
    installed = importlib.util.find_spec("prompt_toolkit") is not None
    return installed and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _leave(app: Any) -> None:
    if app.is_running and not app.future.done():
        app.exit(exception=EOFError())


@contextmanager
def _messages_above() -> Iterator[None]:
    """What is printed or logged appears above the input line."""
    from prompt_toolkit.patch_stdout import patch_stdout

    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    handlers = [handler for handler in handlers if handler.stream in (sys.stdout, sys.stderr)]
    before = [handler.stream for handler in handlers]
    with patch_stdout(raw=True):
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            for handler, stream in zip(handlers, before):
                handler.setStream(stream)


class Status:
    """What is below the input line: how far the video is and, with `preview`, its picture."""

    def __init__(self, fps: float, *, preview: bool) -> None:
        self._fps, self._preview = fps, preview
        self._num_images = self._num_first = 0
        self._start = 0.0  # when the first block came
        self._images: tuple[float, np.ndarray] | None = None  # when they came, and the images of the newest block

    def add(self, block: DecodedBlock) -> None:
        """Another block is there."""
        now = time.perf_counter()
        if not self._num_images:
            self._start, self._num_first = now, block.images.shape[1]
        self._num_images += block.images.shape[1]
        self._images = now, np.asarray(block.images[0])

    def text(self) -> str:
        """With the escape sequences of the picture."""
        if self._images is None:
            return "the video begins with the first prompt"
        came, images = self._images
        speed = (self._num_images - self._num_first) / max(1e-3, came - self._start)
        words = f"{self._num_images / self._fps:.1f} s of video, {speed:.0f} frames/s; Ctrl-D: no more prompts, Ctrl-C: stop"
        if not self._preview:
            return words
        image = images[min(len(images) - 1, int((time.perf_counter() - came) * self._fps))]
        return f"{half_blocks(image)}\n{words}"


def half_blocks(image: np.ndarray, columns: int = PREVIEW_COLUMNS) -> str:
    """A picture `[H, W, 3]` as text: each character shows two pixels one above the other, in 24-bit colour."""
    rows = max(1, round(columns * image.shape[0] / image.shape[1] / 2))
    pixels = np.asarray(Image.fromarray(image).resize((columns, 2 * rows), Image.Resampling.BILINEAR))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        pairs = zip(upper.tolist(), lower.tolist())
        lines.append("".join(f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in pairs) + "\x1b[0m")
    return "\n".join(lines)
