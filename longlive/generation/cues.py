"""Which prompt is active when: a schedule, or a person typing."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

from longlive.generation.dimensions import Timing
from longlive.generation.mixes import parts_of
from longlive.generation.transition import Transition


def check_prompt(prompt: str, *, what: str = "the prompt") -> None:
    """Raises ValueError when a prompt is no text, not valid Unicode, empty, only white space, or a mix that is none (see `mixes`); `what`
    names it.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"{what} is a {type(prompt).__name__}, not text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid UTF-8 at character {error.start + 1}; write it as UTF-8") from error
    if not prompt.strip():
        raise ValueError(f"{what} is empty; describe what the video should show")
    parts_of(prompt)  # raises for a mix that is none


@dataclass(frozen=True)
class Cue:
    """From the first block that starts at or after `latent_frame`, `prompt` is active: a prompt, or a mix of some (see `mixes`).

    `transition`: what the switch to it does with the past; None: what the model does by default.
    """

    latent_frame: int
    prompt: str
    transition: Transition | None = None

    def __post_init__(self) -> None:
        if self.latent_frame < 0:
            raise ValueError(f"a prompt cannot begin at latent frame {self.latent_frame}; frames count from 0")
        check_prompt(self.prompt, what=f"the prompt at latent frame {self.latent_frame}")


@runtime_checkable
class Cues(Protocol):
    """Where prompts come from."""

    def due(self, previous_start: int, start: int) -> Cue | None:
        """The cue that takes effect at the block starting at latent frame `start`, the newest in (previous_start, start]; None: the
        active prompt stays.

        `previous_start`: of the previous block (-1: there is none). Called once per attempt at a block: a live source returns each
        prompt only once.
        """
        ...


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts with the latent frame at which each begins, the first at 0."""

    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        if not self.cues:
            raise ValueError("a schedule needs at least one prompt")
        if self.cues[0].latent_frame != 0:
            raise ValueError(f"the first prompt must begin at latent frame 0, not {self.cues[0].latent_frame}")
        for earlier, later in pairwise(cue.latent_frame for cue in self.cues):
            if later <= earlier:
                raise ValueError(f"the switch at latent frame {later} does not come after the one at {earlier}; put them in order")

    @classmethod
    def single(cls, prompt: str) -> PromptSchedule:
        return cls((Cue(0, prompt),))

    @classmethod
    def at_latent_frames(
        cls,
        prompts: Iterable[str],
        switch_latent_frames: Iterable[int],
        *,
        transition: Transition | Sequence[Transition | None] | None = None,
    ) -> PromptSchedule:
        """Prompts, and the latent frames at which the second, third, … begin. `transition`: of all of them, or one for each prompt."""
        prompts, starts = list(prompts), [0, *switch_latent_frames]
        if len(starts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need {max(0, len(prompts) - 1)} switch frames, got {len(starts) - 1}")
        transitions = transition if isinstance(transition, Sequence) else [transition] * len(prompts)
        return cls(tuple(Cue(*cue) for cue in zip(starts, prompts, transitions, strict=True)))

    @classmethod
    def from_seconds(
        cls, parts: Iterable[tuple[str, float]], timing: Timing, *, transitions: Sequence[Transition | None] | None = None
    ) -> PromptSchedule:
        """Prompts, and how many seconds each lasts; each begins with the block nearest to its second. `transitions`: one for each prompt.

        Raises ValueError when a prompt has no length or does not fill a block.
        """
        cues, second = [], 0.0
        for number, (prompt, seconds) in enumerate(parts):
            if not seconds > 0:
                raise ValueError(f"the prompt {prompt!r} lasts {seconds} seconds; choose a length above 0")
            if cues and timing.block_at(second) <= cues[-1].latent_frame:
                shown = cues[-1].prompt
                raise ValueError(f"the prompt {shown!r} is too short to fill a block of {timing.block} latent frames; make it longer")
            cues.append(Cue(timing.block_at(second), prompt, None if transitions is None else transitions[number]))
            second += seconds
        return cls(tuple(cues))

    def due(self, previous_start: int, start: int) -> Cue | None:
        due = [cue for cue in self.cues if previous_start < cue.latent_frame <= start]
        return due[-1] if due else None

    def validate(self, num_latent_frames: int) -> None:
        """Raises ValueError when a prompt begins beyond the end of a video of `num_latent_frames`."""
        last = self.cues[-1].latent_frame
        if last >= num_latent_frames:
            raise ValueError(
                f"the switch at latent frame {last} lies beyond the video's end at latent frame {num_latent_frames}; make the video longer"
            )


class PromptQueue:
    """Prompts typed while the video runs: one passed to `put`, from any thread, takes effect at the next block; the newest wins."""

    def __init__(self, prompt: str) -> None:
        self._lock = threading.Lock()
        self._next: tuple[str, Transition | None] | None = None
        self.put(prompt)

    def put(self, prompt: str, transition: Transition | None = None) -> None:
        """Raises ValueError when the prompt is empty."""
        check_prompt(prompt)
        with self._lock:
            self._next = (prompt, transition)

    def due(self, previous_start: int, start: int) -> Cue | None:
        with self._lock:
            pending, self._next = self._next, None
        return None if pending is None else Cue(start, *pending)
