"""From settings to a model that is ready to make videos: load it, check what the videos need, move it to its device.

Knows nothing about command lines, prompts or files of videos.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from PIL import Image

from longlive import video
from longlive.checkpoints.lora import LoraFile, lora_files
from longlive.config import InferenceConfig
from longlive.files import check_disk, file_digest
from longlive.generation.caches import weight_bytes
from longlive.generation.cues import Cues
from longlive.generation.dimensions import check_size
from longlive.generation.pipeline import EVERYTHING, LongLivePipeline
from longlive.ops.attention import EIGHT_BIT_BACKENDS
from longlive.ops.eight_bits import check_device
from longlive.ops.rope import near_again
from longlive.parallel.world import choose_dtype, free_memory
from longlive.programs import memory

log = logging.getLogger(__name__)

ABSOLUTE_LATENT_FRAMES = 120  # 30 seconds; up to here absolute positions do no harm
SMALL_MODEL = 50_000_000  # weights; below this a CPU runs a pipeline fastest with one thread
ENDLESS_SECONDS = 600  # for which there must be disk space when a video has no fixed length
SAMPLING_SETTINGS = (
    "window",
    "sink",
    "denoising_steps",
    "timestep_shift",
    "context_timestep",
    "keep_sink",
    "recache",
    "relative_rope",
)
DOWNLOAD_HINT = """get the released weights, then use --config configs/inference.yaml:
  hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B
  hf download Efficient-Large-Model/LongLive-1.3B --local-dir longlive_models"""


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """A video to be made: seed, prompts, length (None: until a person stops it), the path of its mp4, and everything that decides what it
    shows.
    """

    seed: int
    prompts: Cues
    num_latent_frames: int | None
    path: Path
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_pipeline(config: InferenceConfig, device: torch.device) -> LongLivePipeline:
    """The model that the settings name, in the type for `device`, but on the CPU.

    Raises:
        ValueError: when it is missing, with what to download, or `device` cannot do what `quantize` or `graphs` need.
    """
    if config.quantize is not None:
        check_device(config.quantize, device)
    if config.graphs and device.type != "cuda":
        raise ValueError(f"graphs are CUDA graphs, and the device is {device}; leave graphs out, or give device=cuda")
    dtype = choose_dtype(config.dtype, device)
    loras = lora_files(config.lora, alpha=config.lora_alpha)
    for path in filter(None, (config.image, config.continue_from)):
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist")
    for path in filter(None, (config.wan_dir, config.checkpoint, *(lora.path for lora in loras))):
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist; {DOWNLOAD_HINT}")
    sampling = {name: getattr(config, name) for name in SAMPLING_SETTINGS if getattr(config, name) not in (None, "auto")}
    if config.wan_dir is not None:
        if config.checkpoint is None:
            raise ValueError("wan_dir is given without checkpoint; give longlive_base.pt or another checkpoint of the same layout")
        pipe = LongLivePipeline.from_original(
            config.wan_dir, config.checkpoint, loras, which=config.which, torch_dtype=dtype, attention=config.attention, **sampling
        )
    else:
        model = config.model or "miniature"
        if model != "miniature" and not Path(model).is_dir():
            raise ValueError(f"the model folder {model} does not exist; {DOWNLOAD_HINT}")
        pipe = LongLivePipeline.from_pretrained(model, torch_dtype=dtype, attention=config.attention, **sampling)
        for lora in loras:
            pipe.load_lora_weights(lora.path, strength=lora.strength, alpha=lora.alpha, which=lora.which)
        if loras:
            pipe.fuse_lora()
    pipe.place_text_encoder(config.text_encoder)
    pipe.accelerate(
        quantize=config.quantize,
        quantize_cache=config.quantize_cache,
        decoder=config.decoder,
        decode_latent_frames=config.decode_latent_frames,
    )
    return pipe


def move_to_device(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device) -> None:
    """Move the pipeline to its device and choose the number of CPU threads.

    A small model on a CPU gets one thread. Its operations are too short to be shared, and threads that wait for each other by spinning
    come to a halt when another program takes a core (miniature, 2 cores: 115 frames/s with two threads and 106 with one when nothing
    else runs, 2 and 99 beside one busy process).
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu" and sum(weight.numel() for part in pipe.counted_parts for weight in part.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    pipe.to(device)
    pipe.accelerate(compile=config.compile, graphs=config.graphs)


