"""What `inference.py` and `interactive_inference.py` do: settings, plan, checks before anything is made, videos, summary.

A mistake of the user ends in one or two lines and exit status 2, anything else that stops a run in status 1, Ctrl-C in
130; what was made until then is kept. Knows nothing about blocks, caches or files' formats.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive import video
from longlive.config import InferenceConfig
from longlive.generation.cues import PromptQueue, PromptSchedule
from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.prompt_files import Script, read_scripts
from longlive.generation.session import Session
from longlive.generation.timeline import Timeline
from longlive.parallel.world import choose_device, choose_dtype, configure_logging, free_memory, get_world
from longlive.programs import recording
from longlive.programs.terminal import Typed
from longlive.settings import load

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 5.0
SMALL = 50_000_000  # weights of a pipeline that one CPU thread runs best
FLAGS = ("prompt", "prompts", "timeline", "seconds", "seed", "num_samples", "output", "model", "device", "dtype")
INSTEAD_OF = {  # what is said on the command line takes the place of what a file says in other words
    "prompt": ("prompts",),
    "prompts": ("prompt",),
    "timeline": ("prompt", "prompts", "seconds", "num_latent_frames"),
    "seconds": ("num_latent_frames",),
    "num_latent_frames": ("seconds",),
    "model": ("wan_dir", "checkpoint", "lora"),
    "wan_dir": ("model",),
}
RELEASED = """get the released weights, then use --config configs/inference.yaml:
  hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B
  hf download Efficient-Large-Model/LongLive-1.3B --local-dir longlive_models"""
SAMPLING = ("window", "sink", "denoising_steps", "timestep_shift", "context_timestep", "keep_sink", "recache", "relative_rope")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to be made: its prompts, length (None: until a person stops), seed and place."""

    seed: int
    prompts: PromptSchedule | PromptQueue
    num_latent_frames: int | None
    path: Path


def parse(argv: Sequence[str] | None, *, description: str, default_config: Path) -> InferenceConfig:
    """Settings from the command line: flags, `key=value` words, and the YAML file that `--config` names."""
    names = [field.name for field in dataclasses.fields(InferenceConfig)]
    parser = argparse.ArgumentParser(
        description=description, epilog=f"Settings: {', '.join(names)}. longlive/config.py explains each.", allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="YAML", help=f"settings that differ from the defaults (without it and --model: {default_config.name})"
    )
    for name in FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=f"the same as {name}=…")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting")
    arguments = vars(parser.parse_intermixed_args(argv))
    words: list[str] = arguments["settings"]
    flags: dict[str, Any] = {name: arguments[name] for name in FLAGS if arguments[name] is not None}
    said = set(flags) | {word.partition("=")[0] for word in words}
    for name in said:
        flags |= {other: None for other in INSTEAD_OF.get(name, ()) if other not in said}
    path = arguments["config"] or (None if said & {"model", "wan_dir"} else default_config)
    return load(InferenceConfig, path, words, flags)


def load_pipeline(config: InferenceConfig, dtype: torch.dtype) -> LongLivePipeline:
    """The model that the settings name, on the CPU. Raises ValueError with what to download when it is not there."""
    for path in filter(None, (config.wan_dir, config.checkpoint, config.lora)):
        if not Path(path).exists():
            raise ValueError(f"{path} is not there; {RELEASED}")
    sampling = {name: getattr(config, name) for name in SAMPLING if getattr(config, name) is not None}
    if config.wan_dir is not None:
        if config.checkpoint is None:
            raise ValueError("wan_dir is given without checkpoint; give longlive_base.pt or another checkpoint of the same layout")
        return LongLivePipeline.from_original(
            config.wan_dir, config.checkpoint, config.lora, torch_dtype=dtype, attention=config.attention, **sampling
        )
    model = config.model or "miniature"
    if model != "miniature" and not Path(model).is_dir():
        raise ValueError(f"there is no model folder {model}; {RELEASED}")
    pipe = LongLivePipeline.from_pretrained(model, torch_dtype=dtype, attention=config.attention, **sampling)
    if config.lora is not None:
        pipe.load_lora_weights(config.lora)
    return pipe


