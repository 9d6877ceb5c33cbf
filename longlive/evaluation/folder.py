"""A folder of videos that are to be measured, and everything that says how they came to be.

    prepared.json     what was asked for: suite, prompts, seeds, model and its weights, and what it was made with
    videos/           {name}-{i}.mp4 and nothing else: VBench lists this folder
    records/          a JSON file a video, written last: a video without one is made again
    results/          what was measured

Knows nothing about how videos are made or measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av

from longlive import video
from longlive.evaluation.suites import SEEDS_APART, Entry, names_of
from longlive.files import digest_of, file_digest
from longlive.generation.cues import PromptSchedule
from longlive.generation.dimensions import Timing
from longlive.generation.prompt_files import Script

FORMAT = 1
MAY_DIFFER = ("settings", "made_with")  # between two runs into one folder
PLACES = ("model", "checkpoint", "lora")  # where weights lie


class Size(NamedTuple):
    """Of a video file: images, and their size in pixels."""

    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.images} images of {self.height}x{self.width}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepared.json` says.

    Attributes:
        suite: a name of `SUITES`.
        prompt_list: source, digest, and which part of it is taken.
        rewritten: how the longer prompts came to be that videos are generated from; None: from the prompts themselves.
        seed: of the first video; video i of entry e has seed + 10,000 e + i. None: the videos were made elsewhere.
        num_latent_frames: latent frames a video; None: as long as the scripts say.
        fps: images a second.
        block: latent frames a block.
        model: everything that decides what a video of given prompts and seed shows.
        weights: digests of the files of the model.
        entries: the prompts.
        settings: all settings of the run.
        made_with: versions, commit and hardware, one for every run that found others.
    """

    suite: str
    prompt_list: dict[str, Any]
    rewritten: dict[str, Any] | None
    seed: int | None
    num_latent_frames: int | None
    fps: float
    block: int
    model: dict[str, Any]
    weights: list[dict[str, Any]]
    entries: tuple[Entry, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    made_with: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of all videos, without ending."""
        return names_of(self.entries)

    def seed_of(self, entry: Entry, sample: int) -> int | None:
        return None if self.seed is None else self.seed + SEEDS_APART * entry.index + sample

    @property
    def timing(self) -> Timing:
        return Timing(self.fps, block=self.block)

    def frames_of(self, entry: Entry) -> int:
        """Latent frames of the videos of an entry."""
        return self.num_latent_frames or self.timing.latent_frames_for(entry.script.seconds or 0.0)

    def schedule_of(self, entry: Entry) -> PromptSchedule:
        """Which prompt is in force when, in the videos of an entry."""
        return entry.script.schedule(self.timing)

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


def load(folder: Path) -> Prepared:
    """What `folder/prepared.json` says. Raises ValueError when it is not there or cannot be read."""
    path = folder / "prepared.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path} was written by another version of this program; prepare the videos anew")
        content["entries"] = tuple(_entry(one) for one in content["entries"])
        return Prepared(**content)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no prepared videos ({path.name} is not there); run `prepare` first") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _entry(content: dict[str, Any]) -> Entry:
    script = content.pop("script")
    durations = script["durations"]
    prompts = Script(script["where"], tuple(script["prompts"]), durations=None if durations is None else tuple(durations))
    return Entry(**{**content, "script": prompts, "dimensions": tuple(content["dimensions"])})


def settle(folder: Path, wanted: Prepared) -> None:
    """Make `folder` that of `wanted`: new, or to be gone on with.

    Raises:
        ValueError: when something else was asked for before, with what differs.
    """
    path = folder / "prepared.json"
    made_with = list(wanted.made_with)
    if path.exists():
        before, now = load(folder).content(), wanted.content()
        for one in (before, now):  # the same weights may lie elsewhere, or have been fetched again: their digests decide
            one["weights"] = sorted(file["sha256"] for file in one["weights"])
            if one["weights"]:
                one["model"] = {name: value for name, value in one["model"].items() if name not in PLACES}
        if different := [name for name in now if name not in MAY_DIFFER and before.get(name) != now[name]]:
            raise ValueError(
                f"{folder} was prepared with {'; '.join(_difference(name, before.get(name), now[name]) for name in different)}. "
                "Ask for the same, or choose another --output"
            )
        known = before["made_with"]
        made_with = known + [one for one in made_with if one not in known]
    write_json(path, dataclasses.replace(wanted, made_with=made_with).content())


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in keys)
    if isinstance(before, list) and isinstance(now, list):
        parted = next((i for i, (one, two) in enumerate(zip(before, now)) if one != two), min(len(before), len(now)))
        count = f"{len(before)} then, {len(now)} now" if len(before) != len(now) else f"{len(now)} of them"
        return f"other {name} ({count}; the first that differs is number {parted + 1})"
    return f"{name} {_short(before)}, this is {_short(now)}"


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def write_json(path: Path, content: Any) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Raises ValueError, which names the file, when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it, and what it belongs to is made again") from error


def size_of(path: Path) -> Size:
    """Read a video to its end. Raises ValueError when that cannot be done."""
    count, shape = 0, (0, 0)
    try:
        for image in video.images_of(path):
            count, shape = count + 1, image.shape[:2]
    except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not count:
        raise ValueError(f"{path} cannot be read as a video: it holds no image")
    return Size(count, *shape)


def record_path(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.json"


def video_path(folder: Path, name: str) -> Path:
    return folder / "videos" / f"{name}.mp4"


def _record(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        record = json.loads(record_path(folder, name).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and {"bytes", "sha256"} <= record.keys() else None


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a finished video; None when it is not finished, or its file is not the one that was finished."""
    path, record = video_path(folder, name), _record(folder, name)
    return record if record is not None and path.exists() and path.stat().st_size == record["bytes"] else None


def finish(folder: Path, name: str, partial: Path, *, images: int, about: dict[str, Any]) -> None:
    """Take a video that is written into `videos/`, after reading it to its end, and note that it is there.

    Raises:
        ValueError: when it cannot be read or has not `images` images.
    """
    size = size_of(partial)
    if size.images != images:
        raise ValueError(f"{partial} holds {size.images} images; {images} were wanted")
    digest, count = file_digest(partial), partial.stat().st_size
    path = video_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, path)
    write_json(record_path(folder, name), {"video": path.name, **about, **size._asdict(), "bytes": count, "sha256": digest})