def warm_up(config: InferenceConfig, pipe: LongLivePipeline) -> None:
    """Before a person waits for images: let happen whatever happens once per process, if that takes long."""
    height, width = video_size(config, pipe)
    if config.compile or config.graphs or pipe.device.type == "cuda":
        began = time.perf_counter()
        pipe.warm_up(height, width)
        log.info("ready after %.0f s of warming up", time.perf_counter() - began)
    else:  # the first block is slow: kernels are selected, memory is allocated
        next(iter(pipe.session("-", num_latent_frames=pipe.info.block, height=height, width=width, seed=0)))


def fit_into_memory(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device) -> InferenceConfig:
    """With `low_memory`, apply the settings with which a video fits into what is free on `device`, as much like the defaults as possible.

    Returns the settings with those that were chosen. Call it after `load_pipeline`.

    Raises:
        ValueError: when none of them fits, or the model has no window, so that what it needs depends on the video.
    """
    if not config.low_memory:
        return config
    if pipe.info.window < 0:
        raise ValueError("low_memory is for a model with a window; give window, or choose the settings yourself")
    on_gpu, (height, width) = device.type != "cpu", video_size(config, pipe)
    available = free_memory(device) + (-memory.RESERVED if on_gpu else weight_bytes(*pipe.counted_parts))
    model = memory.Model.of(pipe, pipe.load_tiny_vae(), visible=pipe.info.window)
    settings, parts = memory.choose(model, available, height=height, width=width, on_gpu=on_gpu)
    log.info("low_memory: %s; %.2f of %.2f GiB", settings.words(), parts.total / 2**30, available / 2**30)
    pipe.place_text_encoder(settings.text_encoder)
    chosen = dataclasses.asdict(settings)
    pipe.accelerate(**{name: value for name, value in chosen.items() if name != "text_encoder"})
    return dataclasses.replace(config, low_memory=False, **chosen)


def video_length(config: InferenceConfig, pipe: LongLivePipeline) -> int | None:
    """The number of latent frames that the settings ask for; None when they do not say. Raises ValueError as `Timing.resolve` does."""
    return pipe.timing.resolve(config.seconds, config.num_latent_frames, config.num_frames)


def relative_positions(config: InferenceConfig, pipe: LongLivePipeline, num_latent_frames: int | None) -> bool:
    """Whether a video of this length (None: without an end) gets relative positions: as the settings say, or where absolute ones would
    leave what a sink bears; logs a warning when absolute ones do.
    """
    info, network = pipe.info, pipe.transformer.config
    long = num_latent_frames is None or num_latent_frames > ABSOLUTE_LATENT_FRAMES
    relative = config.relative_rope
    if relative is None or isinstance(relative, str):
        relative = info.relative_rope or (long and info.window != EVERYTHING)
    if long and not relative:
        head_dim = network.dim // network.num_heads
        numbers = near_again(head_dim, theta=network.rope_theta, beyond=ABSOLUTE_LATENT_FRAMES, up_to=2 * ABSOLUTE_LATENT_FRAMES)
        log.warning(
            "absolute positions beyond %d latent frames: %s frames after the sink it looks near again, and videos fall back "
            "to their beginning; relative_rope=auto avoids that",
            ABSOLUTE_LATENT_FRAMES,
            " and ".join(map(str, numbers)),
        )
    return relative


def use_positions(pipe: LongLivePipeline, *, relative: bool) -> None:
    """Make the following videos of a pipeline with relative or absolute positions."""
    pipe.register_to_config(relative_rope=relative)


def video_size(config: InferenceConfig, pipe: LongLivePipeline) -> tuple[int, int]:
    """Height and width in pixels, from the settings or the model. Raises ValueError as `check_size` does."""
    height = pipe.info.height if config.height is None else config.height
    width = pipe.info.width if config.width is None else config.width
    check_size(height, width, pipe.info.spatial_stride)
    return height, width


