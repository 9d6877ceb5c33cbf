"""A folder of videos to be measured, and the record of how they were made.

    prepared.json     what was asked for: suite, prompts, seeds, model and its weights; and the software and hardware that made it
    videos/           {name}-{i}.mp4 and nothing else: VBench lists this folder
    records/          one JSON file per video, written last: a video without a record is made again
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
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av

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
    """A prompt and the image with which it begins."""

    image: int
    prompt: str


class PlannedVideo(NamedTuple):
    """A video of the list; `name` without extension, `seed` None when another program made it."""

    name: str
    entry: Entry
    seed: int | None
    num_latent_frames: int
    num_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepared.json` says.

    Attributes:
        suite: a key of `SUITES`.
        prompt_list: its source, its digest, and which part of it is taken.
        rewritten: where the longer prompts come from that the videos are generated from; None: the prompts are used as they are.
        seed: of the first video; video i of entry e has seed + 10,000 e + i. None: another program made the videos.
        num_latent_frames: per video; None: as the scripts say.
        fps: images per second.
        block: latent frames per block.
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
        return Timing(self.fps, block=self.block)

    @property
    def videos(self) -> list[PlannedVideo]:
        """All videos, in the order of the list."""
        found = []
        for entry in self.entries:
            frames = self.num_latent_frames or self.timing.latent_frames_for(entry.script.seconds or 0.0)
            for sample in range(entry.samples):
                seed = None if self.seed is None else self.seed + SEED_STEP * entry.index + sample
                found.append(PlannedVideo(f"{entry.name}-{sample}", entry, seed, frames, self.timing.num_frames(frames)))
        return found

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.videos]

    def schedule_of(self, entry: Entry) -> PromptSchedule:
        """When each prompt is in force in the videos of an entry."""
        return entry.script.schedule(self.timing)

    def prompt_starts(self, entry: Entry) -> list[PromptStart]:
        """The images with which the prompts of an entry's videos begin."""
        cues = self.schedule_of(entry).cues
        return [PromptStart(self.timing.num_frames(cue.latent_frame) if cue.latent_frame else 0, cue.prompt) for cue in cues]

    def content(self) -> dict[str, Any]:
        """As JSON stores it."""
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


def load(folder: Path) -> Prepared:
    """What `folder/prepared.json` says. Raises ValueError when it is missing or cannot be read."""
    path = folder / "prepared.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path} was written by another version of this program; prepare the videos again")
        content["entries"] = tuple(_entry(one) for one in content["entries"])
        return Prepared(**content)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no prepared videos ({path.name} is missing); run `prepare` first") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _entry(content: dict[str, Any]) -> Entry:
    where, prompts, durations = (content["script"][name] for name in ("where", "prompts", "durations"))
    script = Script(where, tuple(prompts), durations=None if durations is None else tuple(durations))
    return Entry(**{**content, "script": script, "dimensions": tuple(content["dimensions"])})


def claim(folder: Path, wanted: Prepared) -> None:
    """Write `prepared.json` of a new folder, or make sure that an existing one was prepared with the same request.

    Raises:
        ValueError: when something else was asked for before, with what differs.
    """
    path, made_with = folder / "prepared.json", list(wanted.made_with)
    if path.exists():
        before, now = load(folder).content(), wanted.content()
        for one in (before, now):  # the same weights may be stored elsewhere, or have been fetched again: their digests decide
            one["weights"] = sorted(file["sha256"] for file in one["weights"])
            if one["weights"]:
                one["model"] = {name: value for name, value in one["model"].items() if name not in PLACES}
        names = [name for name in now if name not in MAY_DIFFER and before[name] != now[name]]
        if different := "; ".join(_difference(name, before[name], now[name]) for name in names):
            raise ValueError(f"{folder} was prepared with {different}. Ask for the same, or choose another --output")
        made_with = before["made_with"] + [one for one in made_with if one not in before["made_with"]]
    write_json(path, dataclasses.replace(wanted, made_with=made_with).content())


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in keys)
    if isinstance(before, list) and isinstance(now, list):
        first = next((i for i, (one, two) in enumerate(zip(before, now)) if one != two), min(len(before), len(now)))
        count = f"{len(before)} then, {len(now)} now" if len(before) != len(now) else f"{len(now)} of them"
        return f"other {name} ({count}; the first that differs is number {first + 1})"
    texts = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return f"{name} {', this is '.join(text if len(text) <= 60 else f'{text[:59]}…' for text in texts)}"


