"""What a prompt switch does with the video's past."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

Recache = Literal["joint", "causal", "none", "clear"]


@dataclass(frozen=True)
class Transition:
    """What a prompt switch does with the sink and with the recent frames.

    Attributes:
        keep_sink: the sink keeps the keys and values written under the first prompt (`global_sink` of the released configurations);
            otherwise all visible frames are re-encoded, and the first of them are the new sink: the video's first frames leave the
            cache. While a video is no longer than the window everything is re-encoded, the sink too, whatever `keep_sink` is.
        recache: "joint" passes the visible frames through the model again, together, under the new prompt (KV-recache, the paper's);
            "causal" does so block by block in order. For comparison: "none" keeps the old keys and values and changes only the
            text; "clear" drops the past. These two do not use `keep_sink`.

    Raises:
        ValueError: for an unknown `recache`, or a `keep_sink` that is no truth value.
    """

    keep_sink: bool = True
    recache: Recache = "joint"

    def __post_init__(self) -> None:
        if not isinstance(self.keep_sink, bool):
            raise ValueError(f"keep_sink {self.keep_sink!r} is neither True nor False")
        if self.recache not in get_args(Recache):
            raise ValueError(f"recache {self.recache!r} is unknown; choose from {', '.join(get_args(Recache))}")

    def with_sink(self, keep_sink: bool | None) -> Transition:
        """The same with this `keep_sink`; None: the same."""
        return self if keep_sink is None else replace(self, keep_sink=keep_sink)