class Problems(NamedTuple):
    """What is wrong with the videos of a folder, by name of the file; `mixed`: how often each size is there when it is not one."""

    missing: list[str]
    strangers: list[str]
    unreadable: list[str]
    mixed: dict[str, int]

    @property
    def any(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        lines = []
        if self.missing:
            lines.append(f"{len(self.missing)} videos are missing: {_some(self.missing)}")
        if self.strangers:
            lines.append(f"{len(self.strangers)} files have names that no prompt of the list has: {_some(self.strangers)}")
            lines += [f"  perhaps {one} should be {near}" for one, near in _nearest(self.strangers[:3], self.missing)]
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} videos cannot be read: {_some(self.unreadable)}")
        if self.mixed:
            sizes = ", ".join(f"{count} with {size}" for size, count in self.mixed.items())
            lines.append(f"the videos are not of one size and length ({sizes}); numbers of such a mixture say nothing")
        return "\n".join(lines)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _nearest(strangers: Iterable[str], missing: Sequence[str]) -> list[tuple[str, str]]:
    found = [(one, difflib.get_close_matches(one, missing, 1, 0.8)) for one in strangers]
    return [(one, near[0]) for one, near in found if near]


def check(folder: Path, prepared: Prepared) -> Problems:
    """Look through the videos of a folder; those that are no longer what their record says are read to their end."""
    there = {path.name for path in (folder / "videos").iterdir()} if (folder / "videos").is_dir() else set()
    missing, unreadable, sizes = [], [], Counter[tuple[int, Size]]()
    for entry in prepared.entries:
        wanted = prepared.timing.num_frames(prepared.frames_of(entry))
        for name in names_of([entry]):
            if f"{name}.mp4" not in there:
                missing.append(f"{name}.mp4")
                continue
            record = read_record(folder, name)
            try:
                size = size_of(video_path(folder, name)) if record is None else Size(*(record[key] for key in Size._fields))
            except ValueError:
                unreadable.append(f"{name}.mp4")
                continue
            sizes[wanted, size] += 1
    strangers = sorted(there - {f"{name}.mp4" for name in prepared.names})
    shapes = {size[1:] for _, size in sizes}
    lengths = {(wanted, size.images) for wanted, size in sizes}
    even = len(shapes) <= 1 and len(lengths) == len({wanted for wanted, _ in lengths})
    mixed = Counter[str]()
    for (_, size), count in sizes.items():
        mixed[str(size)] += count
    return Problems(missing, strangers, unreadable, {} if even else dict(mixed))


def digest_of_video(folder: Path, name: str) -> str:
    """SHA-256 of a video's file; from its record where that is still true, or where the file was removed to make room."""
    path = video_path(folder, name)
    record = read_record(folder, name) if path.exists() else _record(folder, name)
    return file_digest(path) if record is None else record["sha256"]


def digest_of_videos(folder: Path, names: Iterable[str]) -> str:
    """By which the videos of today are told from those that something was measured on. Raises ValueError when one is missing."""
    try:
        return digest_of({name: digest_of_video(folder, name) for name in names})
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing") from error


def remove_if_empty(folder: Path) -> None:
    """Of a folder for what is half done, when nothing is left in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        with contextlib.suppress(OSError):  # another process came before
            folder.rmdir()
