"""Reads files of prompts: the prompts of each video, and where each of them begins. Knows nothing about models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlive.generation.cues import PromptSchedule, check_prompt
from longlive.generation.dimensions import Timing
from longlive.generation.transition import Transition


@dataclass(frozen=True)
class Script:
    """The prompts of one video, with the latent frames at which the second, third … begin, or the seconds that each lasts.

    `transitions`: one for each prompt, by name (see `Transition.named`); None: what the model does by default.
    """

    where: str
    prompts: tuple[str, ...]
    switch_latent_frames: tuple[int, ...] | None = None
    durations: tuple[float, ...] | None = None
    transitions: tuple[str | None, ...] | None = None

    @property
    def seconds(self) -> float | None:
        """The length of the video, when the script says it."""
        return sum(self.durations) if self.durations else None

    def schedule(self, timing: Timing, usual: Transition | None = None) -> PromptSchedule:
        """The schedule for a model with these rates, and with this transition by default. Raises ValueError when a prompt has no place."""
        names = self.transitions or (None,) * len(self.prompts)
        transitions = [None if name is None else Transition.named(name, usual) for name in names]
        if self.durations is None:
            return PromptSchedule.at_latent_frames(self.prompts, self.switch_latent_frames or (), transition=transitions)
        return PromptSchedule.from_seconds(zip(self.prompts, self.durations), timing, transitions=transitions)


def read_prompt_text(path: Path) -> str:
    """The text of a .txt or .jsonl file. Raises ValueError when it is another kind of file, cannot be read, or holds nothing."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are read from .txt (one per line) or .jsonl files")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"the prompt file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} contains no prompt")
    return text


def read_scripts(path: str | Path, *, switch_latent_frames: Sequence[int] | None = None, one_video: bool = False) -> list[Script]:
    """The scripts of a file: .txt with one prompt per line, each for a video (with `one_video` all for one video), or .jsonl with one video
    per line:

    `{"prompts": ["…", "…"], "switch_frame_indices": [40]}` or `{"prompts": [{"text": "…", "seconds": 10}, …]}`. How each prompt but the
    first begins may be said, by name: `"transitions": ["cut"]` beside the indices, `"transition": "blend:4"` beside the seconds.

    `switch_latent_frames`: latent frames at which prompts begin, for scripts that do not say it. Raises ValueError with file and line.
    """
    path = Path(path)
    text = read_prompt_text(path)
    lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_read_line(where, line, switch_latent_frames) for where, line in lines]
    if one_video:
        return [_check_script(str(path), [line for _, line in lines], switch_latent_frames)]
    return [_check_script(where, [line], None) for where, line in lines]


def _read_line(where: str, line: str, switch_latent_frames: Sequence[int] | None) -> Script:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    _check_keys(where, content, {"prompts": True, "switch_frame_indices": False, "transitions": False})
    prompts = content["prompts"]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"{where}: prompts is a list of at least one prompt; this is {json.dumps(prompts)[:60]}")
    if all(isinstance(prompt, str) for prompt in prompts):
        names = content.get("transitions")
        if names is not None and (not isinstance(names, list) or len(names) != len(prompts) - 1):
            raise ValueError(f"{where}: {len(prompts)} prompts need a list of {len(prompts) - 1} transitions, not {json.dumps(names)[:60]}")
        script = _check_script(where, prompts, content.get("switch_frame_indices", switch_latent_frames))
        return _with_transitions(script, None if names is None else [None, *names])
    for prompt in prompts:
        _check_keys(where, prompt, {"text": True, "seconds": True, "transition": False})
        seconds = prompt["seconds"]
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            raise ValueError(f"{where}: seconds {json.dumps(seconds)} is not a duration above 0")
    if "switch_frame_indices" in content:
        raise ValueError(f"{where}: both seconds and switch_frame_indices are given; choose one")
    if "transitions" in content:
        raise ValueError(f"{where}: transitions go with switch_frame_indices; beside seconds each prompt says its transition")
    script = _check_script(where, [prompt["text"] for prompt in prompts], range(1, len(prompts)))
    script = Script(where, script.prompts, durations=tuple(float(prompt["seconds"]) for prompt in prompts))
    names = [prompt.get("transition") for prompt in prompts]
    if names[0] is not None:
        raise ValueError(f"{where}: the first prompt has a transition, but there is nothing before it")
    return _with_transitions(script, names)


def _with_transitions(script: Script, names: Sequence[str | None] | None) -> Script:
    if names is None or not any(name is not None for name in names):
        return script
    for name in names:
        if name is not None:
            try:
                Transition.named(name)
            except ValueError as error:
                raise ValueError(f"{script.where}: {error}") from error
    return replace(script, transitions=tuple(names))


def _check_keys(where: str, content: Any, names: dict[str, bool]) -> None:
    """Raises ValueError unless `content` is an object with these keys only, the required ones (True) among them."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(names)}; this is {json.dumps(content)[:60]}")
    for key in content:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {difflib.get_close_matches(key, names, 1, 0.0)[0]!r}?")
    for name, required in names.items():
        if required and name not in content:
            raise ValueError(f"{where}: {name} is missing")


def _check_script(where: str, prompts: Sequence[Any], switch_latent_frames: Any) -> Script:
    for number, prompt in enumerate(prompts, 1):
        what = f"{where}: prompt {number} of {len(prompts)}"
        if not isinstance(prompt, str):
            raise ValueError(f"{what} is not text: {json.dumps(prompt)[:60]}")
        check_prompt(prompt, what=what)
    if len(prompts) == 1:
        switch_latent_frames = None
    elif switch_latent_frames is None:
        raise ValueError(f"{where}: {len(prompts)} prompts, but not where they begin; give {len(prompts) - 1} switch_frame_indices")
    elif (
        isinstance(switch_latent_frames, str)
        or not isinstance(switch_latent_frames, Sequence)
        or not all(type(frame) is int for frame in switch_latent_frames)
    ):
        raise ValueError(f"{where}: switch_frame_indices is a list of whole numbers; this is {switch_latent_frames}")
    elif len(switch_latent_frames) != len(prompts) - 1:
        raise ValueError(
            f"{where}: {len(prompts)} prompts need {len(prompts) - 1} switch_frame_indices; there are {len(switch_latent_frames)}"
        )
    script = Script(where, tuple(prompts), None if switch_latent_frames is None else tuple(switch_latent_frames))
    try:
        script.schedule(Timing(block=1))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return script