def scripts_of(config: InferenceConfig, *, one_video: bool) -> list[Script]:
    """The prompts of every video that is wanted. Raises ValueError when there are none."""
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("the prompt is empty; describe what the video should show")
        return [Script("prompt", (config.prompt,))]
    if config.prompts is not None:
        return read_scripts(config.prompts, switch_frames=config.switch_frame_indices, one_video=one_video)
    raise ValueError('no prompt; give --prompt "…" or --prompts FILE')


def plan(config: InferenceConfig, scripts: Sequence[Script], pipe: LongLivePipeline) -> list[Job]:
    """The videos to be made, the same on every rank. Video j of prompt i has seed + 10,000 i + j, whoever makes it."""
    info = pipe.info
    jobs = []
    for index, script in enumerate(scripts):
        schedule = script.schedule(block=info.block, fps=info.fps)
        num_latent_frames = length(config, pipe) or pipe.num_latent_frames_for(script.seconds or DEFAULT_SECONDS)
        try:
            schedule.validate(num_latent_frames)
        except ValueError as error:
            raise ValueError(f"{script.where}: {error}") from error
        for sample in range(config.num_samples):
            seed = config.seed + 10_000 * index + sample
            path = Path(config.output) / f"{recording.stem(index, script.prompts[0], seed)}.mp4"
            jobs.append(Job(seed, schedule, num_latent_frames, path))
    return jobs


def plan_again(config: InferenceConfig, timeline: Timeline, pipe: LongLivePipeline) -> Job:
    """The video of a live session. Raises ValueError when this model cannot make it."""
    made, now = (settings["block"] for settings in (timeline.settings, pipe.info._asdict()))
    if made != now:
        raise ValueError(f"{config.timeline} was made by a model with blocks of {made} latent frames; this one has blocks of {now}")
    path = Path(config.output) / f"{Path(str(config.timeline)).name.removesuffix('.json').removesuffix('.timeline')}-again.mp4"
    return Job(timeline.seed, timeline.schedule, timeline.num_latent_frames, path)


def sampled_as(config: InferenceConfig, timeline: Timeline) -> InferenceConfig:
    """The settings with the size and sampling of a live session. Raises ValueError when others are asked for."""
    then = {}
    for name in ("height", "width", *SAMPLING):
        if name not in timeline.settings:
            raise ValueError(f"{config.timeline} does not say its {name}")
        value = timeline.settings[name]
        then[name] = tuple(value) if isinstance(value, list) else value
        if (asked := getattr(config, name)) is not None and asked != then[name]:
            raise ValueError(f"{config.timeline} was made with {name} {then[name]}, not {asked}; leave {name} to it")
    return dataclasses.replace(config, **then)


def length(config: InferenceConfig, pipe: LongLivePipeline) -> int | None:
    """Latent frames that the settings ask for; None when they do not say."""
    if config.seconds is not None:
        return pipe.num_latent_frames_for(config.seconds)
    block, num_latent_frames = pipe.info.block, config.num_latent_frames
    if num_latent_frames is not None and num_latent_frames % block:
        nearest = max(block, round(num_latent_frames / block) * block)
        raise ValueError(
            f"num_latent_frames {num_latent_frames} cannot be cut into blocks of {block}; choose a multiple, {nearest} for example"
        )
    return num_latent_frames


def size(config: InferenceConfig, pipe: LongLivePipeline) -> tuple[int, int]:
    """Height and width in pixels: those asked for, or the model's own."""
    height, width, stride = config.height or pipe.info.height, config.width or pipe.info.width, pipe.info.spatial_stride
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % stride:
            raise ValueError(f"{name} {value} is not divisible by {stride}; choose {max(1, round(value / stride)) * stride} for example")
    return height, width


