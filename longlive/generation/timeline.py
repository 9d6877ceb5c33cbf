"""The record of a session's video, from which it can be made again. Knows nothing about models."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlive import files
from longlive.generation.cues import Cue, PromptSchedule
from longlive.generation.transition import Recache, Transition

VERSION = 2


def _read_cue(cue: dict[str, Any], recache: Recache, version: int) -> Cue:
    if version == 1:
        keep_sink = cue["keep_sink"]
        return Cue(int(cue["frame"]), str(cue["prompt"]), None if keep_sink is None else Transition(keep_sink, recache))
    transition = cue["transition"]
    return Cue(int(cue["latent_frame"]), str(cue["prompt"]), None if transition is None else Transition(**transition))


@dataclass
class Timeline:
    """A growing video: the `seed` of its noise, the `settings` it is made with, and the prompts that took effect, with their latent frames.

    `num_latent_frames`: how many have been made. With the same model, settings and seed it gives the same video, bit for bit on a CPU.
    """

    seed: int
    settings: dict[str, Any]
    cues: list[Cue] = field(default_factory=list)
    num_latent_frames: int = 0

    @property
    def schedule(self) -> PromptSchedule:
        """The prompts as a plan. Raises ValueError when there are none."""
        return PromptSchedule(tuple(self.cues))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Any, *, where: str) -> Timeline:
        """The inverse of `to_json`, which also reads older versions. Raises ValueError, naming `where`, for anything else."""
        try:
            version = content["version"]
            if version not in (1, VERSION):
                raise ValueError(f"it is of version {version}, and this program reads versions 1 and {VERSION}")
            settings = {"recache": "joint", **content["settings"]}  # the oldest files do not say it: there was no other
            cues = [_read_cue(cue, settings["recache"], version) for cue in content["cues"]]
            length = content["num_frames" if version == 1 else "num_latent_frames"]
            timeline = cls(int(content["seed"]), settings, cues, int(length))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where} is not a timeline: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f"{where} is not a timeline: {error}") from error
        if not 0 <= timeline.seed < 2**63:
            raise ValueError(f"{where} is not a timeline: its seed {timeline.seed} is not one from 0 to 2^63 - 1")
        if timeline.num_latent_frames <= 0:
            raise ValueError(f"{where}: the session ended before its first block; there is nothing to make again")
        timeline.schedule.validate(timeline.num_latent_frames)
        return timeline

    def save(self, path: str | Path) -> None:
        """Write a JSON file, atomically."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read a JSON file. Raises ValueError when it is missing or not a timeline."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"there is no timeline {path}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a timeline: {error}") from error
        return cls.from_json(content, where=str(path))
