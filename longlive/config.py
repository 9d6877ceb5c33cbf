"""Every setting of inference, serving and training, with its default: what a YAML file or `key=value` on the command line may set.

Evaluation, benchmarks and experiments have command-line options of their own (`--help`). `longlive.settings` fills these classes; this
module knows nothing about what the settings do. A long file, so that all of them are found in one place.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

RELATIVE_TO_FILE = {"relative_to_file": True}  # marks a setting whose path, in a YAML file, is relative to that file's folder


def check_threads(threads: int | None) -> None:
    """Raises ValueError for a number of CPU threads with which no process can start."""
    most = max(256, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"threads {threads}: choose 1 to {most}; more than there are cores make nothing faster")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Settings of `inference.py` and `interactive_inference.py`. None means the model's own value, or one that follows from the others."""

    # the model: a name, a folder in diffusers layout, or the released files
    model: str | None = None  # None without wan_dir: "miniature"
    wan_dir: str | None = None  # folder of Wan-AI/Wan2.1-T2V-1.3B as released: text encoder, tokenizer, VAE
    checkpoint: str | None = None  # longlive_base.pt; only with wan_dir
    which: str | None = None  # the part of a checkpoint that holds several: generator, ema, …; None: generator
    lora: Any = None  # merged into the model before anything else: a path, path:strength, {path: …, strength: …}, or a list of these
    lora_alpha: float | None = None  # of LoRAs that do not say their own; None: their rank
    device: str = "auto"  # auto: cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on cuda, float32 on cpu
    threads: int | None = None  # CPU threads; None: one for a small model, else torch's default
    text_encoder: Literal["resident", "on_demand", "cpu"] = "resident"  # on_demand: on the GPU only while it encodes; cpu: never
    attention: str = "auto"  # fa3, fa2, cudnn, sdpa; auto: the fastest available; in 8 bits: fa3-fp8, sage
    compile: bool = False  # blocks that see a full window run through torch.compile, which takes time once
    graphs: bool = False  # on a GPU these passes are recorded as CUDA graphs
    quantize: Literal["int8", "int8-weights", "fp8"] | None = None  # linear layers in 8 bits, see docs/quantization.md
    quantize_cache: Literal["int8", "fp8"] | None = None  # keys and values of past frames in 8 bits
    decode_latent_frames: int | None = None  # decoded in one call; fewer than a block: the same images with less memory
    low_memory: bool = False  # choose text_encoder, decode_latent_frames, quantize, quantize_cache and decoder for the memory that is free

    # the video
    prompt: str | None = None
    prompts: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # a .txt or .jsonl file
    timeline: str | None = None  # a .json file of a live session: make the same video again, with its prompts, length, seed and sampling
    image: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # a picture that every video begins with
    continue_from: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # a video that every video continues
    seconds: float | None = None  # of video, rounded up to whole blocks
    num_latent_frames: int | None = None  # instead of seconds: a multiple of the block
    num_frames: int | None = None  # instead of seconds: pixel frames, exactly; whole blocks are made and cut
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_samples: int = 1  # videos per prompt, each with its own seed
    switch_frame_indices: tuple[int, ...] | None = None  # latent frames of the switches, for prompt files that give none

    # sampling
    window: int | None = None  # latent frames a block attends to, the sink and itself included; -1: all
    sink: int | None = None  # how many of these are the first frames of the video
    denoising_steps: tuple[int, ...] | None = None  # before the shift, decreasing
    timestep_shift: float | None = None
    context_timestep: float | None = None  # t (0 to 1000) at which finished frames pass to be cached; no noise is added
    keep_sink: bool | None = None  # at a prompt switch (global_sink of the released configurations); false: recached frames are the sink
    recache: Literal["joint", "causal", "none", "clear"] | None = None  # of the past at a switch; all but joint are for comparison
    relative_rope: bool | str | None = None  # rotate the sink's keys to just before the window; auto (or None): beyond 120 latent frames

    # output
    output: str = "outputs"
    decoder: str = "full"  # of latents: the VAE's own; tiny: the one in the model's folder, faster and less exact; or the path of one
    scale: int | None = None  # repeat every pixel this many times; None: enough for 256 pixels
    crf: int = 18  # H.264 quality: 0 lossless, 51 worst
    overwrite: bool = False  # replace finished videos
    realtime: bool | None = None  # generate no faster than the video plays; None: when a person types at a terminal
    show: Literal["page", "terminal"] | None = None  # while prompts are typed: the page in a browser, or a picture in the terminal

    def __post_init__(self) -> None:
        lengths = ("seconds", "num_latent_frames", "num_frames")
        for names in (("prompt", "prompts"), ("image", "continue_from"), lengths, ("model", "wan_dir")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"both {given[0]} and {given[1]} are given; choose one")
        if self.timeline is not None:
            for name in ("prompt", "prompts", "seconds", "num_latent_frames", "num_frames"):
                if getattr(self, name) is not None:
                    raise ValueError(f"both timeline and {name} are given; a timeline says both what is shown and how long")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds {self.seconds}: a video lasts longer than 0 seconds")
        for name in ("num_latent_frames", "num_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: a video has at least one block of latent frames")
        if self.checkpoint is not None and self.wan_dir is None:
            raise ValueError("checkpoint is given without wan_dir, the folder of the text encoder and VAE that go with it")
        if self.which is not None and self.checkpoint is None:
            raise ValueError(f"which={self.which} names a part of a checkpoint; give checkpoint, or leave which out")
        if self.lora_alpha is not None and self.lora is None:
            raise ValueError("lora_alpha is given without lora; give the LoRA, or leave lora_alpha out")
        check_threads(self.threads)
        if self.window is not None and self.window != -1 and self.window < 1:
            raise ValueError(f"window {self.window}: choose latent frames, or -1 for all of them")
        if self.sink is not None and self.sink < 0:
            raise ValueError(f"sink {self.sink}: choose 0 or more latent frames")
        if self.timestep_shift is not None and not 0 < self.timestep_shift < math.inf:
            raise ValueError(f"timestep_shift {self.timestep_shift}: choose a number above 0")
        if self.context_timestep is not None and not 0 <= self.context_timestep <= 1000:
            raise ValueError(f"context_timestep {self.context_timestep}: choose one from 0 to 1000")
        if isinstance(self.relative_rope, str) and self.relative_rope != "auto":
            raise ValueError(f"relative_rope {self.relative_rope!r}: choose auto, true or false")
        if self.decode_latent_frames is not None and self.decode_latent_frames < 1:
            raise ValueError(f"decode_latent_frames {self.decode_latent_frames}: at least one latent frame is decoded in a call")
        if self.low_memory:
            usual = {field.name: field.default for field in dataclasses.fields(self)}
            for name in ("text_encoder", "decode_latent_frames", "quantize", "quantize_cache", "decoder"):
                if getattr(self, name) != usual[name]:
                    raise ValueError(f"{name} is given, which low_memory chooses; leave one of them out")
        if self.num_samples < 1:
            raise ValueError(f"num_samples {self.num_samples}: at least one video per prompt")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: choose one from 0 to 2^63 - 1")
        if self.scale is not None and self.scale < 1:
            raise ValueError(f"scale {self.scale}: pixels are repeated a whole number of times, at least once")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf {self.crf}: H.264 knows 0 (lossless) to 51")
        if self.denoising_steps is not None and (
            not self.denoising_steps
            or list(self.denoising_steps) != sorted(set(self.denoising_steps), reverse=True)
            or not 0 < self.denoising_steps[-1] <= self.denoising_steps[0] <= 1000
        ):
            raise ValueError(f"denoising_steps {list(self.denoising_steps)}: choose decreasing numbers from 1000 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `python -m longlive.serving`."""

    host: str = "127.0.0.1"  # an address that other machines can reach needs a token
    port: int = 8000
    token: str | None = None  # None: one is generated and printed where one is needed
    max_sessions: int | None = None  # at the same time; None: as many as fit into memory, at most 8
    prompt_chars: int = 2000
    messages_per_second: float = 20.0  # per client; faster updates are merged and applied when the rate allows
    idle_minutes: float = 10.0  # a session from which no client reads ends after this time
    realtime: bool = True  # generate no faster than the video is played
    output: str = "outputs/live"  # folder of recordings and timelines
    open_page: bool = False  # in a browser, once the server listens
    scale: int | None = None  # repeat every pixel this many times; None: enough for 256 pixels
    video: InferenceConfig = dataclasses.field(default_factory=InferenceConfig)  # the model, its size and sampling

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("prompt_chars", 1), ("messages_per_second", 0.1), ("idle_minutes", 0.01)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small; choose at least {least}")
        if self.port > 65535:
            raise ValueError(f"port {self.port}: choose one from 0 (any that is free) to 65535")
        if self.max_sessions is not None and self.max_sessions < 1:
            raise ValueError(f"max_sessions {self.max_sessions}: at least one session must fit")
        if self.token is not None and len(self.token) < 8:
            raise ValueError("the token is shorter than 8 characters; choose a longer one, or leave it out for a random one")
        shown = ("prompt", "prompts", "timeline", "image", "continue_from", "seconds", "num_latent_frames", "num_frames")
        shown += ("switch_frame_indices", "seed", "num_samples")
        usual = InferenceConfig()
        for name in (*shown, "output", "scale", "crf", "overwrite", "realtime", "show"):
            if getattr(self.video, name) != getattr(usual, name):
                why = "clients decide what is shown" if name in shown else "the server has its own settings for files (output, scale)"
                raise ValueError(f"video.{name} is given, but {why}; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Stage `language`: the miniature's tokenizer and text encoder."""

    lr: float = 3e-3
    batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Stage `autoencoder`: the miniature's `AutoencoderKLWan`, the residual variant on patches of 2 x 2 pixels."""

    initial: str | None = None  # folder of an autoencoder to start from, whose sizes are used; None: random weights of these sizes
    decoder_only: bool = False  # keep the encoder of `initial`, so that a transformer trained on its latents stays valid
    base_dim: int = 32
    decoder_dim: int | None = None  # None: base_dim; with decoder_only, an `initial` of another width gets a new decoder
    dim_mult: tuple[int, ...] = (1, 1, 1)
    num_res_blocks: int = 0  # per level, and one in the decoder; those that `initial` lacks are added as the identity
    z_dim: int = 16
    spatial_padding: Literal["zeros", "circular"] = "circular"  # the world is a torus
    lr: float = 1.5e-3
    batch: int = 8
    images_per_chunk: int = 4
    stream_from: int = 3000  # until this step videos grow longer; at first most are a single chunk
    reset: float = 0.2  # probability, at every chunk, that new videos begin
    kl_weight: float = 1e-4
    latent_noise: float = 0.2  # latents are decoded with noise of up to this fraction of their standard deviation
    subject_weight: float = 4.0  # of subject pixels, relative to 1 for the background
    edge_weight: float = 6.0  # added for pixels at the subject's edge
    gradient_weight: float = 0.5  # of the error in differences between neighbouring pixels
    oversampled: tuple[str, ...] = ("cross", "ring", "gray")  # attribute values that are reconstructed worst:
    oversampling: float = 2.0  # new videos have each of them this many times as often


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """Stage `tiny_decoder`: a small decoder of the miniature's latents (`models/tiny_vae.py`), distilled from its autoencoder."""

    autoencoder: str = "runs/miniature/autoencoder/export"
    target: Literal["images", "full"] = "images"  # what it learns to make: the videos, or what the full decoder makes of them
    widths: tuple[int, ...] = (64, 32)  # channels of each level; each doubles height and width
    growth: tuple[int, ...] = (2, 2)  # by how much each level multiplies the number of frames
    num_blocks: int = 2  # memory blocks per level
    patch_size: int = 2  # pixels, each way, that the last layer makes as channels
    lr: float = 1.5e-3
    batch: int = 8
    images_per_chunk: int = 4
    stream_from: int = 1500  # until this step videos grow longer; at first most are a single chunk
    reset: float = 0.2  # probability, at every chunk, that new videos begin
    latent_noise: float = 0.1  # latents are decoded with noise of up to this fraction of their standard deviation
    subject_weight: float = 4.0  # of subject pixels, relative to 1 for the background
    edge_weight: float = 6.0  # added for pixels at the subject's edge
    gradient_weight: float = 0.5  # of the error in differences between neighbouring pixels
    oversampled: tuple[str, ...] = ("cross", "ring", "gray")  # attribute values that are reconstructed worst:
    oversampling: float = 2.0  # new videos have each of them this many times as often


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalInitConfig:
    """Stage `causal_init`: the miniature's transformer by teacher forcing; with `objective=ode` section `ode` is used instead."""

    objective: Literal["teacher_forcing", "ode"] = "teacher_forcing"
    language: str = "runs/miniature/language/export"  # exports of the earlier stages
    autoencoder: str = "runs/miniature/autoencoder/export"
    size: str = "miniature"  # of models/zoo.py
    initial: str | None = None  # folder of a transformer to start from; None: random weights of `size`
    lr: float = 4e-3  # of Muon on the blocks' matrices; half of it for AdamW on the rest
    clip_batch: int = 8  # videos of several blocks, every `clip_every` steps
    clip_every: int = 4
    bfloat16_linears: bool | None = None  # in linear layers, during training; None: if the CPU has instructions for it
    oversampled: tuple[str, ...] = ("cross", "ring")  # shapes that are not convex are learned last:
    oversampling: float = 3.0  # first blocks with them are drawn this many times as often
    first_batch: int = 128  # first blocks per step
    num_videos: int = 2000
    num_first_videos: int = 16000
    phrasings: int = 16  # sentences per caption
    window: int = 9  # latent frames a block attends to, the sink and itself included
    sink: int = 3
    block: int = 3
    timestep_shift: float = 3.0
    first_shift: float = 8.0  # of the timesteps of first blocks: subject, position and shape are decided above sigma 0.8
    denoising_steps: tuple[int, ...] = tuple(range(1000, 0, -50))
    history_sigma: float = 0.1  # later blocks see a history with noise of up to this level
    max_position: int = 1200  # latent frames
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Stage `teacher`: the miniature's bidirectional transformer by flow matching."""

    language: str = "runs/miniature/language/export"  # exports of the earlier stages
    autoencoder: str = "runs/miniature/autoencoder/export"
    size: str = "miniature"  # of models/zoo.py
    initial: str | None = None  # folder of a transformer to start from; None: random weights of `size`
    lr: float = 4e-3  # of Muon on the blocks' matrices; half of it for AdamW on the rest
    clip_frames: int = 12
    clip_batch: int = 8  # whole clips, every `clip_every` steps
    clip_every: int = 4
    short_frames: int = 3  # beginnings of clips, every step: all that a prompt says must be invented here
    short_batch: int = 32
    bfloat16_linears: bool | None = None  # in linear layers, during training; None: if the CPU has instructions for it
    oversampled: tuple[str, ...] = ("cross", "ring", "gray", "brown")  # not convex, of low contrast: learned last
    oversampling: float = 2.0
    num_clips: int = 2000
    num_shorts: int = 8000
    phrasings: int = 16
    timestep_shift: float = 8.0  # subject, position and shape are decided above sigma 0.8
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """Stage `causal_init` by regression on the ends of a teacher's ODE trajectories, which are generated first."""

    # networks, in any layout that inference reads
    student: str | None = None  # where training starts; None: as the teacher
    teacher: str | None = None  # bidirectional
    components: str | None = None  # folder of text encoder, tokenizer and VAE
    embeddings: str = "runs/embeddings"  # folder of text embeddings, computed once

    # trajectories
    pairs: str = "runs/ode_pairs"  # folder
    num_pairs: int = 1500
    prompts: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # .txt, one per line; the first num_pairs are used
    negative_prompt: str | None = None  # None: no text
    guidance_scale: float = 6.0  # s of the teacher: v_n + s (v_c - v_n)
    num_steps: int = 48  # Euler steps of the teacher
    height: int = 480
    width: int = 832
    clip_frames: int = 21

    # the student
    window: int = 12  # latent frames a block attends to, the sink and itself included
    sink: int = 3
    block: int = 3
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    clean_history: bool = False  # blocks see clean past blocks, instead of the noisy ones
    batch: int = 2
    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_norm: float = 10.0
    checkpointing: bool = True
    validation_videos: int = 4
    validation_frames: int = 21  # latent
    oracle: bool = False  # for the miniature, whose prompts are captions of its world: judge validation videos by its oracle

    def __post_init__(self) -> None:
        for step in self.denoising_steps:
            if self.num_steps * step % 1000:
                raise ValueError(
                    f"a trajectory of num_steps {self.num_steps} does not pass through denoising step {step}; "
                    f"choose a multiple of {1000 // math.gcd(*self.denoising_steps, 1000)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Stages `init` and `long`: distribution matching on the generator's own videos. Frames are latent frames."""

    # networks, in any layout that inference reads
    generator: str | None = None  # where training starts
    generator_lora: str | None = None  # merged into the generator first
    teacher: str | None = None  # bidirectional, frozen
    critic: str | None = None  # bidirectional; None: starts as the teacher
    components: str | None = None  # folder of text encoder, tokenizer and VAE
    embeddings: str = "runs/embeddings"  # folder of text embeddings, computed once

    # data
    prompts: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # .txt, one per line, or .jsonl of chains
    switch_prompts: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # .txt, line i continues line i of prompts
    negative_prompt: str | None = None  # for the teacher's guidance; None: no text
    height: int = 480
    width: int = 832

    # videos
    window: int = 12  # latent frames a block attends to, the sink and itself included
    sink: int = 3
    block: int = 3
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    context_timestep: float = 0.0
    clip_frames: int = 21  # what teacher and critic judge at a time
    overlap: int = 3  # with the previous clip
    max_frames: tuple[int, ...] = (21,)  # lengths of videos, one chosen for each
    switch_at: tuple[int, ...] = ()  # frames at which the prompt may switch; empty: never
    num_switches: int = 1  # how many of them are chosen for each video; each takes the next prompt of its chain
    keep_sink: bool = False  # at a switch; false: it is recached too
    recache: Literal["joint", "causal", "none", "clear"] = "joint"
    anchor_context: int | None = None  # frames decoded to get the first image of a clip; None: the whole previous clip

    # optimisation
    batch: int = 1  # videos per rank
    gradient_accumulation: int = 1  # clips per optimiser update, for each network
    critic_updates: int = 5  # per update of the generator
    lr: float = 2e-6
    critic_lr: float = 4e-7
    lr_schedule: Literal["constant", "cosine"] = "constant"  # of both: constant (paper), or down to a fiftieth at the last step
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    max_norm: float = 10.0
    guidance_scale: float = 4.0  # s of the teacher: r_n + s (r_c - r_n); 3.0 in the released configurations, which count s - 1
    guidance_rescale: float = 0.0  # 0 to 1: how far the guided prediction is rescaled to the norm of r_c
    lora_rank: int | None = None  # train adapters on generator and critic instead of all weights
    lora_alpha: float | None = None  # None: the rank
    ema_decay: float | None = 0.99  # of the generator's weights; not used with adapters
    ema_start: int = 200  # step
    checkpointing: bool = True  # recompute the blocks' activations in the backward pass
    bfloat16_linears: bool | None = False  # for CPUs, None: for one with instructions for it; GPUs compute in bfloat16 anyway

    # validation
    validation_prompts: str | None = dataclasses.field(default=None, metadata=RELATIVE_TO_FILE)  # .txt or .jsonl; None: see oracle
    validation_videos: int = 4
    validation_frames: int = 21
    oracle: bool = False  # for the miniature: validation videos of its world, judged by its oracle; false: of the first prompts

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: choose 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train.py`: those of every stage, and a section for each stage."""

    stage: Literal["language", "autoencoder", "tiny_decoder", "teacher", "causal_init", "init", "long"] = "causal_init"
    run: str = "runs/train"  # folder of checkpoints, metrics, pictures and finally `export`
    steps: int = 1000
    seed: int = 0
    device: str = "auto"  # auto: cuda if available, else cpu
    threads: int | None = None  # CPU threads; None: torch's default
    save_every: int = 250
    validate_every: int = 500
    log_every: int = 25
    keep_checkpoints: int = 0  # how many of the newest are also kept under their own names; the newest is always kept
    keep_best: str | None = None  # a metric of validation, "oracle/shape" for example: its best export is kept in `best`
    loss_spike_factor: float | None = 100.0  # a loss this many times its running median stops the run; None: only one that is not finite
    wandb: Literal["off", "offline", "online"] = "off"  # whether metrics also go to wandb
    wandb_project: str = "longlive"
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    tiny_decoder: TinyDecoderConfig = dataclasses.field(default_factory=TinyDecoderConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    causal_init: CausalInitConfig = dataclasses.field(default_factory=CausalInitConfig)
    ode: OdeConfig = dataclasses.field(default_factory=OdeConfig)
    init: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    long: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        for name, every in (("save_every", self.save_every), ("validate_every", self.validate_every), ("log_every", self.log_every)):
            if every < 1:
                raise ValueError(f"{name} {every}: choose 1 step or more")
        check_threads(self.threads)
        if self.keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints {self.keep_checkpoints}: choose 0 or more")
        if self.loss_spike_factor is not None and self.loss_spike_factor <= 1:
            raise ValueError(f"loss_spike_factor {self.loss_spike_factor}: choose a factor above 1, or null")
