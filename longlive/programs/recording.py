"""One video from session to disk: the mp4 while it grows, then its contact sheet, then the JSON file that says it is finished.

Knows nothing about settings files, command lines or how a session makes images.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from longlive import video
from longlive.files import read_json_if_whole
from longlive.provenance import versions

log = logging.getLogger(__name__)


class Recording(NamedTuple):
    """What came of a video: how much there is, how fast it came, and whether it is all that was asked for."""

    path: Path
    num_images: int
    fps: float
    timings: dict[str, float]
    peak_memory: int
    complete: bool

    def summary(self) -> str:
        timings = self.timings
        return (
            f"{self.path}: {self.num_images} images, {self.num_images / self.fps:.1f} s; "
            f"{timings['images_per_second_dit']:.1f} images/s DiT only, {timings['images_per_second']:.1f} end to end; "
            f"first images after {timings['first_images']:.2f} s; peak memory {self.peak_memory / 2**30:.2f} GiB"
        )


def stem(index: int, prompt: str, seed: int) -> str:
    """Name of a video's files without ending: number of the prompt, its first words, seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return "-".join(filter(None, (f"{index:03d}", words, f"seed{seed}")))


def finished(path: Path, request: dict[str, Any]) -> bool:
    """Whether the video at `path` is there, complete, and was made as `request` asks."""
    written = read_json_if_whole(path.with_suffix(".json")) or {}
    return path.is_file() and written.get("complete") is True and written.get("request") == json.loads(json.dumps(request))


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by torch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record(
    chunks: Iterable[Any],
    path: Path,
    *,
    fps: float,
    scale: int,
    crf: int,
    device: torch.device,
    about: dict[str, Any],
    num_blocks: int | None = None,
    stop: Callable[[Any], bool] = lambda chunk: False,
    quiet: bool = False,
) -> Recording:
    """Writes the chunks of a session to `path`, until it ends or `stop(chunk)` says so.

    `about` goes into the JSON file. Whatever interrupts it (Ctrl-C, NaN, a full disk) passes through, after the images so
    far have become a valid video with a JSON file that says `"complete": false`.
    """
    for suffix in (".json", ".png"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent, network, write = Counter[str](), 0.0, 0.0
    prompts: list[tuple[int, str]] = []
    first, began = 0.0, time.perf_counter()
    complete, error = False, None
    writer = video.VideoWriter(path, fps=fps, scale=scale, crf=crf)
    try:
        with writer, tqdm(total=num_blocks, unit="block", disable=quiet, dynamic_ncols=True) as bar:
            for chunk in chunks:
                first = first or time.perf_counter() - began
                if not prompts or prompts[-1][1] != chunk.prompt:
                    prompts.append((writer.num_images, chunk.prompt))
                writing = time.perf_counter()
                writer.write(chunk.images[0])
                write += time.perf_counter() - writing
                spent.update(dataclasses.asdict(chunk.seconds))
                network += chunk.seconds.network
                speed = writer.num_images / (time.perf_counter() - began)
                bar.set_postfix_str(
                    f"{writer.num_images / fps:.1f} s of video, {speed:.0f} images/s, {_short(chunk.prompt)}", refresh=False
                )
                bar.update()
                if stop(chunk):
                    break
        complete = True
    except BaseException as interruption:
        error = f"{type(interruption).__name__}: {interruption}".rstrip(": ")
        raise
    finally:
        total = time.perf_counter() - began
        timings = {
            "total": total,
            "first_images": first,
            **spent,
            "write": write,
            "images_per_second": writer.num_images / total,
            "images_per_second_dit": writer.num_images / network if network else 0.0,
        }
        recording = Recording(path, writer.num_images, fps, timings, peak_memory(device), complete)
        if writer.num_images:
            _finish(recording, prompts, about | ({"error": error} if error else {}))
            if not complete:
                log.warning("stopped: %s holds the first %.1f s", path, writer.num_images / fps)
    return recording


def _short(prompt: str, most: int = 60) -> str:
    """The prompt in force, for a status line."""
    return f'"{prompt}"' if len(prompt) <= most else f'"{prompt[: most - 1]}…"'


def _finish(recording: Recording, prompts: list[tuple[int, str]], about: dict[str, Any]) -> None:
    """Contact sheet, then JSON: whoever finds the JSON finds the rest."""
    path, fps = recording.path, recording.fps
    shown = video.evenly_spaced(recording.num_images, 12)
    captions = [f"{index / fps:.1f} s\n{[prompt for start, prompt in prompts if start <= index][-1]}" for index in shown]
    video.contact_sheet(video.read_images(path, shown), path.with_suffix(".png"), captions=captions, title=path.name)

    info = video.probe(path)
    content = {
        "complete": recording.complete,
        "video": path.name,
        "images": info.images,
        "seconds": round(info.seconds, 4),
        "fps": fps,
        "height": info.height,
        "width": info.width,
        "prompts": [{"image": start, "seconds": round(start / fps, 4), "prompt": prompt} for start, prompt in prompts],
        **about,
        "timings": {name: round(value, 4) for name, value in recording.timings.items()},
        "peak_memory_bytes": recording.peak_memory,
        "versions": versions(),
    }
    partial = path.with_name(f".{path.stem}.json.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))
