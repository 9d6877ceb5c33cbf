"""The text that the next block is made under: a prompt's, or what lies between two prompts while one turns into the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from longlive.generation.cues import Cue
from longlive.generation.mixes import interpolate
from longlive.generation.transition import Transition
from longlive.types import Text, TextKV


class Embeddings(NamedTuple):
    """What a blend needs beside the text of whole prompts: a prompt's embedding `[1, L, E]`, and the keys and values of an embedding."""

    embed: Callable[[str], Text]
    project: Callable[[Text], TextKV]


class ActiveText:
    """Follows cues: which text is active, and whether it changes with the next block.

    Args:
        project_text: text keys and values of a prompt.
        embeddings: for transitions that blend; None: there are none, and such a cue is an error.
        transition: of cues that do not say theirs.
    """

    def __init__(self, project_text: Callable[[str], TextKV], embeddings: Embeddings | None, transition: Transition) -> None:
        self._project_text, self._embeddings, self._transition = project_text, embeddings, transition
        self.cue: Cue | None = None
        self.text: TextKV | None = None
        self._between: Text | None = None  # the active embedding, within a blend
        self._blend: tuple[Text, Text, int] | None = None  # from, to, and how many of its blocks have begun

    def advance(self, new: Cue | None) -> Transition | None:
        """Go on to the next block, at which `new` takes effect; returns how the past is to follow if the text changes with it.

        A cue that comes within a blend starts from the text of that moment. Raises ValueError for a blend without `embeddings`.
        """
        if new is not None:
            how, before = new.transition or self._transition, self.cue
            blends = how.blend > 1 and before is not None
            self._blend = self._begin_blend(new.prompt) if blends else None
            self.cue = new
            if not blends:
                self._between, self.text = None, self._project_text(new.prompt)
                return how
        if self._blend is None:
            return None
        assert self.cue is not None and self._embeddings is not None
        how = self.cue.transition or self._transition
        start, goal, begun = self._blend
        begun += 1
        if begun == how.blend:  # exactly the prompt's own text, as after any other switch
            self._blend, self._between, self.text = None, None, self._project_text(self.cue.prompt)
        else:
            self._blend = start, goal, begun
            self._between = interpolate(start, goal, begun / how.blend, how.interpolation)
            self.text = self._embeddings.project(self._between)
        return how

    def _begin_blend(self, prompt: str) -> tuple[Text, Text, int]:
        if self._embeddings is None:
            raise ValueError("prompts that differ between the videos of a batch cannot be blended; use another transition")
        assert self.cue is not None
        start = self._embeddings.embed(self.cue.prompt) if self._between is None else self._between
        return start, self._embeddings.embed(prompt), 0
