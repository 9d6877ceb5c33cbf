"""A session's video on disk: the growing mp4, and a JSON file that says at first whose it is, and in the end that it is finished.

Knows nothing about configuration files, command lines or how a session makes images.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from tqdm import tqdm

from longlive import video
from longlive.files import digest_of, owned, read_json_if_whole, write_json
from longlive.generation.session import DecodedBlock
from longlive.provenance import made_with

log = logging.getLogger(__name__)


class Recording(NamedTuple):
    """A video that was written: its length, how fast it was made, and whether it is complete."""

    path: Path
    num_images: int
    fps: float
    timings: dict[str, float]
    peak_memory: int
    complete: bool

    def summary(self) -> str:
        timings = self.timings
        return (
            f"{self.path}: {self.num_images} frames, {self.num_images / self.fps:.1f} s; "
            f"{timings['images_per_second_dit']:.1f} frames/s transformer only, {timings['images_per_second']:.1f} end to end; "
            f"first frames after {timings['first_images']:.2f} s; peak memory {self.peak_memory / 2**30:.2f} GiB"
        )


def file_stem(prompt: str, seed: int, request: dict[str, Any]) -> str:
    """The name of a video's files without ending: first words of its prompt, seed, and a digest of the whole `request`."""
    return "-".join(filter(None, (first_words(prompt), f"seed{seed}", digest_of(request)[:8])))


def first_words(prompt: str, chars: int = 48) -> str:
    """The beginning of a prompt as part of a file name: letters and digits of any script, joined by hyphens."""
    kept = ("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", prompt.lower()))).split()
    while kept and len("-".join(kept)) > chars:  # at a word's end, where there is one
        kept = kept[:-1] if len(kept) > 1 else [kept[0][:chars]]
    return "-".join(kept)


def is_finished(path: Path, request: dict[str, Any]) -> bool:
    """Whether the video at `path` is complete and was made with the same `request` settings."""
    written = read_json_if_whole(path.with_suffix(".json")) or {}
    return path.is_file() and written.get("complete") is True and _is_of(written, request)


def check_free(path: Path, request: dict[str, Any], *, overwrite: bool) -> None:
    """Raises ValueError when another program is making the video at `path`, or, unless `overwrite`, when there is one that is not of this
    `request`.
    """
    with owned(path):
        written = read_json_if_whole(path.with_suffix(".json")) or {}
        if path.exists() and not overwrite and not _is_of(written, request):
            raise ValueError(f"{path} exists and belongs to another request; give overwrite=true to replace it, or another output")


def _is_of(written: dict[str, Any], request: dict[str, Any]) -> bool:
    return written.get("request") == json.loads(json.dumps(request))


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: by torch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class _Clock:
    """Where the seconds of a recording went."""

    start: float = field(default_factory=time.perf_counter)
    first_images: float = 0.0
    parts: Counter[str] = field(default_factory=Counter)
    network: float = 0.0
    write: float = 0.0

    def made(self, block: DecodedBlock) -> None:
        """Another block is there."""
        self.first_images = self.first_images or time.perf_counter() - self.start
        self.parts.update(asdict(block.seconds))
        self.network += block.seconds.network

    def timings(self, num_images: int) -> dict[str, float]:
        total = time.perf_counter() - self.start
        dit_only = num_images / self.network if self.network else 0.0
        speeds = {"images_per_second": num_images / total, "images_per_second_dit": dit_only}
        return {"total": total, "first_images": self.first_images, **self.parts, "write": self.write, **speeds}


