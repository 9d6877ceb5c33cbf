"""The programs `inference.py` and `interactive_inference.py`: settings, the list of videos, checks before any is made, the videos.

The exit status is 2, with an error message of one or two lines, when the user has made a mistake; 1 when anything else stops the run;
130 after Ctrl-C. Videos that were made until then are kept. Knows nothing about blocks, caches or file formats.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from longlive.config import InferenceConfig
from longlive.files import check_writable, digest_of
from longlive.generation.cues import PromptSchedule, check_prompt
from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.prompt_files import Script, read_scripts
from longlive.generation.session import DecodedBlock
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition
from longlive.miniature.captions import hint, summary
from longlive.miniature.language import is_miniature
from longlive.parallel.world import choose_device, get_world
from longlive.programs import loading, recording
from longlive.programs.configs import find_config
from longlive.programs.loading import VideoRequest
from longlive.programs.status import exit_status
from longlive.programs.terminal import TerminalPrompts
from longlive.programs.weights import weights_digest
from longlive.settings import described, load, settings_of

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 5.0
PLACES = ("model", "checkpoint", "lora", "decoder")  # of weights, whose contents decide
FLAGS = ("prompt", "prompts", "timeline", "image", "seconds", "seed", "num_samples", "output", "model", "device", "dtype", "show")
REPLACES = {  # a setting of the command line, and what it replaces in the configuration file
    "prompt": ("prompts",),
    "prompts": ("prompt",),
    "timeline": ("prompt", "prompts", "seconds", "num_latent_frames", "num_frames"),
    "seconds": ("num_latent_frames", "num_frames"),
    "num_latent_frames": ("seconds", "num_frames"),
    "num_frames": ("seconds", "num_latent_frames"),
    "model": ("wan_dir", "checkpoint", "which", "lora", "lora_alpha"),
    "wan_dir": ("model",),
}


def parse(argv: Sequence[str] | None, *, description: str, default_config: Path, prog: str | None = None) -> InferenceConfig:
    """Settings from the command line: flags, `key=value` words, and the YAML file that `--config` names."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=described(InferenceConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="YAML", help=f"settings that differ from the defaults (without it and --model: {default_config.name})"
    )
    texts = {setting.name: setting.text for setting in settings_of(InferenceConfig)}
    for name in FLAGS:
        text = texts[name] or f"the same as {name}=…"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=text.replace("%", "%%"))
    parser.add_argument("--continue", dest="continue_from", metavar="VIDEO", help="the same as continue_from=…: a video to be continued")
    parser.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", help="a LoRA to merge; may be given several times")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any of the settings below")
    arguments = vars(parser.parse_intermixed_args(argv))
    words: list[str] = arguments["settings"]
    flags: dict[str, Any] = {name: arguments[name] for name in (*FLAGS, "continue_from", "lora") if arguments[name] is not None}
    given = set(flags) | {word.partition("=")[0] for word in words}
    for name in given:
        flags |= {other: None for other in REPLACES.get(name, ()) if other not in given}
    path = arguments["config"] and find_config(arguments["config"])
    path = path or (None if given & {"model", "wan_dir"} else default_config)
    return load(InferenceConfig, path, words, flags)


def requested_scripts(config: InferenceConfig, *, one_video: bool) -> list[Script]:
    """The prompts of every video. Raises ValueError when there are none."""
    if config.prompt is not None:
        check_prompt(config.prompt)
        return [Script("prompt", (config.prompt,))]
    if config.prompts is not None:
        return read_scripts(config.prompts, switch_latent_frames=config.switch_frame_indices, one_video=one_video)
    raise ValueError('no prompt; give --prompt "…" or --prompts FILE')


def plan(config: InferenceConfig, scripts: Sequence[Script], pipe: LongLivePipeline, common: dict[str, Any]) -> list[VideoRequest]:
    """The videos to be made, the same on every rank: video j of a prompt has seed + j, wherever the prompt is in its file; one that is
    there again continues the count. `common`: what decides the picture of all of them.
    """
    requests, seen, relative = [], Counter[PromptSchedule](), dict[int, bool]()
    for script in scripts:
        schedule = script.schedule(pipe.timing, Transition(pipe.info.keep_sink, pipe.info.recache))
        length = loading.video_length(config, pipe) or pipe.timing.latent_frames_for(script.seconds or DEFAULT_SECONDS)
        try:
            schedule.validate(length)
        except ValueError as error:
            raise ValueError(f"{script.where}: {error}") from error
        if length not in relative:
            relative[length] = loading.relative_positions(config, pipe, length)
        warn_of_unseen(script, schedule, pipe.info.block)
        for sample in range(config.num_samples):
            seed = config.seed + seen[schedule] * config.num_samples + sample
            identity = identity_of(schedule, length, seed, common | {"relative_rope": relative[length]})
            path = Path(config.output) / f"{recording.file_stem(script.prompts[0], seed, identity)}.mp4"
            requests.append(VideoRequest(seed, schedule, length, path, identity))
        seen[schedule] += 1
    return requests


