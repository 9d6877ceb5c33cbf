"""What a prompt switch does with the video's past."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from longlive.generation.mixes import Interpolation

Recache = Literal["joint", "causal", "none", "clear"]


@dataclass(frozen=True)
class Transition:
    """What a prompt switch does with the sink and with the recent frames.

    `named` makes those that have a name: a `switch` recaches the past, a `cut` drops it (a new scene), a `blend` turns one prompt into the
    other over several blocks.

    Attributes:
        keep_sink: the sink keeps the keys and values written under the first prompt (`global_sink` of the released configurations);
            otherwise all visible frames are re-encoded, and the first of them are the new sink: the video's first frames leave the
            cache. While a video is no longer than the window everything is re-encoded, the sink too, whatever `keep_sink` is.
        recache: "joint" passes the visible frames through the model again, together, under the new prompt (KV-recache, the paper's);
            "causal" does so block by block in order. For comparison: "none" keeps the old keys and values and changes only the
            text; "clear" drops the past. These two do not use `keep_sink`.
        blend: blocks over which the embedding goes from the old prompt to the new one; each is a switch of its own, so that a blend of
            n blocks costs n recaches, and the nth has the new prompt's own text. 1: at once.
        interpolation: of embeddings on this way (see `interpolate`).

    Raises:
        ValueError: for an unknown `recache` or `interpolation`, a `keep_sink` that is no truth value, a blend over less than a block, or
            one that drops the past.
    """

    keep_sink: bool = True
    recache: Recache = "joint"
    blend: int = 1
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if not isinstance(self.keep_sink, bool):
            raise ValueError(f"keep_sink {self.keep_sink!r} is neither True nor False")
        if self.recache not in get_args(Recache):
            raise ValueError(f"recache {self.recache!r} is unknown; choose from {', '.join(get_args(Recache))}")

        if isinstance(self.blend, bool) or not isinstance(self.blend, int) or self.blend < 1:
            raise ValueError(f"a blend takes a whole number of blocks, at least 1, not {self.blend!r}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; choose from {', '.join(get_args(Interpolation))}")
        if self.blend > 1 and self.recache == "clear":
            raise ValueError("a blend keeps the past; recache 'clear' drops it")

    @classmethod
    def named(cls, words: str, usual: Transition | None = None) -> Transition:
        """The transition of a name: `cut`, `switch`, `blend:N` over N blocks, or `blend:N:slerp`.

        `usual`: the model's own, whose sink and recache it keeps. Raises ValueError for another name.
        """
        usual = usual or cls()
        name, *rest = words.split(":") if isinstance(words, str) else [""]
        if (name, rest) == ("cut", []):
            return replace(usual, recache="clear", blend=1)
        if (name, rest) == ("switch", []):
            return replace(usual, blend=1)
        if name == "blend" and rest and rest[0].isdecimal() and len(rest) <= 2:
            return replace(usual, blend=int(rest[0]), interpolation=rest[1] if len(rest) == 2 else "linear")  # type: ignore[arg-type]
        raise ValueError(f"transition {words!r} is unknown; choose cut, switch, blend:N (over N blocks) or blend:N:slerp")

    def with_sink(self, keep_sink: bool | None) -> Transition:
        """The same with this `keep_sink`; None: the same."""
        return self if keep_sink is None else replace(self, keep_sink=keep_sink)
