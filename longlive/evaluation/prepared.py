"""A prepared folder: the videos to be measured, and the record of how they were generated.

prepared.json     the request (suite, prompts, seeds, model and its weights), and the software and hardware that it ran on
videos/           {name}-{i}.mp4 and nothing else: VBench lists this folder
records/          one JSON file per video, written last: a video without a record is generated again
results/          the measurements
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longlive import video
from longlive.evaluation.suites import SEED_STEP, Entry, Suite, find_suite
from longlive.files import digest_of, file_digest, read_json_if_whole, write_json
from longlive.generation.cues import PromptSchedule
from longlive.generation.dimensions import Timing
from longlive.generation.prompt_files import Script

FORMAT = 2
MAY_DIFFER = ("settings", "made_with")  # between two runs into one folder
PLACES = ("model", "checkpoint", "lora")  # where weights are stored


class PromptStart(NamedTuple):
    """A prompt and the frame with which it begins; `image` is its name in our JSON files."""

    image: int
    prompt: str


class PlannedVideo(NamedTuple):
    """A video of the list; `name` without extension, `seed` None when another program generated it."""

    name: str
    entry: Entry
    seed: int | None
    num_latent_frames: int
    num_frames: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The contents of `prepared.json`.

    Attributes:
        suite: a key of `SUITES`.
        prompt_list: its source, its digest, and which part of it is taken.
        rewritten: source of the longer prompts that the videos are generated from; None: the prompts are used as they are.
        seed: of the first video; video i of entry e has seed + 10,000 e + i. None: another program generated the videos.
        num_latent_frames: per video; None: the scripts decide.
        fps: frames per second.
        block: latent frames per block.
        temporal_stride: frames per latent frame; folders of earlier versions do not store it.
        model: everything that decides what a video of given prompts and seed shows.
        weights: name, bytes and digest of every file of the model's weights.
        entries: the prompts.
        settings: all settings of the run.
        made_with: versions, commit and hardware of every run that differed in them.
    """

    suite: str
    prompt_list: dict[str, Any]
    rewritten: Mapping[str, Any] | None = None
    seed: int | None = None
    num_latent_frames: int | None
    fps: float
    block: int
    temporal_stride: int = 4
    model: dict[str, Any]
    weights: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    entries: tuple[Entry, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    made_with: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def benchmark(self) -> Suite:
        return find_suite(self.suite)

    @property
    def timing(self) -> Timing:
        return Timing(self.fps, self.temporal_stride, self.block)

    @property
    def videos(self) -> list[PlannedVideo]:
        """All videos, in the order of the list."""
        planned = []
        for entry in self.entries:
            frames = self.num_latent_frames or self.timing.latent_frames_for(entry.script.seconds or 0.0)
            for sample in range(entry.samples):
                seed = None if self.seed is None else self.seed + SEED_STEP * entry.index + sample
                planned.append(PlannedVideo(f"{entry.name}-{sample}", entry, seed, frames, self.timing.num_frames(frames)))
        return planned

    @property
    def names(self) -> list[str]:
        return [planned.name for planned in self.videos]

    def schedule_of(self, entry: Entry) -> PromptSchedule:
        """When each prompt is active in the videos of an entry."""
        return entry.script.schedule(self.timing)

    def prompt_starts(self, entry: Entry) -> list[PromptStart]:
        """The frames with which the prompts of an entry's videos begin."""
        cues = self.schedule_of(entry).cues
        return [PromptStart(self.timing.first_frame(cue.latent_frame), cue.prompt) for cue in cues]

    def content(self) -> dict[str, Any]:
        """As JSON stores it."""
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


def load_prepared(folder: Path) -> Prepared:
    """Read `folder/prepared.json`. Raises ValueError when it is missing or cannot be read."""
    path = folder / "prepared.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path} was written by another version of this program; prepare the videos again")
        content["entries"] = tuple(map(_entry, content["entries"]))
        return Prepared(**content)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} contains no prepared videos ({path.name} is missing); run `prepare` first") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _entry(content: dict[str, Any]) -> Entry:
    where, prompts, durations = (content["script"][name] for name in ("where", "prompts", "durations"))
    script = Script(where, tuple(prompts), durations=None if durations is None else tuple(durations))
    return Entry(**{**content, "script": script, "dimensions": tuple(content["dimensions"])})


def claim(folder: Path, wanted: Prepared) -> None:
    """Write `prepared.json` of a new folder, or check that an existing one was prepared with the same request.

    Raises:
        ValueError: when the request differs, and how.
    """
    path, made_with = folder / "prepared.json", list(wanted.made_with)
    if path.exists():
        before, now = load_prepared(folder).content(), wanted.content()
        for content in (before, now):  # the same weights may be stored elsewhere, or have been fetched again: their digests decide
            content["weights"] = sorted(file["sha256"] for file in content["weights"])
            if content["weights"]:
                content["model"] = {name: value for name, value in content["model"].items() if name not in PLACES}
        names = [name for name in now if name not in MAY_DIFFER and before[name] != now[name]]
        if different := "; ".join(_difference(name, before[name], now[name]) for name in names):
            raise ValueError(f"{folder} was prepared with {different}. Ask for the same, or choose another --output")
        made_with = before["made_with"] + [run for run in made_with if run not in before["made_with"]]
    write_json(path, dataclasses.replace(wanted, made_with=made_with).content())


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in keys)
    if isinstance(before, list) and isinstance(now, list):
        first = next((i for i, (old, new) in enumerate(zip(before, now)) if old != new), min(len(before), len(now)))
        count = f"{len(before)} then, {len(now)} now" if len(before) != len(now) else f"{len(now)} of them"
        return f"other {name} ({count}; the first that differs is number {first + 1})"
    texts = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return f"{name} {', this is '.join(text if len(text) <= 60 else f'{text[:59]}…' for text in texts)}"