def request(config: InferenceConfig, job: Job, pipe: LongLivePipeline, device: torch.device) -> dict[str, Any]:
    """Everything that decides what the video shows; two videos of the same request are the same."""
    height, width = size(config, pipe)
    prompts = job.prompts
    return {
        "model": config.model or config.wan_dir or "miniature",
        "checkpoint": config.checkpoint,
        "lora": config.lora,
        "cues": [dataclasses.asdict(cue) for cue in prompts.cues] if isinstance(prompts, PromptSchedule) else "typed",
        "num_latent_frames": job.num_latent_frames,
        **pipe.info._asdict(),
        "context_timestep": config.context_timestep,
        "height": height,
        "width": width,
        "seed": job.seed,
        "dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "scale": scale(config, height, width),
        "crf": config.crf,
    }


def scale(config: InferenceConfig, height: int, width: int) -> int:
    """How often every pixel is repeated: as asked, or until the video is 256 pixels wide or high."""
    return config.scale or max(1, math.ceil(256 / max(height, width)))


def check_resources(config: InferenceConfig, jobs: Sequence[Job], pipe: LongLivePipeline, device: torch.device) -> None:
    """Says what the videos need; raises ValueError when memory or disk cannot hold it."""
    info, (height, width) = pipe.info, size(config, pipe)
    enlarged = scale(config, height, width)
    disk = 0
    for num_latent_frames in sorted({job.num_latent_frames or 0 for job in jobs}):
        count = sum((job.num_latent_frames or 0) == num_latent_frames for job in jobs)
        images = pipe.num_images(num_latent_frames) if num_latent_frames else round(600 * info.fps)  # open end: room for ten minutes
        disk += count * video.video_bytes(images, height * enlarged, width * enlarged)
        length = (
            f"{images / info.fps:.1f} s = {num_latent_frames} latent frames in "
            f"{num_latent_frames // info.block} blocks = {images} pixel frames"
            if num_latent_frames
            else "until the prompts end"
        )
        log.info("%d video%s: %s, %dx%d at %g fps", count, "s"[: count > 1], length, height, width, info.fps)
    longest = max(job.num_latent_frames or max(info.window, info.block) for job in jobs)
    needed = pipe.memory_needed(longest, height, width)
    if config.text_encoder == "on_demand":
        needed -= sum(weight.numel() * weight.element_size() for weight in pipe.components["text_encoder"].parameters())
    weights = sum(weight.numel() * weight.element_size() for weight in weights_of(pipe))
    there = free_memory(device) + (weights if device.type == "cpu" else 0)  # on the CPU they are loaded already
    log.info("memory on %s: about %.2f GiB needed, %.2f GiB there", device, needed / 2**30, there / 2**30)
    if needed > there:
        raise ValueError(
            f"about {needed / 2**30:.2f} GiB of memory needed on {device}, {there / 2**30:.2f} GiB there; "
            "choose a smaller height and width, another dtype or another device"
        )
    video.check_disk(config.output, disk)


def place(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device) -> None:
    """Moves the pipeline to where it works.

    A small model on a CPU gets one thread: its operations are too short to share, and threads that spin while they wait for one
    another stand still as soon as another program takes a core (miniature, 2 cores: 115 images/s against 106 when nothing else ran,
    2 against 99 beside one busy process).
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu" and sum(weight.numel() for weight in weights_of(pipe)) < SMALL:
        torch.set_num_threads(1)
    if config.text_encoder == "on_demand":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def weights_of(pipe: LongLivePipeline) -> Iterable[torch.Tensor]:
    """Parameters and buffers of every network of a pipeline."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            yield from part.parameters()
            yield from part.buffers()


def make(
    config: InferenceConfig,
    job: Job,
    pipe: LongLivePipeline,
    device: torch.device,
    *,
    stop: Callable[[Any], bool] = lambda chunk: False,
    quiet: bool = False,
) -> recording.Recording:
    """Makes the video of a job, until its end or until `stop(chunk)`."""
    height, width = size(config, pipe)
    with pipe.session(job.prompts, num_latent_frames=job.num_latent_frames, height=height, width=width, seed=job.seed) as session:
        try:
            return _recorded(config, job, pipe, device, session, stop=stop, quiet=quiet)
        finally:
            if not isinstance(job.prompts, PromptSchedule) and session.timeline.num_latent_frames:
                session.timeline.save(job.path.with_suffix(".timeline.json"))


