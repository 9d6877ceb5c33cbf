"""LongLive: real-time interactive long video generation.

The names below are loaded when they are first used, so that `import longlive` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlive.generation.cues import Cue, PromptQueue, PromptSchedule
    from longlive.generation.mixes import mix
    from longlive.generation.pipeline import LongLivePipeline
    from longlive.generation.session import Session
    from longlive.generation.timeline import Timeline
    from longlive.generation.transition import Transition
    from longlive.models.wan import WanTransformer

__version__ = "0.1.0"
__all__ = ["Cue", "LongLivePipeline", "PromptQueue", "PromptSchedule", "Session", "Timeline", "Transition", "WanTransformer", "mix"]
_HOMES = {
    "Cue": "generation.cues",
    "LongLivePipeline": "generation.pipeline",
    "PromptQueue": "generation.cues",
    "PromptSchedule": "generation.cues",
    "Session": "generation.session",
    "Timeline": "generation.timeline",
    "Transition": "generation.transition",
    "WanTransformer": "models.wan",
    "mix": "generation.mixes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longlive' has no attribute {name!r}")
    return getattr(import_module(f"longlive.{_HOMES[name]}"), name)