def video_path(folder: Path, name: str) -> Path:
    return folder / "videos" / f"{name}.mp4"


def record_path(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.json"


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    record = read_json_if_whole(record_path(folder, name))
    return record if isinstance(record, dict) and {"bytes", "sha256"} <= record.keys() else None


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished video; None when it is not finished, or the file is not the one that was finished."""
    path, record = video_path(folder, name), _record(folder, name)
    return record if record is not None and path.exists() and path.stat().st_size == record["bytes"] else None


def finish_video(folder: Path, prepared: Prepared, planned: PlannedVideo, partial: Path, about: dict[str, Any]) -> None:
    """Move a video into `videos/`, after reading it to its end, and write its record.

    Raises:
        ValueError: when it cannot be read, or has another length than planned (unless another program generated it).
    """
    info = video.read_through(partial)
    if planned.seed is not None and info.images != planned.num_frames:
        raise ValueError(f"{partial} has {info.images} frames instead of {planned.num_frames}")
    path = video_path(folder, planned.name)
    content = {
        "video": path.name,
        "prompt": planned.entry.name,
        "prompts": [start._asdict() for start in prepared.prompt_starts(planned.entry)],
        "seed": planned.seed,
        **about,
        "images": info.images,
        "height": info.height,
        "width": info.width,
        "bytes": partial.stat().st_size,
        "sha256": file_digest(partial),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, path)
    write_json(record_path(folder, planned.name), content)


def find_problems(folder: Path, prepared: Prepared, *, counted: Collection[str] | None = None) -> list[str]:
    """Problems of the videos of a folder, one sentence each; a video that differs from its record is read to its end.

    `counted`: names of the videos that must exist and be readable; None: all.
    """
    files = {path.name for path in (folder / "videos").glob("*")}
    missing, unreadable = [], []
    sizes: list[tuple[int, tuple[int, int, int]]] = []  # of the readable videos: planned frames; frames, height and width
    for planned in prepared.videos:
        needed, file = counted is None or planned.name in counted, f"{planned.name}.mp4"
        if file not in files:
            missing += [file] * needed
            continue
        record = read_record(folder, planned.name)
        try:
            info = video.read_through(video_path(folder, planned.name))._asdict() if record is None else record
            sizes.append((planned.num_frames, (info["images"], info["height"], info["width"])))
        except ValueError:
            unreadable += [file] * needed
    unexpected = sorted(files - {f"{name}.mp4" for name in prepared.names})
    problems = []
    if missing:
        problems.append(f"{len(missing)} videos are missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} files have names that no prompt of the list has: {_some(unexpected)}")
        near = [(file, difflib.get_close_matches(file, missing, 1, 0.8)) for file in unexpected[:3]]
        problems += [f"  perhaps {file} should be {match[0]}" for file, match in near if match]
    if unreadable:
        problems.append(f"{len(unreadable)} videos cannot be read: {_some(unreadable)}")
    lengths = {(planned_frames, size[0]) for planned_frames, size in sizes}
    if len({size[1:] for _, size in sizes}) > 1 or len(lengths) > len({planned_frames for planned_frames, _ in lengths}):
        counts = Counter(size for _, size in sizes).items()
        mixture = ", ".join(f"{count} with {frames} frames of {height}x{width}" for (frames, height, width), count in counts)
        problems.append(f"the videos are not of one size and length ({mixture}); averages over such a mixture are meaningless")
    return problems


def check_videos(folder: Path, prepared: Prepared, *, counted: Collection[str] | None = None) -> None:
    """Raises ValueError with everything that is wrong with the videos of a folder; see `find_problems`."""
    if problems := find_problems(folder, prepared, counted=counted):
        advice = "`prepare` generates missing and broken videos; remove other files"
        raise ValueError("\n".join([f"{folder / 'videos'}:", *problems, advice]))


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def digest_of_video(folder: Path, name: str) -> str:
    """SHA-256 of a video's file: from its record where that still holds, or where the file was deleted to save space."""
    path = video_path(folder, name)
    record = read_record(folder, name) if path.exists() else _record(folder, name)
    return file_digest(path) if record is None else record["sha256"]


def digest_of_videos(folder: Path, names: Iterable[str]) -> str:
    """One digest of many videos, to tell whether something was measured on them. Raises ValueError when one is missing."""
    try:
        return digest_of({name: digest_of_video(folder, name) for name in names})
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing") from error


def remove_if_empty(folder: Path) -> None:
    """Remove a folder for unfinished files when nothing is left in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        with contextlib.suppress(OSError):  # another process was faster
            folder.rmdir()
