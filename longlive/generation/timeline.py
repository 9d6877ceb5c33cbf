"""What a live session was: enough to make the same video again. Knows nothing about models."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlive.generation.cues import Cue, PromptSchedule

VERSION = 1


@dataclass
class Timeline:
    """A video that grows: `seed` of its noise, the `settings` it is made with, and the prompts that took effect, each with its frame.

    `num_latent_frames`: latent frames made so far. The same model, settings and seed give the same video from it, bit for bit on a CPU.
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
        """Plain values, for `json.dumps`."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Any, *, where: str) -> Timeline:
        """The inverse of `to_json`. Raises ValueError for anything else, naming `where` it came from."""
        try:
            version = content["version"]
            if version != VERSION:
                raise ValueError(f"{where} is a timeline of version {version}; this program reads version {VERSION}")
            cues = [Cue(int(cue["frame"]), str(cue["prompt"]), cue["keep_sink"]) for cue in content["cues"]]
            settings = {"recache": "joint", **content["settings"]}  # older files do not say it, since there was no other
            timeline = cls(int(content["seed"]), settings, cues, int(content["num_latent_frames"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is no timeline: {type(error).__name__} {error}") from error
        if timeline.num_latent_frames <= 0:
            raise ValueError(f"{where}: the session ended before its first block; there is nothing to make again")
        timeline.schedule.validate(timeline.num_latent_frames)
        return timeline

    def save(self, path: str | Path) -> None:
        """Writes a file that is whole or, if that fails, as it was."""
        partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        partial.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Raises ValueError when the file is missing or no timeline."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"there is no timeline {path}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no timeline: {error}") from error
        return cls.from_json(content, where=str(path))
