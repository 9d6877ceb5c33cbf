"""Makes the videos of a benchmark: every prompt and seed once, shared among ranks, gone on with where a run was stopped.

Knows nothing about how they are measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import shutil
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from longlive import video
from longlive.checkpoints.store import WEIGHTS
from longlive.config import InferenceConfig
from longlive.evaluation import folder as folders
from longlive.evaluation.folder import Prepared
from longlive.evaluation.suites import Entry, PromptList, find_suite, names_of
from longlive.files import file_digest
from longlive.generation.cues import num_images_of, num_latent_frames_for
from longlive.generation.pipeline import BUNDLED, LongLivePipeline
from longlive.parallel.world import World, choose_device, choose_dtype, gather, get_world, joined
from longlive.programs import loading
from longlive.provenance import commit, hardware, versions

log = logging.getLogger(__name__)

OWN_FILE = f"{socket.gethostname()}-{os.getpid()}.mp4"  # what is half done; another process may be at work in the same folder
DECIDED_HERE = ("prompt", "prompts", "timeline", "num_samples", "switch_frame_indices", "output", "overwrite")
DECIDES_THE_PICTURE = ("model", "checkpoint", "lora", "context_timestep", "height", "width", "dtype", "scale", "crf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A video to be made."""

    name: str
    entry: Entry
    seed: int
    num_latent_frames: int


def check_said(names: Collection[str]) -> None:
    """Raises ValueError for a setting that the suite decides."""
    for name in DECIDED_HERE:
        if name in names:
            raise ValueError(f"{name} is given, but the suite decides what is shown and where it goes; leave {name} out")


def weight_files(config: InferenceConfig) -> list[Path]:
    """The files that the model's weights come from."""
    places = [Path(config.wan_dir)] if config.wan_dir is not None else [BUNDLED.get(config.model or "miniature") or Path(str(config.model))]
    files = [file for place in places for file in sorted(place.rglob("*")) if file.suffix in WEIGHTS and file.is_file()]
    if config.wan_dir is not None:  # the transformer there is not what is used
        files = [file for file in files if not file.name.startswith("diffusion_pytorch_model")]
    elif BUNDLED.get(config.model or "miniature"):
        files = [file for file in files if "teacher" not in file.parts]
    return files + [Path(one) for one in (config.checkpoint, config.lora) if one is not None]


