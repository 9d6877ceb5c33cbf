"""Which prompt is in force when: a plan, or a person typing."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

TEMPORAL_STRIDE = 4  # pixel frames a latent frame, after the first


def num_latent_frames_for(seconds: float, *, block: int = 3, fps: float = 16) -> int:
    """Latent frames of a video of at least `seconds`, in whole blocks: F frames make 4 F - 3 images."""
    if not seconds > 0 or math.isinf(seconds):
        raise ValueError(f"a video of {seconds} seconds cannot be made; choose a length above 0")
    images = math.ceil(seconds * fps - 1e-6)
    frames = math.ceil((images - 1) / TEMPORAL_STRIDE) + 1
    return max(1, math.ceil(frames / block)) * block


def num_images_of(num_latent_frames: int) -> int:
    """Pixel frames of a video of `num_latent_frames` latent frames."""
    return TEMPORAL_STRIDE * num_latent_frames - (TEMPORAL_STRIDE - 1)


def check_prompt(prompt: str, *, what: str = "the prompt") -> None:
    """Raises ValueError when a prompt is empty or only white space; `what` names it."""
    if not prompt.strip():
        raise ValueError(f"{what} is empty; describe what the video should show")


@dataclass(frozen=True)
class Cue:
    """From the first block that starts at or after `frame` on, `prompt` is in force.

    `keep_sink`: whether the video's first frames keep what the first prompt wrote (released setting), or are refreshed;
    None leaves it to the model's setting.
    """

    frame: int
    prompt: str
    keep_sink: bool | None = None

    def __post_init__(self) -> None:
        if self.frame < 0:
            raise ValueError(f"a prompt cannot begin at frame {self.frame}; frames count from 0")
        check_prompt(self.prompt, what=f"the prompt at frame {self.frame}")


class Cues(Protocol):
    """Where prompts come from."""

    def due(self, after: int, until: int) -> Cue | None:
        """The newest cue for the block that starts at frame `until`, when the block before started at `after` (-1 at first)."""
        ...


@dataclass(frozen=True)
class PromptSchedule:
    """A plan: prompts with the latent frame at which each begins, the first at 0."""

    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        if not self.cues:
            raise ValueError("a schedule needs at least one prompt")
        if self.cues[0].frame != 0:
            raise ValueError(f"the first prompt must begin at frame 0, not {self.cues[0].frame}")
        for earlier, later in zip(self.cues, self.cues[1:], strict=False):
            if later.frame <= earlier.frame:
                raise ValueError(f"switch at frame {later.frame} does not come after the one at frame {earlier.frame}; put them in order")

    @classmethod
    def single(cls, prompt: str) -> PromptSchedule:
        return cls((Cue(0, prompt),))

    @classmethod
    def at_frames(cls, prompts: Iterable[str], switch_frames: Iterable[int], *, keep_sink: bool | None = None) -> PromptSchedule:
        """Prompts and the frames at which the second, third, … begin."""
        prompts, starts = list(prompts), [0, *switch_frames]
        if len(starts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need {max(0, len(prompts) - 1)} switch frames, got {len(starts) - 1}")
        return cls(tuple(Cue(frame, prompt, keep_sink) for frame, prompt in zip(starts, prompts, strict=True)))

    @classmethod
    def from_seconds(cls, parts: Iterable[tuple[str, float]], *, block: int = 3, fps: float = 16) -> PromptSchedule:
        """Prompts and how many seconds each lasts; each begins with the block nearest to its second."""
        cues, second = [], 0.0
        for prompt, seconds in parts:
            if not seconds > 0:
                raise ValueError(f"the prompt {prompt!r} lasts {seconds} seconds; choose a length above 0")
            cues.append(Cue(round(second * fps / TEMPORAL_STRIDE / block) * block, prompt))
            second += seconds
        return cls(tuple(cues))

    def due(self, after: int, until: int) -> Cue | None:
        due = [cue for cue in self.cues if after < cue.frame <= until]
        return due[-1] if due else None

    def validate(self, num_latent_frames: int) -> None:
        """Raises ValueError when a prompt begins beyond the end of a video of `num_latent_frames`."""
        last = self.cues[-1]
        if last.frame >= num_latent_frames:
            raise ValueError(
                f"the switch at frame {last.frame} lies beyond the video's end at frame {num_latent_frames}; make the video longer"
            )


class PromptQueue:
    """A person typing: what `put` gives, from any thread, is in force from the next block on; the newest wins."""

    def __init__(self, prompt: str) -> None:
        self._lock = threading.Lock()
        self._next: tuple[str, bool | None] | None = None
        self.put(prompt)

    def put(self, prompt: str, keep_sink: bool | None = None) -> None:
        """Raises ValueError when the prompt is empty."""
        check_prompt(prompt)
        with self._lock:
            self._next = (prompt, keep_sink)

    def due(self, after: int, until: int) -> Cue | None:
        with self._lock:
            pending, self._next = self._next, None
        return None if pending is None else Cue(until, *pending)
