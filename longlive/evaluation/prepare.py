"""Generates the videos of a benchmark: every prompt and seed once, split across ranks; a run that was stopped can be continued."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from longlive import video
from longlive.checkpoints.lora import lora_files
from longlive.checkpoints.store import WEIGHTS
from longlive.config import InferenceConfig
from longlive.evaluation.prepared import PlannedVideo, Prepared, claim, finish_video, load_prepared, read_record, remove_if_empty
from longlive.evaluation.suites import PromptList, find_suite, names_of
from longlive.files import file_digest
from longlive.generation.dimensions import Timing
from longlive.generation.pipeline import BUNDLED, LongLivePipeline
from longlive.parallel.world import World, choose_device, gather, get_world, joined
from longlive.programs import loading
from longlive.provenance import made_with
from longlive.settings import load

log = logging.getLogger(__name__)

DECIDED_BY_SUITE = ("prompt", "prompts", "timeline", "num_samples", "switch_frame_indices", "output", "overwrite")


def read_settings(path: Path | None, words: Sequence[str]) -> InferenceConfig:
    """The settings of a YAML file and `key=value` words; the suite decides how long a video is, unless a word does.

    Raises ValueError, as `load` does, and for a setting that the suite decides.
    """
    given = {word.partition("=")[0] for word in words}
    config, default = load(InferenceConfig, path, words, {"prompts": None, "switch_frame_indices": None}), InferenceConfig()
    if given.isdisjoint(lengths := ("seconds", "num_latent_frames", "num_frames")):
        config = dataclasses.replace(config, **dict.fromkeys(lengths))
    for name in DECIDED_BY_SUITE:
        if name in given or getattr(config, name) != getattr(default, name):
            raise ValueError(f"{name} is given, but the suite decides prompts and output; leave {name} out")
    return config


def weight_files(config: InferenceConfig) -> list[Path]:
    """The files that the model's weights come from."""
    bundled = BUNDLED.get(config.model or "miniature")
    place = Path(str(config.wan_dir)) if config.wan_dir is not None else bundled or Path(str(config.model))
    files = [file for file in sorted(place.rglob("*")) if file.suffix in WEIGHTS and file.is_file()]
    if config.wan_dir is not None:  # its transformer is replaced by the checkpoint
        files = [file for file in files if not file.name.startswith("diffusion_pytorch_model")]
    elif bundled:
        files = [file for file in files if "teacher" not in file.parts]
    for path in map(Path, filter(None, (config.checkpoint, *(lora.path for lora in lora_files(config.lora))))):
        files += [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return files


def describe_weights(files: Sequence[Path], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, bytes, time of change and digest of every file; one that is `known` by the first three is not read again."""
    descriptions = []
    for file in files:
        status = file.stat()
        facts = {"file": str(file), "bytes": status.st_size, "changed": int(status.st_mtime)}
        before = next((description for description in known if facts.items() <= description.items()), None)
        descriptions.append(before or facts | {"sha256": file_digest(file)})
    return descriptions


def prepared_from(config: InferenceConfig, suite: str, prompts: PromptList, pipe: LongLivePipeline) -> Prepared:
    """The contents of `prepared.json` before any video is generated, without weights, versions and hardware."""
    info = pipe.info
    num_latent_frames = loading.video_length(config, pipe)
    if num_latent_frames is None and not prompts.own and (default := find_suite(suite).num_latent_frames) is not None:
        num_latent_frames = -(-default // info.block) * info.block
    return Prepared(
        suite=suite,
        prompt_list=prompts.record(),
        rewritten=prompts.rewritten,
        entries=prompts.entries,
        num_latent_frames=num_latent_frames,
        fps=info.fps,
        block=info.block,
        temporal_stride=info.temporal_stride,
        seed=config.seed,
        model=loading.picture_settings(config, pipe, choose_device(config.device, get_world())),
        settings=dataclasses.asdict(config),
    )


def check_lengths(prepared: Prepared) -> None:
    """Raises ValueError when the prompts of a script do not fit into its videos."""
    for planned in prepared.videos:
        try:
            prepared.schedule_of(planned.entry).validate(planned.num_latent_frames)
        except ValueError as error:
            raise ValueError(f"{planned.entry.script.where}: {error}") from error


def prepare(config: InferenceConfig, suite: str, prompts: PromptList, output: Path) -> None:
    """Generate the videos of `prompts` that are not in `output` yet.

    Raises ValueError on all ranks when the folder belongs to another request, or the videos cannot be generated.
    """
    world = get_world()
    video.check_writable(output)
    device = choose_device(config.device, world)
    pipe = loading.load_pipeline(config, device)
    config = loading.fit_into_memory(config, pipe, device)
    wanted = prepared_from(config, suite, prompts, pipe)
    check_lengths(wanted)
    _claim_together(output, wanted, config, world)
    planned = wanted.videos
    todo = [each for each in planned[world.rank :: world.size] if read_record(output, each.name) is None]
    total = sum(read_record(output, each.name) is None for each in planned) if world.is_main else 0
    log.info("%s: %d videos, %d to be generated by %d process%s", output, len(planned), total, world.size, "es" * (world.size > 1))
    if not todo:
        return
    requests = [loading.VideoRequest(each.seed or 0, wanted.schedule_of(each.entry), each.num_latent_frames, output) for each in todo]
    loading.check_resources(dataclasses.replace(config, output=str(output)), requests, pipe, device)
    loading.move_to_device(config, pipe, device)
    remove_leftovers(output)
    for each in tqdm(todo, unit="video", disable=not world.is_main, dynamic_ncols=True, mininterval=1):
        generate(output, wanted, each, pipe, rank=world.rank)
    remove_if_empty(output / "partial")


def _claim_together(output: Path, wanted: Prepared, config: InferenceConfig, world: World) -> None:
    """The main rank writes `prepared.json`, or finds that the folder belongs to another request; then all ranks raise."""
    problem = None
    with joined(world, torch.device("cpu")):
        if world.is_main:
            try:
                known = load_prepared(output).weights if (output / "prepared.json").exists() else []
                weights = describe_weights(weight_files(config), known)
                claim(output, dataclasses.replace(wanted, weights=weights, made_with=[made_with(world.size)]))
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = gather(problem, world)[0]
    if problem is not None:
        raise ValueError(problem)


def _partial(output: Path) -> Path:
    """Where this process writes an unfinished video; other processes may write into the same folder."""
    path = output / "partial" / f"{socket.gethostname()}-{os.getpid()}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def remove_leftovers(output: Path) -> None:
    """Remove the unfinished videos of processes of this machine that no longer exist."""
    for path in (output / "partial").glob("*.mp4"):
        host, _, process = path.stem.rpartition("-")
        if host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


def generate(output: Path, prepared: Prepared, planned: PlannedVideo, pipe: LongLivePipeline, *, rank: int = 0) -> None:
    """Generate one video; it is moved to `videos/` when it is complete, and then gets its record."""
    model, start, partial = prepared.model, time.perf_counter(), _partial(output)
    options = {"num_latent_frames": planned.num_latent_frames, "seed": planned.seed, "height": model["height"], "width": model["width"]}
    with (
        pipe.session(prepared.schedule_of(planned.entry), **options) as session,
        video.VideoWriter(partial, fps=prepared.fps, scale=model["scale"], crf=model["crf"]) as writer,
    ):
        for decoded in session:
            writer.write(decoded.images[0])
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {"made": made, "seconds": round(time.perf_counter() - start, 3), "rank": rank}
    finish_video(output, prepared, planned, partial, about)


def adopt(source: Path, suite: str, prompts: PromptList, output: Path, *, name: str) -> None:
    """Take videos of another program, `{name}-{i}.mp4` in `source`, as those of a suite; they are linked or copied, never changed.

    Raises:
        ValueError: when any is missing or cannot be read, with how many, or is too short for its prompts.
    """
    files = {video_name: source / f"{video_name}.mp4" for video_name in names_of(prompts.entries)}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ValueError(f"{len(missing)} of {len(files)} videos are not in {source}: {missing[0]} …; names are {{prompt}}-{{i}}.mp4")
    info = video.read_through(next(iter(files.values())))
    wanted = Prepared(
        suite=suite,
        prompt_list=prompts.record(),
        entries=prompts.entries,
        num_latent_frames=Timing(info.fps, block=1).latent_frames_for(info.images / info.fps),
        fps=info.fps,
        block=1,
        model={"model": name, "videos": str(source.resolve())},
        made_with=[made_with()],
    )
    check_lengths(wanted)
    claim(output, wanted)
    for planned in tqdm(wanted.videos, unit="video", mininterval=1):
        if read_record(output, planned.name) is not None:
            continue
        partial = _partial(output)
        try:
            os.link(files[planned.name].resolve(), partial)
        except OSError:  # another disk
            shutil.copyfile(files[planned.name], partial)
        finish_video(output, wanted, planned, partial, {"adopted": str(source)})
    remove_if_empty(output / "partial")
