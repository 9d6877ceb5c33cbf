"""`LongLivePipeline`: a folder of weights, prompts in, video out; in diffusers' conventions.

A long file: the one class of the Python interface, with the documentation of its arguments.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from longlive.cache.window import KVCache, Window
from longlive.checkpoints import configs, hub, store
from longlive.checkpoints.lora import load_lora, lora_files
from longlive.engine.apply import Recipe, apply
from longlive.engine.linears import LinearKind, is_quantised, linear_kind
from longlive.engine.steady import SteadyPasses, cuda_graph, default_compiler
from longlive.generation.active_text import Embeddings
from longlive.generation.arguments import (
    FOLDER_OPTIONS,
    HUB_OPTIONS,
    check_arguments,
    check_choices,
    check_settings,
    chosen_dtype,
    without_progress_bars,
)
from longlive.generation.caches import VideoBytes, decoder_memory_bytes, ring_cache, video_bytes, weight_bytes
from longlive.generation.conditioning import Conditioner
from longlive.generation.cues import Cues, PromptSchedule
from longlive.generation.decoders import PartwiseDecoder, check_fits, find_tiny_vae, has_tiny_vae, load_tiny_vae
from longlive.generation.denoiser import Denoiser
from longlive.generation.dimensions import Timing, check_size, check_whole
from longlive.generation.given import Given, given, pixels
from longlive.generation.loras import LoraMethods
from longlive.generation.noise import Generators
from longlive.generation.rollout import OnStep
from longlive.generation.sampling import sample
from longlive.generation.session import Session, SessionVideo, SteppedSession, check_seed
from longlive.generation.session_prompts import SessionPrompts
from longlive.generation.stream import LatentBlock
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Recache, Transition
from longlive.models.lora import MergedLoras, merge_lora
from longlive.models.text import PromptPieces, TextEncoder, TextEncoderMode, check_mode
from longlive.models.tiny_vae import TinyDecoder, TinyVAE
from longlive.models.vae import StreamDecoder, settings_of
from longlive.models.wan import WanTransformer
from longlive.ops.eight_bits import Format, check_device, dtype_of
from longlive.ops.flow_matching import warp_steps
from longlive.types import Decoder, Images, Latents, Text, TextKV

BUNDLED = {"miniature": Path(__file__).parents[1] / "miniature" / "weights"}
EVERYTHING = -1  # the released configurations' word for "no window"

log = logging.getLogger(__name__)

Callback = Callable[["LongLivePipeline", int, float, dict[str, Any]], dict[str, Any]]


class PipelineInfo(NamedTuple):
    """What a user of a pipeline must know: default size in pixels, strides, and settings."""

    height: int
    width: int
    fps: float
    block: int
    temporal_stride: int
    spatial_stride: int
    window: int
    sink: int
    denoising_steps: tuple[int, ...]
    timestep_shift: float
    relative_rope: bool
    keep_sink: bool
    recache: Recache


@dataclass
class LongLiveOutput(BaseOutput):
    """`frames`: videos, as `output_type` asked for."""

    frames: Any


class LongLivePipeline(LoraMethods, DiffusionPipeline):
    """Videos of any length from prompts that may change on the way.

    Args:
        text_encoder, tokenizer: None in a pipeline that is only given `prompt_embeds`.
        window: latent frames a block sees, the sink and itself included (-1: all of a video of known length).
        sink: how many of them are the video's first.
        block: latent frames per block.
        denoising_steps, timestep_shift: uniform steps out of 1000, decreasing, and the shift that turns them into timesteps.
        context_timestep: t at which finished frames pass through the network to be cached, without added noise.
        fresh_noise: between steps add new noise (few-step models) instead of the noise the network predicts (others).
        guidance_scale: s of classifier-free guidance against a zero text embedding, v_0 + s (v - v_0); 1 (none) for distilled models.
        guided_blocks: blocks of each prompt that are guided, from where it begins (None: all): once the picture shows what the
            prompt says, the following blocks follow the picture.
        relative_rope: the infinite mode; see `RingCache`.
        keep_sink, recache: what a prompt switch does with the past, unless its cue says so itself (see `Transition`).
        height, width: default size in pixels.
        fps: pixel frames per second.
    """

    config: Any  # diffusers' frozen dictionary, read by attribute
    transformer: WanTransformer
    vae: AutoencoderKLWan
    text_encoder: Any  # UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        window: int = 12,
        sink: int = 3,
        block: int = 3,
        denoising_steps: list[int] | tuple[int, ...] = (1000, 750, 500, 250),
        timestep_shift: int | float = 5.0,
        context_timestep: int | float = 0.0,
        fresh_noise: bool = True,
        guidance_scale: int | float = 1.0,
        guided_blocks: int | None = None,
        relative_rope: bool = False,
        keep_sink: bool = True,
        recache: str = "joint",  # not `Recache`: diffusers warns of annotations that it does not know
        height: int = 480,
        width: int = 832,
        fps: int | float = 16.0,
    ) -> None:
        super().__init__()
        Transition(keep_sink, recache)  # type: ignore[arg-type]  # raises for another name
        warp_steps(denoising_steps, timestep_shift)  # raises for steps that make no sense
        check_settings(
            whole={"block": (block, 1), "sink": (sink, 0), "height": (height, 1), "width": (width, 1), "guided_blocks": (guided_blocks, 0)},
            numbers={"context_timestep": (context_timestep, 0, 1000), "fps": (fps, 0.01, 1000)},
        )
        if window != EVERYTHING and Window.of(window, sink).recent < block:
            raise ValueError(f"a window of {window} frames with a sink of {sink} has no room for a block of {block}; choose a larger one")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            window=window,
            sink=sink,
            block=block,
            denoising_steps=tuple(denoising_steps),
            timestep_shift=timestep_shift,
            context_timestep=context_timestep,
            fresh_noise=fresh_noise,
            guidance_scale=guidance_scale,
            guided_blocks=guided_blocks,
            relative_rope=relative_rope,
            keep_sink=keep_sink,
            recache=recache,
            height=height,
            width=width,
            fps=fps,
        )
        self._loras: MergedLoras | None = None
        self._text_mode: TextEncoderMode = "resident"
        self._cache_format: Format | None = None
        self._conditioner: Conditioner | None = None
        self._compile = self._graphs = False
        self._folder: Path | None = None  # where it was loaded from
        self._tiny: TinyVAE | None = None  # decodes instead of the VAE
        self._quantize: LinearKind | None = None
        self._decode_latent_frames: int | None = None  # at most in one call; None: a block
        self._steady: SteadyPasses | None = None  # of the transformer, if its passes are compiled or recorded

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers. Another transformer runs as `accelerate` has made the one before run; of another encoder or tokenizer, prompts
        are encoded anew.
        """
        if name not in ("transformer", "text_encoder", "tokenizer") or "_steady" not in vars(self):  # the latter: in the constructor
            super().__setattr__(name, value)
        elif name == "transformer":
            with self._plain_transformer():
                super().__setattr__(name, value)
                self._loras = None  # those of the one before
                if self._quantize is not None and not is_quantised(value):
                    apply(value, Recipe(quantize=self._quantize))
        else:
            super().__setattr__(name, value)
            self._conditioner = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to this process (threads, cached prompts, compiled and recorded passes)."""
        state = self.__dict__ | {"_conditioner": None, "_steady": None}
        if self._steady is not None:
            state["transformer"] = self._steady.plain_copy()
            state["_loras"] = None if self._loras is None else self._loras.bound_to(state["transformer"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self._plain_transformer():  # compiles and records again what was compiled and recorded
            pass

    @classmethod
    def from_pretrained(cls, name: str | Path, *, attention: str = "auto", **kwargs: Any) -> LongLivePipeline:  # type: ignore[override]
        """A pipeline from a folder in diffusers layout, the bundled "miniature", or a name on the hub, as
        `Efficient-Large-Model/LongLive-1.3B`, which is downloaded once, with what it needs of Wan (see `checkpoints.hub`).

        Args:
            kwargs: settings of the constructor and components, instead of the folder's; `torch_dtype` or `dtype`, a type or its name
                (None: float32 for a folder, bfloat16 for released files); for a download `cache_dir`, `revision`, `token`,
                `local_files_only`, `force_download`; and what diffusers takes for a folder (`variant`, `use_safetensors`, `device_map`,
                `low_cpu_mem_usage`).

        Raises:
            ValueError: when the folder is not there or is no pipeline of this class, or for an unknown argument; says the nearest.
        """
        if "guidance" in kwargs:
            raise ValueError("guidance is guidance_scale now, which counts one more: guidance_scale = 1 + guidance")
        check_arguments(kwargs, cls.__init__)
        kwargs["dtype"] = chosen_dtype(kwargs)
        downloading = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
        folder = BUNDLED.get(str(name), Path(name))
        if str(name) not in BUNDLED and hub.is_hub_name(str(name)):
            release = hub.RELEASES.get(str(name))
            if release is not None:
                return cls._from_release(str(name), release, downloading, attention=attention, **kwargs)
            folder = hub.fetch(str(name), ("model_index.json", "*"), **downloading)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} holds no pipeline (no model_index.json); for released files use LongLivePipeline.from_original")
        saved = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if "guidance" in saved:  # written by version 0.1
            kwargs.setdefault("guidance_scale", 1 + saved["guidance"])
        if "vae" not in kwargs:  # its configuration may hold a setting of ours, which diffusers would warn of
            kwargs["vae"] = store.load_vae(folder, dtype=kwargs["dtype"] or torch.float32)
        with without_progress_bars():
            pipe = super().from_pretrained(folder, local_files_only=True, **kwargs)
        if not isinstance(pipe, LongLivePipeline):
            raise ValueError(f"{folder} holds a {type(pipe).__name__}; for a Wan pipeline use LongLivePipeline.from_original")
        pipe.transformer.use_attention(attention)
        pipe._folder = folder
        return pipe

    @classmethod
    def _from_release(
        cls, name: str, release: hub.Release, downloading: dict[str, Any], *, dtype: torch.dtype | None, **settings: Any
    ) -> LongLivePipeline:
        """Released files from the hub. `revision` is the model's own."""
        if components := sorted(set(settings) & {"transformer", "vae", "text_encoder", "tokenizer", *FOLDER_OPTIONS}):
            raise ValueError(f"{name} is made of released files: {components[0]} cannot be given; make the pipeline from its parts")
        model = hub.fetch(name, release.files, **downloading)
        wan = hub.fetch(release.wan, release.wan_files, **{key: value for key, value in downloading.items() if key != "revision"})
        lora = None if release.lora is None else model / release.lora
        return cls.from_original(wan, model / release.checkpoint, lora, dtype=dtype, **settings)

    @classmethod
    def from_original(
        cls,
        wan_dir: str | Path,
        checkpoint: str | Path | None = None,
        lora: Any = None,
        *,
        which: str | None = None,
        lora_alpha: float | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str = "auto",
        **settings: Any,
    ) -> LongLivePipeline:
        """A pipeline from released files: a folder of Wan2.1-T2V-1.3B (original or diffusers layout) for text encoder, tokenizer
        and VAE, `longlive_base.pt` (or any other layout of the transformer; the folder's own if None), and `lora.pt`, merged here.

        `lora`: a path, `path:strength`, `{"path": …, "strength": …}` or a list of these (see `lora_files`), part of the model from then on;
        `which`: the weights to take from a file that holds several (`generator`, `ema`, …); `lora_alpha`: of LoRAs that do not store it;
        `torch_dtype` or `dtype`: a type or its name, bfloat16 if None; `attention`: as in `WanTransformer.use_attention`; `settings`: as in
        the constructor.

        Weights are mapped, not copied, and the LoRA is merged in float32 before the cast to `torch_dtype`.

        Raises:
            ValueError, FileNotFoundError: what does not fit, is missing, and what to download to where.
        """
        check_arguments(settings, cls.__init__)
        torch_dtype = chosen_dtype({"torch_dtype": torch_dtype, "dtype": dtype}) or torch.bfloat16
        source = wan_dir if checkpoint is None else checkpoint
        loaded = store.load_transformer(source, which=which)
        config = loaded.config or configs.transformer_config(loaded.state)
        with torch.device("meta"):
            transformer = WanTransformer(**config)
        store.fill(transformer, loaded.state, what=f"the transformer of {source}", dtype=None if lora else torch_dtype)
        for file in lora_files(lora, alpha=lora_alpha):
            merge_lora(transformer, load_lora(file.path, which=file.which, alpha=file.alpha), strength=file.strength)
        torch.nn.Module.to(transformer, dtype=torch_dtype)
        transformer.eval().requires_grad_(False)
        transformer.use_attention(attention)
        text_encoder, tokenizer = store.load_text_encoder(wan_dir, dtype=torch_dtype)
        pipe = cls(transformer, store.load_vae(wan_dir, dtype=torch_dtype), text_encoder, tokenizer, **settings)
        pipe._folder = Path(wan_dir)
        return pipe

    @property
    def info(self) -> PipelineInfo:
        """Default size, strides and settings."""
        config = self.config
        return PipelineInfo(
            height=config.height,
            width=config.width,
            fps=config.fps,
            block=config.block,
            temporal_stride=self.timing.stride,
            spatial_stride=self._spatial_stride * self.transformer.config.patch_size[1],
            window=config.window,
            sink=config.sink,
            denoising_steps=tuple(config.denoising_steps),
            timestep_shift=config.timestep_shift,
            relative_rope=config.relative_rope,
            keep_sink=config.keep_sink,
            recache=config.recache,
        )

    @property
    def timing(self) -> Timing:
        """Conversions between seconds, pixel frames and latent frames."""
        return Timing(self.config.fps, settings_of(self.vae).scale_factor_temporal, self.config.block)

    @property
    def transition(self) -> Transition:
        """What a prompt switch does with the past, unless its cue says so itself."""
        return Transition(self.config.keep_sink, self.config.recache)

    def decoder(self) -> Decoder:
        """A new decoder of one video's latents, block by block."""
        decoder = StreamDecoder(self.vae) if self._tiny is None else TinyDecoder(self._tiny)
        return decoder if self._decode_latent_frames is None else PartwiseDecoder(decoder, self._decode_latent_frames)

    def load_tiny_vae(self) -> TinyVAE | None:
        """The tiny decoder in the model's folder; None when there is none."""
        return load_tiny_vae(find_tiny_vae(self._folder), dtype=self.vae.dtype) if has_tiny_vae(self._folder) else None

    @property
    def _decoding_network(self) -> AutoencoderKLWan | TinyVAE:
        return self.vae if self._tiny is None else self._tiny

    @property
    def counted_parts(self) -> list[torch.nn.Module]:
        """The networks whose weights `memory_needed` counts."""
        parts = [self.transformer, self.vae, self._tiny, None if self._text_mode == "cpu" else self.text_encoder]
        return [part for part in parts if part is not None]

    def memory_needed(self, num_latent_frames: int, height: int | None = None, width: int | None = None, batch: int = 1) -> int:
        """Estimated bytes on the device at most: weights (the text encoder's unless it stays on the CPU), key-value cache, activations of
        the transformer and of the decoder for one block.
        """
        height, width = self._size(height, width)
        visible = num_latent_frames if self.config.window == EVERYTHING else self.config.window
        return weight_bytes(*self.counted_parts) + sum(self._video_bytes(height, width, visible=visible, batch=batch))

    def _video_bytes(self, height: int, width: int, *, visible: int, batch: int) -> VideoBytes:
        return video_bytes(
            self.transformer,
            self._decoding_network,
            height,
            width,
            stride=self._spatial_stride,
            visible=visible,
            block=self.config.block,
            recache=self.config.recache == "joint",
            sink_copies=self._sink_copies,
            batch=batch,
            quantize=linear_kind(self.transformer),
            quantize_cache=self._cache_format,
            decode_latent_frames=self._decode_latent_frames,
        )

    @property
    def _sink_copies(self) -> int:
        return self.config.sink if self.config.relative_rope else 0

    @property
    def num_timesteps(self) -> int:
        """Denoising passes of every block."""
        return len(self.config.denoising_steps)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], *, num_videos_per_prompt: int = 1) -> tuple[Text, Text | None]:
        """Embeddings of prompts, `[prompts x videos, L, E]`, zero after each prompt's end, for the argument `prompt_embeds`; and those that
        guidance goes away from, for `negative_prompt_embeds`: no text (zeros), or None without guidance.
        """
        check_whole("num_videos_per_prompt", num_videos_per_prompt, 1)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompt_embeds = self._text.embed(prompts).repeat_interleave(num_videos_per_prompt, dim=0)
        negative_prompt_embeds = torch.zeros_like(prompt_embeds) if self.config.guidance_scale != 1 else None
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | PromptSchedule | Sequence[PromptSchedule] | None = None,
        *,
        seconds: float | None = None,
        num_latent_frames: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        image: Any = None,
        video: Any = None,
        generator: Generators = None,
        latents: Latents | None = None,
        prompt_embeds: Text | None = None,
        negative_prompt_embeds: Text | None = None,
        output_type: Literal["np", "pt", "pil", "latent"] = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LongLiveOutput | tuple[Any]:
        """Make videos; one prompt after the other when there are several.

        Args:
            prompt: one prompt, several (a video each), or a schedule of prompts for one video.
            seconds, num_latent_frames, num_frames: the length, in one of them (5 seconds if none is given): seconds are rounded up to
                whole blocks, latent frames are a multiple of the block, `num_frames` images are made exactly, as in diffusers: of whole
                blocks, the images beyond them are left out (latents, as output or in a callback, are those of whole blocks).
            image: a picture (see `given.pixels`) that is the first image, and the first latent frame, beside whole blocks of others.
            video: images that the video continues; lengths are of what comes after them, which is all that is returned.
            generator: on the CPU for the same video on every device; a list has one for each video of each prompt, in this order.
            num_videos_per_prompt: videos of each prompt, generated as one batch.
            latents: initial noise of every block, `[videos, F, C, h, w]`; that between steps is still drawn from `generator`.
            prompt_embeds: instead of a prompt, `[videos, L, E]` with one row for each video, as `encode_prompt` makes them.
            negative_prompt_embeds: what guidance goes away from, instead of no text: one row, or one for each video.
            output_type: "np" float `[B, T, Y, X, 3]` in [0, 1], "pt" `[B, T, 3, Y, X]`, "pil" lists of images, "latent" `[B, F, C, h, w]`.
            callback_on_step_end: called as (pipe, step, t, {"latents": x0}) after every denoising pass; may return a dict with another
                x0 as "latents". Unlike in diffusers these are the predicted clean latents, and `step` counts from 0 in every block.

        Raises:
            ValueError: what cannot be made (length, size, prompt), before anything is computed.
            FloatingPointError: when latents are not finite, with block and step.
        """
        check_choices(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        start = self._given(image, video, height, width)
        length = self._length(seconds, num_latent_frames, num_frames, start) or self._length(5.0, None, None, start) or 0
        on_step = None if callback_on_step_end is None else self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        plans = _plans(prompt, prompt_embeds, num_videos_per_prompt, length)
        size = {"num_latent_frames": length, "height": height, "width": width, "batch": num_videos_per_prompt, "start": start}
        videos = []
        for index, cues in enumerate(plans):
            rows = slice(index * num_videos_per_prompt, (index + 1) * num_videos_per_prompt)
            own = {
                "generator": _generators(generator, rows, len(plans) * num_videos_per_prompt),
                "latents": latents if latents is None or len(plans) == 1 else latents[rows],
                "negative": _rows(negative_prompt_embeds, rows),
                "project_text": None if prompt_embeds is None else partial(self._project_rows, prompt_embeds[rows]),
            }
            videos.append(torch.cat([part.latents for part in self.stream(cues, **size, **own, on_step=on_step)], dim=1))
        return self._output(torch.cat(videos), start, output_type, num_frames, return_dict)

    def _output(
        self, latents: Latents, start: Given | None, output_type: str, num_frames: int | None, return_dict: bool
    ) -> LongLiveOutput | tuple[Any]:
        """What the caller asked for of the latents of whole videos: as images, without those that are not shown."""
        hidden = 0 if start is None or start.shown else start.latents.shape[1]  # latent frames
        if output_type == "latent":
            frames: Any = latents[:, hidden:]
        else:
            images = self._decode(latents)[:, :, self.timing.num_frames(hidden) if hidden else 0 :]
            frames = self._postprocess(images[:, :, :num_frames], output_type)
        return LongLiveOutput(frames=frames) if return_dict else (frames,)

    def _project_rows(self, text: Text, _: str) -> TextKV:
        return self.transformer.project_text(text.to(self._device))

    def _given(self, image: Any, video: Any, height: int | None, width: int | None) -> Given | None:
        if image is None and video is None:
            return None
        if image is not None and video is not None:
            raise ValueError("both image and video are given; choose one")
        most = self.config.window if self.config.window != EVERYTHING else Window().visible
        images = pixels(video if image is None else image, *self._size(height, width))
        return given(self.vae, images, shown=image is not None, most_latent_frames=most)

    def _length(
        self, seconds: float | None, num_latent_frames: int | None, num_frames: int | None, start: Given | None = None
    ) -> int | None:
        """Latent frames, those that are given included."""
        timing, first = self.timing, 0 if start is None else start.latents.shape[1]
        if start is not None and start.shown and num_latent_frames is not None and seconds is None and num_frames is None:
            timing.check_blocks(num_latent_frames, after=first)
            return num_latent_frames
        length = timing.resolve(seconds, num_latent_frames, num_frames)
        if start is not None and length is not None:
            wanted = self._images_wanted(seconds, num_frames)
            if not start.shown:  # each latent frame of what comes after gives `stride` images
                length = first + (length if wanted is None else timing.whole_blocks(-(-wanted // timing.stride), after=0))
            elif wanted is not None:
                length = timing.whole_blocks(-(-(wanted - 1) // timing.stride) + 1, after=first)
        if num_frames is not None and length is not None and (made := timing.num_frames(length)) != num_frames and start is None:
            log.info("num_frames %d: %d are made, whole blocks of %d latent frames, and cut", num_frames, made, self.config.block)
        return length

    def _images_wanted(self, seconds: float | None, num_frames: int | None) -> int | None:
        return num_frames if seconds is None else math.ceil(seconds * self.config.fps - 1e-6)

    def session(
        self,
        prompt: str | Cues,
        *,
        seconds: float | None = None,
        num_latent_frames: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        image: Any = None,
        video: Any = None,
        seed: int | None = None,
        generator: Generators = None,
        ahead: bool = False,
    ) -> Session:
        """A running video, to iterate over; endless when no length is given. Same seed, same video as `__call__`.

        Args:
            seconds, num_latent_frames, num_frames: the length, in one of them; see `__call__`.
            image, video: what it begins with or continues, see `__call__`; `session.timeline` has a digest of it in its settings.
            seed: of the noise; drawn if neither it nor `generator` is given. `session.timeline` has it.
            generator: as in `__call__`, instead of a seed; the timeline has the seed that was set in it last.
            ahead: make a block in another thread while the block before is decoded and used.

        Raises:
            ValueError: what cannot be made (length, size), before anything is computed.
        """
        start = self._given(image, video, height, width)
        steps = self.stepped_session(
            prompt,
            num_latent_frames=self._length(seconds, num_latent_frames, num_frames, start),
            num_images=num_frames,
            start=start,
            height=height,
            width=width,
            batch=batch,
            seed=seed,
            generator=generator,
        )
        return Session(steps, ahead=ahead)

    def stepped_session(
        self,
        prompt: str | Cues,
        *,
        num_latent_frames: int | None = None,
        num_images: int | None = None,
        start: Given | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        seed: int | None = None,
        generator: Generators = None,
        preempt: Callable[[], bool] | None = None,
    ) -> SteppedSession:
        """A running video whose owner asks for every block; for servers that share one model among sessions. Otherwise as `session`.

        Args:
            start, num_latent_frames: latents that the video begins with, and the length with them.
            num_images: images beyond these are left out.
            preempt: asked when a prompt is given while a block is being made: whether to drop that block and make it again with the new
                prompt, which is then shown one block earlier.
        """
        if seed is not None and generator is not None:
            raise ValueError("both seed and generator are given; choose one")
        check_seed(0 if seed is None else seed)
        check_whole("batch", batch, 1)
        _generators(generator, slice(batch), batch)
        height, width = self._size(height, width)
        cues = prompt if isinstance(prompt, Cues) else PromptSchedule.single(prompt)
        if isinstance(cues, PromptSchedule) and num_latent_frames is not None:
            cues.validate(num_latent_frames)
        settings = self.info._asdict() | {"height": height, "width": width, "context_timestep": self.config.context_timestep}
        if start is not None:
            settings |= {"image" if start.shown else "video": start.digest, "given_latent_frames": start.latents.shape[1]}

        def begin(index: int, prompts: SessionPrompts, seed: int) -> SessionVideo:
            def should_abort() -> bool:
                self._wait_for_device()  # denoising passes that are only queued cannot be taken back
                return prompts.pending and preempt is not None and preempt()

            blocks = self.stream(
                prompts,
                num_latent_frames=num_latent_frames,
                height=height,
                width=width,
                batch=batch,
                start=start,
                generator=torch.Generator().manual_seed(seed) if index or generator is None else generator,
                on_step=lambda *_: prompts.check_running(),
                should_abort=None if preempt is None else should_abort,
            )
            shown, timeline = start is None or start.shown, Timeline(seed, settings)
            return SessionVideo(index, blocks, self.decoder(), timeline, num_images=num_images, shows_given=shown)

        if seed is None:
            first = generator if generator is None or isinstance(generator, torch.Generator) else generator[0]
            seed = first.initial_seed() if first is not None else torch.Generator().seed() % 2**32
        assert self._text is not None  # made here, so that two threads cannot make two
        encode = partial(self.prepare_prompt, batch=batch, owner=object())
        return SteppedSession(begin, cues, seed=seed, encode=encode)

    def stream(
        self,
        cues: Cues,
        *,
        num_latent_frames: int | None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        start: Given | None = None,
        generator: Generators = None,
        latents: Latents | None = None,
        on_step: OnStep | None = None,
        should_abort: Callable[[], bool] | None = None,
        project_text: Callable[[str], TextKV] | None = None,
        negative: Text | None = None,
    ) -> Iterable[LatentBlock]:
        """Latents block by block: what `__call__` and `session` are made of. `should_abort`: see `generation.stream`.

        `start`: latents that the video begins with, which come first, and which `num_latent_frames` counts too.
        `project_text`: text keys and values of a cue's prompt, which may stand for another sentence in each video of the batch (see
        `project_prompts`); None: the prompt's own, for all of them. `negative`: embeddings that guidance goes away from; None: no text.
        """
        height, width = self._size(height, width)
        self.timing.check_blocks(num_latent_frames, after=0 if start is None else start.latents.shape[1])
        if num_latent_frames is not None and isinstance(cues, PromptSchedule):
            cues.validate(num_latent_frames)
        shape = (batch, num_latent_frames or 0, settings_of(self.vae).z_dim, height // self._spatial_stride, width // self._spatial_stride)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, this video needs {shape}")
        return sample(
            self._denoiser(batch, negative),
            cues,
            project_text or (lambda prompt: self._text.project(prompt, batch)),
            cache=self._cache(num_latent_frames, height, width, batch),
            latent_size=shape[3:],
            timesteps=warp_steps(self.config.denoising_steps, self.config.timestep_shift),
            generator=generator,
            block=self.config.block,
            num_latent_frames=num_latent_frames,
            batch=batch,
            latents=latents,
            fresh_noise=self.config.fresh_noise,
            context_t=float(self.config.context_timestep),
            transition=self.transition,
            embeddings=self._embeddings(batch) if project_text is None else None,
            start=None if start is None else start.latents,
            guided_blocks=self.config.guided_blocks,
            on_step=on_step,
            should_abort=should_abort,
        )

    def prepare_prompt(self, prompt: str, *, batch: int = 1, owner: object = None) -> Future[Any]:
        """Begin to encode a prompt in another thread; done when a session can switch to it without waiting.

        `owner`: who asks, if a newer prompt of the same owner makes this one useless (see `Conditioner.submit`).
        """
        return self._text.submit(prompt, batch, owner=owner)

    def prompt_pieces(self, prompt: str) -> PromptPieces:
        """How many pieces (tokens) of a prompt are read, and where it is cut. Quick; for any thread."""
        return self._text.text_encoder.pieces(prompt)

    @torch.no_grad()
    def project_prompts(self, prompts: Sequence[str]) -> TextKV:
        """Text keys and values of a batch of videos, one prompt each."""
        return self.transformer.project_text(self._text.embed(prompts))

    def session_bytes(self, height: int | None = None, width: int | None = None) -> int:
        """Estimated bytes that every further session holds: its key-value cache, and what its decoder remembers."""
        height, width = self._size(height, width)
        if self.config.window == EVERYTHING:
            raise ValueError("sessions without an end need a window; window -1 is for videos of known length")
        cache = self._video_bytes(height, width, visible=self.config.window, batch=1).cache
        return cache + decoder_memory_bytes(self._decoding_network, height, width)

    def transient_bytes(self, height: int | None = None, width: int | None = None, *, decoders: int = 1) -> int:
        """Estimated bytes that all sessions need together while something is at work: the transformer, `decoders` of their decoders, and a
        text encoder that is moved to the device on demand.
        """
        height, width = self._size(height, width)
        moves = self._text_mode == "on_demand" and self._device.type != "cpu"
        moved = weight_bytes(*filter(None, [self.text_encoder])) if moves else 0
        video = self._video_bytes(height, width, visible=max(0, self.config.window), batch=1)
        decoding = video.decoding - decoder_memory_bytes(self._decoding_network, height, width)
        return moved + video.activations + decoders * decoding

    def accelerate(
        self,
        *,
        compile: bool | None = None,
        graphs: bool | None = None,
        quantize: LinearKind | None = None,
        quantize_cache: Format | Literal["off"] | None = None,
        decoder: str | Path | None = None,
        decode_latent_frames: int | None = None,
    ) -> None:
        """Change how fast the pipeline runs and what it needs. What is left out stays as it is, so that several calls add up. It holds
        for a transformer that is assigned later, too.

        Args:
            compile: whether blocks that see a full window run through torch.compile, which takes time once per process.
                Other passes, and everything with False, run as the code says.
            graphs: whether these passes are recorded as CUDA graphs.
            quantize: put the linear layers of its blocks into 8 bits, for good: "int8" (activations and weights), "int8-weights" or
                "fp8". Merge a LoRA before. The pipeline can then not be saved.
            quantize_cache: hold the keys and values of videos that begin from now on in "int8" or "fp8", or again as they are ("off").
            decoder: "full" is the VAE's own; "tiny" the tiny decoder in the model's folder, or a path of one (see `load_tiny_vae`), which
                is faster and less exact.
            decode_latent_frames: latent frames that are decoded in one call; fewer than a block need less memory and give the same images.

        Raises:
            ValueError: for an unknown value, a transformer that is quantised already, a device that has no such instructions or graphs, or
                a decoder that does not fit the VAE's latents.
            FileNotFoundError: for a decoder that is not there.
        """
        if graphs and self._device.type != "cuda":
            raise ValueError(
                f"graphs are CUDA graphs, and the pipeline is on {self._device.type}; move it to a GPU first, or leave graphs out"
            )
        if decode_latent_frames is not None and decode_latent_frames < 1:
            raise ValueError(f"decode_latent_frames {decode_latent_frames}: at least one latent frame is decoded in a call")
        if (compile or graphs) and self.config.window == EVERYTHING:
            raise ValueError("compile and graphs are for blocks that see a window of fixed length; window -1 has none")
        if quantize_cache not in (None, "off"):
            dtype_of(quantize_cache)
        if quantize is not None:
            check_device(quantize, self._device)
        tiny = self._chosen_decoder(decoder)
        with self._plain_transformer():
            if compile:
                default_compiler(self._device)  # raises when nothing can be compiled here, before anything is changed
            apply(self.transformer, Recipe(quantize=quantize))
            self._tiny, self._quantize = tiny, quantize or self._quantize
            self._compile = self._compile if compile is None else compile
            self._graphs = self._graphs if graphs is None else graphs
        if quantize_cache is not None:
            self._cache_format = None if quantize_cache == "off" else quantize_cache
        self._decode_latent_frames = decode_latent_frames or self._decode_latent_frames

    def _chosen_decoder(self, decoder: str | Path | None) -> TinyVAE | None:
        if decoder is None or decoder == "full":
            return self._tiny if decoder is None else None
        config = settings_of(self.vae)
        tiny = load_tiny_vae(find_tiny_vae(self._folder) if decoder == "tiny" else decoder, dtype=self.vae.dtype)
        strides = {"spatial_stride": config.scale_factor_spatial, "images_per_latent": config.scale_factor_temporal}
        check_fits(tiny, latent_channels=config.z_dim, **strides)
        return tiny.to(self._device)  # type: ignore[arg-type]  # diffusers' annotation

    def warm_up(self, height: int | None = None, width: int | None = None) -> None:
        """Make a short video with a prompt switch, so that whatever happens once (compiling, choosing kernels) has happened.

        Videos of the size that follows meet no shape for the first time.
        """
        blocks = 2 + -(-max(0, self.config.window) // self.config.block)  # a full window, a block after it and one after a switch
        session = self.session("-", num_latent_frames=blocks * self.config.block, height=height, width=width, seed=0)
        for number, _ in enumerate(session):
            if number == blocks - 2:
                session.prompt("- -")

    @contextmanager
    def _plain_transformer(self) -> Iterator[None]:
        """For a change of the transformer: while it lasts its passes are neither compiled nor recorded, afterwards they are anew."""
        if self._steady is not None:
            self._steady.remove()
            self._steady = None
        try:
            yield
        finally:
            self._conditioner = None  # what it keeps of prompts was computed with the weights as they were
            compiler = default_compiler(self._device) if self._compile else None
            capture = cuda_graph if self._graphs and self._device.type == "cuda" else None
            if compiler is not None or capture is not None:
                self._steady = SteadyPasses(self.transformer, block=self.config.block, compiler=compiler, capture=capture)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:  # type: ignore[override]
        """Keep the text encoder, by far the largest part, on the CPU and move it to the device only while a prompt is read.

        Transformer and VAE take turns at every block, so they stay on the device; moving them would cost more than it saves.
        """
        device = torch.device(device if gpu_id is None else f"cuda:{gpu_id}")
        self.place_text_encoder("on_demand")
        self.to(device)

    def place_text_encoder(self, mode: TextEncoderMode) -> None:
        """Where the text encoder is after the next `to`: "resident" on the device, "on_demand" there only while it encodes a prompt, or
        always on the "cpu". Raises ValueError for another mode.
        """
        check_mode(mode)
        self._text_mode = mode

    def to(self, *args: Any, **kwargs: Any) -> LongLivePipeline:
        """As in diffusers; the text encoder stays on the CPU if `place_text_encoder` or `enable_model_cpu_offload` says so."""
        kept = self.text_encoder
        if self._text_mode != "resident" and kept is not None:
            torch.nn.Module.to(kept, "cpu")
            self.text_encoder = None
        try:
            with self._plain_transformer():
                super().to(*args, **kwargs)
        finally:
            self.text_encoder = kept
        if self._tiny is not None:
            torch.nn.Module.to(self._tiny, device=self.vae.device, dtype=self.vae.dtype)
        if self._quantize is not None:
            check_device(self._quantize, self._device)
        return self

    @property
    def _device(self) -> torch.device:
        return self.transformer.device

    @property
    def _spatial_stride(self) -> int:
        return settings_of(self.vae).scale_factor_spatial

    @property
    def _text(self) -> Conditioner:
        if self._conditioner is None:
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError("this pipeline has no text encoder and tokenizer; give prompt_embeds")
            encoder = TextEncoder(
                self.text_encoder,
                self.tokenizer,
                text_len=self.transformer.config.text_len,
                device=self._device,
                dtype=self.transformer.dtype,
                mode=self._text_mode,
            )
            self._conditioner = Conditioner(encoder, self.transformer)
        return self._conditioner

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = (self.config.height if height is None else height, self.config.width if width is None else width)
        check_size(*size, self._spatial_stride * self.transformer.config.patch_size[1])
        return size

    def _cache(self, num_latent_frames: int | None, height: int, width: int, batch: int) -> KVCache:
        if self.config.window == EVERYTHING:
            if num_latent_frames is None:
                raise ValueError("an endless video needs a window; with window -1 give seconds or num_latent_frames")
            window = Window.full(num_latent_frames)
        else:
            window = Window.of(self.config.window, self.config.sink)
        size = height // self._spatial_stride, width // self._spatial_stride
        relative = self.config.relative_rope
        return ring_cache(self.transformer, *size, window=window, batch=batch, relative=relative, quantize=self._cache_format)

    def _embeddings(self, batch: int) -> Embeddings:
        return Embeddings(lambda prompt: self._text.embed([prompt]), lambda text: self._text.project_embedding(text, batch))

    def _denoiser(self, batch: int, negative: Text | None = None) -> Denoiser:
        if self.config.guidance_scale == 1:
            if negative is not None:
                raise ValueError("negative_prompt_embeds are given, but there is no guidance: guidance_scale is 1")
            return Denoiser(self.transformer)
        text = torch.zeros(1, 1, self.transformer.config.text_dim) if negative is None else negative
        with torch.no_grad():
            away = self.transformer.project_text(text.to(self._device).expand(batch, -1, -1))
            return Denoiser(self.transformer, guidance_scale=self.config.guidance_scale, negative=away)

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # not the device: another thread may be decoding on it

    def _on_step(self, callback: Callback, names: Sequence[str]) -> OnStep:
        return lambda number, t, x0: (callback(self, number, t, {"latents": x0} if "latents" in names else {}) or {}).get("latents")

    def _decode(self, latents: Latents) -> Images:
        decoder = self.decoder()
        return torch.cat([decoder.decode(part) for part in latents.split(self.config.block, dim=1)], dim=2)

    def _postprocess(self, images: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Image]]:
        return VideoProcessor(vae_scale_factor=self._spatial_stride).postprocess_video(images.float(), output_type=output_type)


def _rows(text: Text | None, rows: slice) -> Text | None:
    """The embeddings of some videos; one for all of them stays."""
    return text if text is None or len(text) == 1 else text[rows]


def _generators(generator: Generators, rows: slice, count: int) -> Generators:
    """Those of some of `count` videos. Raises ValueError unless there is one, or one for each of them."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != count or not all(isinstance(each, torch.Generator) for each in generator):
        raise ValueError(f"{len(generator)} generators for {count} videos; give one, or one for each video of each prompt")
    return list(generator)[rows]


def _embedded(prompt: Any, prompt_embeds: Text, videos: int) -> list[PromptSchedule]:
    if prompt is not None:
        raise ValueError("both prompt and prompt_embeds are given; choose one")
    if prompt_embeds.ndim != 3 or len(prompt_embeds) == 0 or len(prompt_embeds) % videos:
        raise ValueError(f"prompt_embeds are [videos, L, E] with {videos} for each prompt, not {list(prompt_embeds.shape)}")
    return [PromptSchedule.single("prompt_embeds")] * (len(prompt_embeds) // videos)


def _plans(prompt: Any, prompt_embeds: Text | None, videos: int, num_latent_frames: int) -> list[PromptSchedule]:
    check_whole("num_videos_per_prompt", videos, 1)
    plans = _schedules(prompt) if prompt_embeds is None else _embedded(prompt, prompt_embeds, videos)
    for plan in plans:
        plan.validate(num_latent_frames)
    return plans


def _schedules(prompt: str | Sequence[str] | PromptSchedule | Sequence[PromptSchedule] | None) -> list[PromptSchedule]:
    prompts = [prompt] if isinstance(prompt, (str, PromptSchedule)) else list(prompt or ())
    if not prompts:
        raise ValueError("no prompt; give at least one, or prompt_embeds")
    return [PromptSchedule.single(one) if isinstance(one, str) else one for one in prompts]