def warn_of_unseen(script: Script, schedule: PromptSchedule, block: int) -> None:
    """Log which prompts are never shown, because the next one takes effect at the same block."""
    for number, (cue, following) in enumerate(pairwise(schedule.cues), 1):
        if -(-cue.latent_frame // block) == -(-following.latent_frame // block):
            log.warning("%s: prompt %d is never shown: prompt %d begins in the same block of %d", script.where, number, number + 1, block)


def plan_timeline(config: InferenceConfig, timeline: Timeline, pipe: LongLivePipeline, common: dict[str, Any]) -> VideoRequest:
    """The video of a timeline. Raises ValueError when this model cannot make it."""
    then, now = timeline.settings.get("block"), pipe.info.block
    if then is None:
        raise ValueError(f"{config.timeline} has no block size")
    if then != now:
        raise ValueError(f"{config.timeline} was made by a model with blocks of {then} latent frames; this one has blocks of {now}")
    name = Path(str(config.timeline)).name.removesuffix(".json").removesuffix(".timeline")
    seed, schedule = timeline.seed, timeline.schedule
    relative = loading.relative_positions(config, pipe, timeline.num_latent_frames)
    length = timeline.num_latent_frames - timeline.settings.get("given_latent_frames", 0)
    identity = identity_of(schedule, length, seed, common | {"relative_rope": relative})
    path = Path(config.output) / f"{name}-again-{digest_of(identity)[:8]}.mp4"
    return VideoRequest(seed, schedule, length, path, identity)


def with_timeline_settings(config: InferenceConfig, timeline: Timeline) -> InferenceConfig:
    """The settings with the size and sampling of a timeline. Raises ValueError when the user asks for others."""
    changes: dict[str, Any] = {}
    for name in ("height", "width", *loading.SAMPLING_SETTINGS):
        if name not in timeline.settings:
            raise ValueError(f"{config.timeline} has no {name}")
        value = timeline.settings[name]
        changes[name] = tuple(value) if isinstance(value, list) else value
        if (requested := getattr(config, name)) is not None and requested != changes[name]:
            raise ValueError(f"{config.timeline} was made with {name} {changes[name]}, not {requested}; leave {name} out")
    for name, setting in (("image", "image"), ("video", "continue_from")):
        if (name in timeline.settings) != (getattr(config, setting) is not None):
            advice = "give it with" if name in timeline.settings else "it has none: leave out"
            raise ValueError(f"{config.timeline} has to be made with the {name} that it began with; {advice} {setting}=")
    try:
        checked = load(InferenceConfig, flags=changes)
    except ValueError as error:
        raise ValueError(f"{config.timeline} is not a timeline: {str(error).removeprefix('the command line: ')}") from error
    return dataclasses.replace(config, **{name: getattr(checked, name) for name in changes})


def identity_of(schedule: PromptSchedule, num_latent_frames: int, seed: int, common: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what a video shows; a finished video with the same identity need not be made again."""
    cues = [dataclasses.asdict(cue) for cue in schedule.cues]
    return {"cues": cues, "num_latent_frames": num_latent_frames, "seed": seed, **common}


def common_identity(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device) -> dict[str, Any]:
    """The part of all videos of a run: sampling, size and weights. A digest stands for these, wherever they lie."""
    settings = loading.picture_settings(config, pipe, device)
    return {name: value for name, value in settings.items() if name not in PLACES} | {"weights": weights_digest(config)}


def make(
    config: InferenceConfig,
    request: VideoRequest,
    pipe: LongLivePipeline,
    device: torch.device,
    *,
    stop: Callable[[DecodedBlock], bool] = lambda block: False,
    quiet: bool = False,
) -> recording.Recording:
    """Make a video, until its end or until `stop` is true for a block."""
    (height, width), length, planned = (
        loading.video_size(config, pipe),
        request.num_latent_frames,
        isinstance(request.prompts, PromptSchedule),
    )
    given = loading.given_images(config, pipe)
    size: dict[str, Any] = {"num_latent_frames": length if length is None or "image" not in given else length + 1}
    if config.num_frames is not None:
        size = {"num_frames": config.num_frames}
    size |= {"height": height, "width": width, **given}
    loading.use_positions(pipe, relative=request.identity["relative_rope"])
    with pipe.session(request.prompts, **size, seed=request.seed, ahead=planned) as session:  # a typed prompt must not be shown later
        try:
            return recording.record(
                paced(session, pipe.info.fps) if config.realtime else session,
                request.path,
                fps=pipe.info.fps,
                scale=loading.pixel_scale(config, height, width),
                crf=config.crf,
                device=device,
                num_blocks=length // pipe.info.block if length else None,
                content={
                    "seed": request.seed,
                    "request": request.identity,
                    "settings": dataclasses.asdict(config),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                },
                stop=stop,
                quiet=quiet,
            )
        finally:
            if not isinstance(request.prompts, PromptSchedule) and session.timeline.num_latent_frames:
                session.timeline.save(request.path.with_suffix(".timeline.json"))


def run(config: InferenceConfig, *, interactive: bool = False, terminal: int = 0) -> None:
    """Make every video that the settings ask for. `interactive` without prompts or a timeline: one video, with prompts that are typed."""
    world = get_world()
    timeline = None if config.timeline is None else Timeline.load(config.timeline)
    if timeline is not None:
        config = with_timeline_settings(config, timeline)
    typing = interactive and config.prompts is None and timeline is None
    if config.show is not None and not typing:
        raise ValueError(f"show={config.show} is for `longlive live`, where prompts are typed; leave it out")
    if typing and sys.stdin is None:
        raise ValueError("the standard input is closed, so nothing can be typed; give prompts=FILE")
    if typing and world.size > 1:
        raise ValueError(f"{world.size} ranks cannot read one terminal; give prompts=FILE or start one process")
    scripts = [] if typing or timeline is not None else requested_scripts(config, one_video=interactive)
    check_writable(config.output)
    device = choose_device(config.device, world)
    pipe = loading.load_pipeline(config, device)
    config = loading.fit_into_memory(config, pipe, device)
    if is_miniature(pipe.tokenizer) and world.is_main:
        for text in dict.fromkeys(found for script in scripts for prompt in script.prompts if (found := hint(prompt)) is not None):
            log.warning(text)
    if typing:
        make_typed(config, pipe, device, terminal)
    else:
        common = common_identity(config, pipe, device)
        requests = plan(config, scripts, pipe, common) if timeline is None else [plan_timeline(config, timeline, pipe, common)]
        make_planned(config, requests[world.rank :: world.size], pipe, device, quiet=not world.is_main)


def make_planned(
    config: InferenceConfig, requests: Sequence[VideoRequest], pipe: LongLivePipeline, device: torch.device, *, quiet: bool
) -> None:
    """Make the videos that are not finished yet. Raises ValueError, before it makes any, when a file would be lost."""
    missing = []
    for request in requests:
        if not config.overwrite and recording.is_finished(request.path, request.identity):
            log.info("%s is finished already", request.path)
            continue
        recording.check_free(request.path, request.identity, overwrite=config.overwrite)
        missing.append(request)
    if not missing:
        return
    loading.check_resources(config, missing, pipe, device)
    loading.move_to_device(config, pipe, device)
    for number, request in enumerate(missing, 1):
        log.info("video %d of %d: %s", number, len(missing), request.path)
        log.info(make(config, request, pipe, device, quiet=quiet).summary())


def make_typed(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device, terminal: int) -> None:
    """Make one video from prompts that are typed. Without a length it ends after the last prompt once the input has ended."""
    name = f"typed-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.mp4"  # of two programs in the same second, too
    length, path = loading.video_length(config, pipe), Path(config.output) / name
    relative = loading.relative_positions(config, pipe, length)
    identity = common_identity(config, pipe, device) | {"relative_rope": relative, "cues": "typed", "seed": config.seed}
    request = VideoRequest(config.seed, PromptSchedule.single("-"), length, path, identity)
    loading.check_resources(config, [request], pipe, device)
    loading.move_to_device(config, pipe, device)
    if config.compile or device.type == "cuda":
        loading.warm_up(config, pipe)
    words = is_miniature(pipe.tokenizer)
    if words:
        log.info("the miniature understands %s", summary())
    typed = TerminalPrompts(
        terminal, timing=pipe.timing, first=config.prompt, hint=hint if words else None, preview=config.show == "terminal"
    )
    if typed.typed:
        log.info("type a prompt and Enter; each further line is the prompt from the next block on. Ctrl-D: no more prompts. Ctrl-C: stop")
    if config.show == "terminal" and not typed.has_line:
        raise ValueError("show=terminal needs prompts that are typed at a terminal, and prompt_toolkit: pip install 'longlive[live]'")
    config = dataclasses.replace(config, realtime=typed.typed if config.realtime is None else config.realtime)
    with typed:
        request = dataclasses.replace(request, prompts=typed.wait())

        def stop(block: DecodedBlock) -> bool:
            return typed.shown(block) and length is None

        made = make(config, request, pipe, device, stop=stop, quiet=typed.has_line)
    log.info(made.summary())


def paced(blocks: Iterable[DecodedBlock], fps: float) -> Iterator[DecodedBlock]:
    """The blocks no faster than they play: each is asked for when it is needed, less the time that the one before took to make."""
    start, shown, blocks = None, 0.0, iter(blocks)
    while True:
        asked = time.perf_counter()
        block = next(blocks, None)
        if block is None:
            return
        now = time.perf_counter()
        start = now if start is None else start
        yield block
        shown += block.images.shape[1] / fps
        time.sleep(max(0.0, start + shown - (now - asked) - time.perf_counter()))


def main(
    argv: Sequence[str] | None = None,
    *,
    description: str,
    default_config: Path,
    interactive: bool = False,
    prog: str | None = None,
) -> int:
    """Run a program; returns its exit status. `interactive`: without a file of prompts they are read from the terminal."""

    def command() -> int:
        run(parse(argv, description=description, default_config=default_config, prog=prog), interactive=interactive)
        return 0

    return exit_status(command, interrupted="interrupted; what was made so far is in its folder")