def record(
    blocks: Iterable[DecodedBlock],
    path: Path,
    *,
    fps: float,
    scale: int,
    crf: int,
    device: torch.device,
    content: dict[str, Any],
    num_blocks: int | None = None,
    stop: Callable[[DecodedBlock], bool] = lambda block: False,
    quiet: bool = False,
) -> Recording:
    """Write the blocks of a session to `path`, until it ends or `stop` is true for a block.

    `content` is added to the JSON file, which is there from the first block on and says `"complete": false` until the video is. An
    exception that interrupts it (Ctrl-C, NaN, a full disk) passes through, after the images so far have become a valid video. Raises
    ValueError when another process is making the same video.
    """
    with owned(path):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock, error, prompts = _Clock(), None, []
        writer = video.VideoWriter(path, fps=fps, scale=scale, crf=crf)
        try:
            with writer, tqdm(total=num_blocks, unit="block", disable=quiet, dynamic_ncols=True) as bar:
                for block in blocks:
                    if not writer.num_images:  # until now nothing was lost
                        path.with_suffix(".png").unlink(missing_ok=True)
                        write_json(path.with_suffix(".json"), {"complete": False, "video": path.name, **content})
                    _append(block, writer, clock, prompts, bar)
                    if stop(block):
                        break
        except BaseException as interruption:
            error = f"{type(interruption).__name__}: {interruption}".rstrip(": ")
            raise
        finally:
            timings = clock.timings(writer.num_images)
            recording = Recording(path, writer.num_images, fps, timings, peak_memory(device), error is None)
            if error is None and prompts:
                _draw_sheet(recording, prompts)
                _write_record(recording, prompts, content)
            elif prompts:
                _keep(recording, prompts, content | {"error": error})
    return recording


def _append(block: DecodedBlock, writer: video.VideoWriter, clock: _Clock, prompts: list[tuple[int, str]], bar: tqdm) -> None:
    """Write the images of a block, and tell the terminal."""
    clock.made(block)
    if not prompts or prompts[-1][1] != block.prompt:
        prompts.append((writer.num_images, block.prompt))
    writing = time.perf_counter()
    writer.write(block.images[0])
    clock.write += time.perf_counter() - writing
    seconds, speed = writer.num_images / writer.fps, writer.num_images / (time.perf_counter() - clock.start)
    bar.set_postfix_str(f"{float(seconds):.1f} s of video, {speed:.0f} frames/s, {_quoted(block.prompt)}", refresh=False)
    bar.update()


def _keep(recording: Recording, prompts: list[tuple[int, str]], content: dict[str, Any]) -> None:
    """What is left of a video that was interrupted. The interruption is what its user is told, whatever fails here."""
    path = recording.path
    if not recording.num_images:
        for suffix in (".mp4", ".json"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        return
    log.warning("stopped: %s holds the first %.1f s", path, recording.num_images / recording.fps)
    try:
        _write_record(recording, prompts, content)
        _draw_sheet(recording, prompts)
    except (OSError, ValueError, av.FFmpegError) as error:
        log.warning("%s has no contact sheet, or no full record: %s", path, error)


def _quoted(prompt: str, max_chars: int = 60) -> str:
    """The active prompt, cut to the length of a status line."""
    return f'"{prompt}"' if len(prompt) <= max_chars else f'"{prompt[: max_chars - 1]}…"'


def _draw_sheet(recording: Recording, prompts: list[tuple[int, str]]) -> None:
    """Write the contact sheet."""
    path, fps = recording.path, recording.fps
    shown = video.evenly_spaced(recording.num_images, 12)
    captions = [f"{index / fps:.1f} s\n{[prompt for image, prompt in prompts if image <= index][-1]}" for index in shown]
    video.contact_sheet(video.read_images(path, shown), path.with_suffix(".png"), captions=captions, title=path.name)


def _write_record(recording: Recording, prompts: list[tuple[int, str]], content: dict[str, Any]) -> None:
    """Write the JSON file: when that of a complete video is there, everything is."""
    path, fps = recording.path, recording.fps
    info = video.probe(path)
    record = {
        "complete": recording.complete,
        "video": path.name,
        "images": info.images,
        "seconds": round(info.seconds, 4),
        "fps": fps,
        "height": info.height,
        "width": info.width,
        "prompts": [{"image": image, "seconds": round(image / fps, 4), "prompt": prompt} for image, prompt in prompts],
        **content,
        "timings": {name: round(value, 4) for name, value in recording.timings.items()},
        "peak_memory_bytes": recording.peak_memory,
        **made_with(),
    }
    write_json(path.with_suffix(".json"), record)