def describe_weights(files: Sequence[Path], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, bytes and digest of every file; those `known` by bytes and time of change are not read again."""
    found = []
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_file():
                continue
            status = file.stat()
            said = {"file": str(file), "bytes": status.st_size, "changed": int(status.st_mtime)}
            before = next((one for one in known if all(one.get(key) == value for key, value in said.items())), None)
            found.append(before or said | {"sha256": file_digest(file)})
    return found


def prepared_from(config: InferenceConfig, suite: str, prompts: PromptList, part: dict[str, Any], pipe: LongLivePipeline) -> Prepared:
    """What `prepared.json` says before any video is made; weights and what it is made with come later."""
    info = pipe.info
    num_latent_frames = loading.video_length(config, pipe)
    if num_latent_frames is None and not prompts.own:
        num_latent_frames = find_suite(suite).num_latent_frames
        if num_latent_frames is not None:
            num_latent_frames = -(-num_latent_frames // info.block) * info.block
    height, width = loading.video_size(config, pipe)
    device = choose_device(config.device, get_world())
    model = {name: getattr(config, name) for name in DECIDES_THE_PICTURE}
    model |= {
        "model": config.model or config.wan_dir or "miniature",
        **info._asdict(),
        "height": height,
        "width": width,
        "dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "scale": loading.pixel_scale(config, height, width),
    }
    return Prepared(
        suite=suite,
        prompt_list={"source": prompts.source, "digest": prompts.digest, **part},
        rewritten=None,
        seed=config.seed,
        num_latent_frames=num_latent_frames,
        fps=info.fps,
        block=info.block,
        model=model,
        weights=[],
        entries=prompts.entries,
        settings=dataclasses.asdict(config),
    )


def jobs_of(prepared: Prepared) -> list[Job]:
    """All videos, in the order of the list. Raises ValueError when prompts do not fit into their video."""
    jobs = []
    for entry in prepared.entries:
        num_latent_frames = prepared.frames_of(entry)
        try:
            prepared.schedule_of(entry).validate(num_latent_frames)
        except ValueError as error:
            raise ValueError(f"{entry.script.where}: {error}") from error
        for sample in range(entry.samples):
            jobs.append(
                Job(
                    name=f"{entry.name}-{sample}",
                    entry=entry,
                    seed=prepared.seed_of(entry, sample) or 0,
                    num_latent_frames=num_latent_frames,
                )
            )
    return jobs


def prepare(
    config: InferenceConfig,
    suite: str,
    prompts: PromptList,
    output: Path,
    *,
    part: dict[str, Any],
    rewritten: dict[str, Any] | None = None,
) -> None:
    """Make the videos of `prompts` that are not in `output` yet.

    Args:
        part: which part of the list `prompts` is, for the record.
        rewritten: how the prompts that are generated from came to be, when they are not those of the list.

    Raises:
        ValueError: on all ranks, when the folder holds something else, or the videos cannot be made.
    """
    usual = InferenceConfig()
    check_said([name for name in DECIDED_HERE if getattr(config, name) != getattr(usual, name)])
    world = get_world()
    video.check_writable(output)
    device = choose_device(config.device, world)
    pipe = loading.load_pipeline(config, choose_dtype(config.dtype, device))
    wanted = dataclasses.replace(prepared_from(config, suite, prompts, part, pipe), rewritten=rewritten)
    jobs = jobs_of(wanted)
    _agree(output, wanted, config, world)
    todo = [job for job in jobs[world.rank :: world.size] if folders.read_record(output, job.name) is None]
    total = sum(folders.read_record(output, job.name) is None for job in jobs) if world.is_main else 0
    log.info("%s: %d videos, %d of them to be made by %d process%s", output, len(jobs), total, world.size, "es" * (world.size > 1))
    if not todo:
        return
    as_jobs = [
        loading.VideoRequest(job.seed, wanted.schedule_of(job.entry), job.num_latent_frames, output / "videos" / f"{job.name}.mp4")
        for job in todo
    ]
    loading.check_resources(dataclasses.replace(config, output=str(output)), as_jobs, pipe, device)
    loading.move_to_device(config, pipe, device)
    forget_half_done(output)
    for job in tqdm(todo, unit="video", disable=not world.is_main, dynamic_ncols=True, mininterval=1):
        make(output, wanted, job, pipe, rank=world.rank)
    folders.remove_if_empty(output / "partial")


def _agree(output: Path, wanted: Prepared, config: InferenceConfig, world: World) -> None:
    """The first rank writes `prepared.json`, or finds that the folder is another's; all hear of it before they begin."""
    problem = None
    with joined(world, torch.device("cpu")):
        if world.is_main:
            try:
                known = folders.load(output).weights if (output / "prepared.json").exists() else []
                weights = describe_weights(weight_files(config), known)
                made_with = {"versions": versions(), "commit": commit(), "hardware": hardware(world.size)}
                folders.settle(output, dataclasses.replace(wanted, weights=weights, made_with=[made_with]))
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = gather(problem, world)[0]
    if problem is not None:
        raise ValueError(problem)


def forget_half_done(output: Path) -> None:
    """Remove what processes of this machine left that are no more."""
    for path in (output / "partial").glob("*.mp4"):
        host, _, process = path.stem.rpartition("-")
        if host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


def make(output: Path, prepared: Prepared, job: Job, pipe: LongLivePipeline, *, rank: int = 0) -> None:
    """Make one video; it is in `videos/` when it is whole, and in `records/` after that."""
    model, began = prepared.model, time.perf_counter()
    partial = output / "partial" / OWN_FILE
    partial.unlink(missing_ok=True)
    schedule = prepared.schedule_of(job.entry)
    size = {"height": model["height"], "width": model["width"]}
    with (
        pipe.session(schedule, num_latent_frames=job.num_latent_frames, seed=job.seed, **size) as session,
        video.VideoWriter(partial, fps=prepared.fps, scale=model["scale"], crf=model["crf"]) as writer,
    ):
        for chunk in session:
            writer.write(chunk.images[0])
    about = {
        "prompt": job.entry.name,
        "cues": [{"frame": cue.frame, "prompt": cue.prompt} for cue in schedule.cues],
        "seed": job.seed,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 3),
        "rank": rank,
    }
    folders.finish(output, job.name, partial, images=num_images_of(job.num_latent_frames), about=about)


def adopt(source: Path, suite: str, prompts: PromptList, output: Path, *, part: dict[str, Any], name: str) -> None:
    """Take videos that something else made, `{name}-{i}.mp4` in `source`, as those of a suite; they are linked or copied, never changed.

    Raises:
        ValueError: when any is missing or cannot be read, with how many.
    """
    names = names_of(prompts.entries)
    lacking = [one for one in names if not (source / f"{one}.mp4").is_file()]
    if lacking:
        raise ValueError(f"{len(lacking)} of {len(names)} videos are not in {source}: {lacking[0]}.mp4 …; names are {{prompt}}-{{i}}.mp4")
    first = source / f"{names[0]}.mp4"
    folders.size_of(first)
    info = video.probe(first)
    seconds = info.images / info.fps
    wanted = Prepared(
        suite=suite,
        prompt_list={"source": prompts.source, "digest": prompts.digest, **part},
        rewritten=None,
        seed=None,
        num_latent_frames=num_latent_frames_for(seconds, block=1, fps=info.fps),
        fps=info.fps,
        block=1,
        model={"model": name, "videos": str(source.resolve())},
        weights=[],
        entries=prompts.entries,
        made_with=[{"versions": versions(), "commit": commit(), "hardware": hardware()}],
    )
    jobs_of(wanted)  # raises for videos that are too short for their prompts
    folders.settle(output, wanted)
    for one in tqdm(names, unit="video", mininterval=1):
        if folders.read_record(output, one) is not None:
            continue
        partial = output / "partial" / OWN_FILE
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link((source / f"{one}.mp4").resolve(), partial)
        except OSError:  # another disk
            shutil.copyfile(source / f"{one}.mp4", partial)
        folders.finish(output, one, partial, images=folders.size_of(partial).images, about={"seed": None, "adopted": str(source)})
    folders.remove_if_empty(output / "partial")
