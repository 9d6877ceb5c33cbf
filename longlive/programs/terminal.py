"""Prompts typed into a terminal, one per line. Knows nothing about models, or what the prompts are used for."""

from __future__ import annotations

import codecs
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator

from longlive.generation.cues import PromptQueue

log = logging.getLogger(__name__)


class TerminalPrompts:
    """Puts the lines of a file descriptor into a `PromptQueue`, in another thread, while the `with` block lasts.

    It reads without a buffer and checks every 0.1 s whether the block has ended, so that it never delays the end of the program.

    Args:
        first: a prompt that is there from the start.
        hint: what to tell the person who typed a prompt, if anything.
    """

    def __init__(self, descriptor: int, *, first: str | None = None, hint: Callable[[str], str | None] | None = None) -> None:
        self._hint = hint
        self._descriptor = descriptor
        self._prompts = PromptQueue(first) if first is not None else None
        self._last = first
        self._has_prompt, self._ended, self._stop = threading.Event(), threading.Event(), threading.Event()
        if first is not None:
            self._has_prompt.set()
        self._thread = threading.Thread(target=self._read, name="prompts", daemon=True)

    def __enter__(self) -> TerminalPrompts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self) -> PromptQueue:
        """Wait for the first prompt; returns the queue. Raises ValueError when the input ends without a prompt."""
        while not self._has_prompt.wait(0.1):
            if self._ended.is_set() and not self._has_prompt.is_set():
                raise ValueError("no prompt came from the terminal; type one, or give --prompt or --prompts")
        assert self._prompts is not None
        return self._prompts

    def ended_with(self, prompt: str) -> bool:
        """Whether the input has ended and `prompt` was its last prompt."""
        return self._ended.is_set() and prompt == self._last

    def _put(self, text: str) -> None:
        self._last = text
        if self._hint is not None and (found := self._hint(text)) is not None:
            log.warning(found)
        if self._prompts is None:
            self._prompts = PromptQueue(text)
        else:
            self._prompts.put(text)
            log.info('from the next block on: "%s"', text)
        self._has_prompt.set()

    def _read(self) -> None:
        try:
            for line in self._lines():
                if line.strip():
                    self._put(line.strip())
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
