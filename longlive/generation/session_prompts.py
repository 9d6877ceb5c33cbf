"""The prompts of a running session, and whether it still runs: what its owner changes from any thread while a block is being made."""

from __future__ import annotations

import threading

from longlive.generation.cues import Cue, Cues, PromptSchedule, check_prompt
from longlive.generation.transition import Transition


class SessionStopped(Exception):
    """The session was stopped while a block was being made, which is then abandoned."""


def check_given(prompt: str, transition: Transition | None) -> None:
    """Raises ValueError for an empty prompt, or a transition that is none."""
    check_prompt(prompt)
    if not isinstance(transition, Transition | None):
        raise ValueError(f"{transition!r} is no Transition; write Transition(keep_sink=…)")


class SessionPrompts:
    """The prompts of a session: those of its plan, until another one is given. Thread-safe."""

    def __init__(self, plan: Cues) -> None:
        self._plan = plan
        self._given: tuple[str, Transition | None] | None = None  # until a block begins with it
        self._first: Cue | None = None  # of a video that was begun again, unless a live plan has a newer one
        self._active: Cue | None = None
        self._lock = threading.Lock()
        self.stopped = False

    def check_running(self) -> None:
        """To be called between two passes: raises `SessionStopped` once the session is stopped, so that none waits for a whole block."""
        if self.stopped:
            raise SessionStopped

    def put(self, prompt: str, transition: Transition | None) -> None:
        """Make `prompt` active from the next block on, instead of one that is still pending. Raises ValueError when it is empty."""
        check_given(prompt, transition)
        with self._lock:
            self._given = prompt, transition

    @property
    def pending(self) -> bool:
        """Whether a prompt was given that no block has begun with."""
        return self._given is not None

    @property
    def newest(self) -> str | None:
        """The prompt of the next block, as far as it is known: None when a `PromptQueue` has the first one."""
        with self._lock:
            if self._given is not None:
                return self._given[0]
            if (known := self._first or self._active) is not None:
                return known.prompt
            return self._plan.cues[0].prompt if isinstance(self._plan, PromptSchedule) else None

    def due(self, previous_start: int, start: int) -> Cue | None:
        """As in `Cues`; a given prompt comes before the planned one."""
        with self._lock:
            cue = self._plan.due(previous_start, start) or self._first
            cue = cue if self._given is None else Cue(start, *self._given)
            self._given = self._first = None
            self._active = cue or self._active
            return cue

    def restart(self) -> None:
        """Begin a new video with one prompt: the one given last, active or pending. A schedule ends; a live plan goes on."""
        with self._lock:
            cue = Cue(0, *self._given) if self._given is not None else self._first or self._active or self._plan.due(-1, 0)
            assert cue is not None  # a session begins with a prompt
            self._given, self._active, self._first = None, None, Cue(0, cue.prompt)
            self._plan = PromptSchedule.single(cue.prompt) if isinstance(self._plan, PromptSchedule) else self._plan