def pixel_scale(config: InferenceConfig, height: int, width: int) -> int:
    """How often every pixel is repeated, each way: as the settings say, or until the video is at least 256 pixels wide or high."""
    return config.scale or max(1, math.ceil(256 / max(height, width)))


def given_images(config: InferenceConfig, pipe: LongLivePipeline) -> dict[str, Any]:
    """What a video begins with or continues, as `LongLivePipeline.session` takes it; empty without either. Raises ValueError for files
    that cannot be read.
    """
    if config.image is not None:
        try:
            return {"image": Image.open(config.image).convert("RGB")}
        except OSError as error:
            raise ValueError(f"{config.image} cannot be read as a picture: {error}") from error
    if config.continue_from is None:
        return {}
    most = pipe.timing.num_frames(max(pipe.info.window, pipe.info.block))
    with video.readable(config.continue_from):
        newest = list(deque(video.images_of(config.continue_from), maxlen=most))
        if not newest:
            raise ValueError("it has no frames")
    return {"video": np.stack(newest)}


def picture_settings(config: InferenceConfig, pipe: LongLivePipeline, device: torch.device) -> dict[str, Any]:
    """Everything that decides what a video of given prompts, length and seed looks like."""
    (height, width), loras = video_size(config, pipe), lora_files(config.lora, alpha=config.lora_alpha)
    return {
        "model": config.model or config.wan_dir or "miniature",
        "checkpoint": config.checkpoint,
        "lora": [lora.path for lora in loras],
        **{name: file_digest(Path(file)) for name, file in (("image", config.image), ("video", config.continue_from)) if file is not None},
        **({} if config.num_frames is None else {"num_frames": config.num_frames}),
        **({} if config.which is None else {"which": config.which}),
        **({} if all(lora[1:] == LoraFile("")[1:] for lora in loras) else {"lora_strengths": [lora[1:] for lora in loras]}),
        **pipe.info._asdict(),
        **{name: pipe.config[name] for name in ("context_timestep", "fresh_noise", "guidance_scale", "guided_blocks")},
        "height": height,
        "width": width,
        "compile": config.compile,
        "attention": config.attention if config.attention in EIGHT_BIT_BACKENDS else None,  # the others compute the same
        "quantize": config.quantize,
        "quantize_cache": config.quantize_cache,
        "dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "decoder": config.decoder,
        "scale": pixel_scale(config, height, width),
        "crf": config.crf,
    }


def check_resources(config: InferenceConfig, requests: Sequence[VideoRequest], pipe: LongLivePipeline, device: torch.device) -> None:
    """Log what the videos need; raises ValueError when there is not enough memory or disk space."""
    info, (height, width) = pipe.info, video_size(config, pipe)
    scale = pixel_scale(config, height, width)
    disk = 0
    for length in sorted({request.num_latent_frames or 0 for request in requests}):
        count = sum((request.num_latent_frames or 0) == length for request in requests)
        images = pipe.timing.num_frames(length) if length else round(ENDLESS_SECONDS * info.fps)
        disk += count * video.video_bytes(images, height * scale, width * scale)
        words = f"{images / info.fps:.1f} s = {length} latent frames in {length // info.block} blocks = {images} pixel frames"
        what = words if length else "until the prompts end"
        log.info("%d video%s: %s, %dx%d at %g fps", count, "s"[: count > 1], what, height, width, info.fps)
    longest = max(request.num_latent_frames or max(info.window, info.block) for request in requests)
    needed = pipe.memory_needed(longest, height, width)
    loaded = weight_bytes(*pipe.counted_parts) if device.type == "cpu" else 0  # and are no part of the free memory
    available = free_memory(device) + loaded
    log.info("memory on %s: about %.2f GiB needed, %.2f GiB available", device, needed / 2**30, available / 2**30)
    if needed > available:
        raise ValueError(
            f"about {needed / 2**30:.2f} GiB of memory needed on {device}, {available / 2**30:.2f} GiB available; "
            "choose a smaller height and width, another dtype or another device"
        )
    check_disk(config.output, disk)


def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers, and their warnings that are meant for developers."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