class Size(NamedTuple):
    """Of a video file: number of images, and their height and width in pixels."""

    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.images} images of {self.height}x{self.width}"


def size_of(path: Path) -> Size:
    """Read a video to its end. Raises ValueError when that fails."""
    count, shape = 0, (0, 0)
    try:
        for image in video.images_of(path):
            count, shape = count + 1, image.shape[:2]
    except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not count:
        raise ValueError(f"{path} cannot be read as a video: it holds no image")
    return Size(count, *shape)


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


def finish(folder: Path, prepared: Prepared, planned: PlannedVideo, partial: Path, about: dict[str, Any], *, images: int) -> None:
    """Move a video into `videos/`, after reading it to its end, and write its record.

    Raises:
        ValueError: when it cannot be read or does not have `images` images.
    """
    size = size_of(partial)
    if size.images != images:
        raise ValueError(f"{partial} holds {size.images} images; {images} were wanted")
    path = video_path(folder, planned.name)
    content = {
        "video": path.name,
        "prompt": planned.entry.name,
        "prompts": [start._asdict() for start in prepared.prompt_starts(planned.entry)],
        "seed": planned.seed,
        **about,
        **size._asdict(),
        "bytes": partial.stat().st_size,
        "sha256": file_digest(partial),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, path)
    write_json(record_path(folder, planned.name), content)


def check(folder: Path, prepared: Prepared, *, counted: Collection[str] | None = None) -> list[str]:
    """What is wrong with the videos of a folder, one sentence each; a video that differs from its record is read to its end.

    `counted`: names of the videos that must be there and readable; None: all.
    """
    there = {path.name for path in (folder / "videos").glob("*")}
    missing, unreadable = [], []
    sizes: list[tuple[int, Size]] = []  # of the readable videos: how many images were wanted, and what is there
    for planned in prepared.videos:
        needed, file = counted is None or planned.name in counted, f"{planned.name}.mp4"
        if file not in there:
            missing += [file] * needed
            continue
        record = read_record(folder, planned.name)
        try:
            size = size_of(video_path(folder, planned.name)) if record is None else Size(*(record[key] for key in Size._fields))
            sizes.append((planned.num_images, size))
        except ValueError:
            unreadable += [file] * needed
    strangers = sorted(there - {f"{name}.mp4" for name in prepared.names})
    problems = []
    if missing:
        problems.append(f"{len(missing)} videos are missing: {_some(missing)}")
    if strangers:
        problems.append(f"{len(strangers)} files have names that no prompt of the list has: {_some(strangers)}")
        near = [(one, difflib.get_close_matches(one, missing, 1, 0.8)) for one in strangers[:3]]
        problems += [f"  perhaps {one} should be {match[0]}" for one, match in near if match]
    if unreadable:
        problems.append(f"{len(unreadable)} videos cannot be read: {_some(unreadable)}")
    lengths = {(wanted, size.images) for wanted, size in sizes}
    if len({size[1:] for _, size in sizes}) > 1 or len(lengths) > len({wanted for wanted, _ in lengths}):
        mixture = ", ".join(f"{count} with {size}" for size, count in Counter(size for _, size in sizes).items())
        problems.append(f"the videos are not of one size and length ({mixture}); averages over such a mixture are meaningless")
    return problems


def check_or_raise(folder: Path, prepared: Prepared, *, counted: Collection[str] | None = None) -> None:
    """Raises ValueError with everything that is wrong with the videos of a folder; see `check`."""
    if problems := check(folder, prepared, counted=counted):
        raise ValueError("\n".join([f"{folder / 'videos'}:", *problems, "`prepare` makes missing and broken videos; remove other files"]))


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def digest_of_video(folder: Path, name: str) -> str:
    """SHA-256 of a video's file: from its record where that still holds, or where the file was deleted to save space."""
    path = video_path(folder, name)
    record = read_record(folder, name) if path.exists() else _record(folder, name)
    return file_digest(path) if record is None else record["sha256"]


def digest_of_videos(folder: Path, names: Iterable[str]) -> str:
    """One digest of many videos, which tells whether something was measured on them. Raises ValueError when one is missing."""
    try:
        return digest_of({name: digest_of_video(folder, name) for name in names})
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing") from error


def remove_if_empty(folder: Path) -> None:
    """Remove a folder for unfinished files when nothing is left in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        with contextlib.suppress(OSError):  # another process was faster
            folder.rmdir()