def _recorded(
    config: InferenceConfig,
    job: Job,
    pipe: LongLivePipeline,
    device: torch.device,
    session: Session,
    *,
    stop: Callable[[Any], bool],
    quiet: bool,
) -> recording.Recording:
    height, width = size(config, pipe)
    return recording.record(
        session,
        job.path,
        fps=pipe.info.fps,
        scale=scale(config, height, width),
        crf=config.crf,
        device=device,
        num_blocks=job.num_latent_frames // pipe.info.block if job.num_latent_frames else None,
        about={
            "seed": job.seed,
            "request": request(config, job, pipe, device),
            "settings": dataclasses.asdict(config),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        stop=stop,
        quiet=quiet,
    )


def run(config: InferenceConfig, *, interactive: bool = False, terminal: int = 0) -> None:
    """Makes every video that the settings ask for: from prompts that are known, or that come from the terminal meanwhile."""
    world = get_world()
    timeline = None if config.timeline is None else Timeline.load(config.timeline)
    if timeline is not None:
        config = sampled_as(config, timeline)
    typing = interactive and config.prompts is None and timeline is None
    if typing and world.size > 1:
        raise ValueError(f"{world.size} ranks cannot read one terminal; give prompts=FILE or start one process")
    scripts = [] if typing or timeline is not None else scripts_of(config, one_video=interactive)
    video.check_writable(config.output)
    device = choose_device(config.device, world)
    pipe = load_pipeline(config, choose_dtype(config.dtype, device))
    if typing:
        make_typed(config, pipe, device, terminal)
    else:
        jobs = plan(config, scripts, pipe) if timeline is None else [plan_again(config, timeline, pipe)]
        make_planned(config, jobs[world.rank :: world.size], pipe, device, quiet=not world.is_main)


def make_planned(config: InferenceConfig, jobs: Sequence[Job], pipe: LongLivePipeline, device: torch.device, *, quiet: bool) -> None:
    """Makes the videos that are not finished yet."""
    todo = [job for job in jobs if config.overwrite or not recording.finished(job.path, request(config, job, pipe, device))]
    for job in jobs:
        if job not in todo:
            log.info("%s is finished already", job.path)
    if not todo:
        return
    check_resources(config, todo, pipe, device)
    place(config, pipe, device)
    for number, job in enumerate(todo, 1):
        log.info("video %d of %d: %s", number, len(todo), job.path)
        log.info(make(config, job, pipe, device, quiet=quiet).summary())


def make_typed(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device, terminal: int) -> None:
    """Makes one video from what a person types: until its length is reached, or the input ends when it has none."""
    wanted = length(config, pipe)
    job = Job(config.seed, PromptSchedule.single("-"), wanted, Path(config.output) / f"typed-{time.strftime('%Y%m%d-%H%M%S')}.mp4")
    check_resources(config, [job], pipe, device)
    place(config, pipe, device)
    log.info("type a prompt and Enter; each further line is the prompt from the next block on. Ctrl-D: no more prompts. Ctrl-C: stop")
    with Typed(terminal, first=config.prompt) as typed:
        job = dataclasses.replace(job, prompts=typed.wait())
        log.info(make(config, job, pipe, device, stop=lambda chunk: wanted is None and typed.ended_with(chunk.prompt)).summary())


def main(argv: Sequence[str] | None = None, *, description: str, default_config: Path, interactive: bool = False) -> int:
    """Runs a program to its exit status. `interactive`: without a file of prompts they are read from the terminal."""
    configure_logging(get_world())
    hush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job keeps its video as after Ctrl-C
    try:
        config = parse(argv, description=description, default_config=default_config)
        with logging_redirect_tqdm():
            run(config, interactive=interactive)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        log.warning("interrupted; what was made so far is in its folder")
        return 130
    return 0


def hush() -> None:
    """Keeps the libraries' own progress bars, and their advice to whoever calls them, off the terminal."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def _fail(error: Exception, status: int) -> int:
    log.error("error: %s", error)
    log.debug("this is where", exc_info=error)
    return status
