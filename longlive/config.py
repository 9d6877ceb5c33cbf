"""Every setting there is, on one page, and `load`. Knows nothing about what the settings do."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")
BESIDE = {"beside": True}
"""Marks a setting that names a file: in a YAML file its path starts at that file's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Settings of `inference.py` and `interactive_inference.py`. What is None is the model's own or follows from the rest."""

    # which model: a name or a folder in diffusers layout, or the released files
    model: str | None = None  # "miniature" when neither this nor wan_dir is given
    wan_dir: str | None = None  # folder of Wan-AI/Wan2.1-T2V-1.3B as released: text encoder, tokenizer, VAE
    checkpoint: str | None = None  # longlive_base.pt; only with wan_dir
    lora: str | None = None  # lora.pt, merged into the checkpoint before anything else
    device: str = "auto"  # cuda when there is one; else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # bfloat16 on cuda, float32 on cpu
    threads: int | None = None  # CPU threads; None: one for a small model, else as many as torch takes
    text_encoder: Literal["resident", "on_demand"] = "resident"  # on_demand: on the CPU but for the moment it reads a prompt
    attention: str = "auto"  # fa3, fa2, cudnn, sdpa, or the fastest of them that works here

    # what is made
    prompt: str | None = None
    prompts: str | None = dataclasses.field(default=None, metadata=BESIDE)  # a .txt or .jsonl file
    timeline: str | None = None  # of a live session, a .json file: the same video again, with its prompts, length, seed and sampling
    seconds: float | None = None  # rounded up to whole blocks
    num_latent_frames: int | None = None  # instead of seconds: a multiple of the block
    num_frames: int | None = None  # instead of seconds: pixel frames, 4 x latent frames - 3, as in diffusers
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_samples: int = 1  # videos a prompt, each with a seed of its own
    switch_frame_indices: tuple[int, ...] | None = None  # where prompts of a file that says nothing about it follow each other

    # how it is sampled
    window: int | None = None  # latent frames a block may see, sink and itself included; -1 = all
    sink: int | None = None  # of these, the first frames of the video
    denoising_steps: tuple[int, ...] | None = None  # before the shift, falling
    timestep_shift: float | None = None
    context_timestep: float | None = None  # noise level at which finished frames are remembered
    keep_sink: bool | None = None  # at a prompt switch; false refreshes it (global_sink of the released configurations)
    recache: Literal["joint", "causal", "none", "clear"] | None = None  # the past at a switch; other than joint: for comparison
    relative_rope: bool | None = None  # number the visible frames 0, 1, 2 …: any length stays inside the trained range

    # what is written
    output: str = "outputs"
    scale: int | None = None  # every pixel this many times; None: up to at least 256 pixels
    crf: int = 18  # H.264 quality: 0 lossless, 51 worst
    overwrite: bool = False  # make finished videos again

    def __post_init__(self) -> None:
        for names in (("prompt", "prompts"), ("seconds", "num_latent_frames", "num_frames"), ("model", "wan_dir")):
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
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads {self.threads}: at least one")
        if self.num_samples < 1:
            raise ValueError(f"num_samples {self.num_samples}: at least one video a prompt")
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
            raise ValueError(f"denoising_steps {list(self.denoising_steps)}: choose falling numbers from 1000 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `python -m longlive.serving`."""

    host: str = "127.0.0.1"  # another address than this machine's own wants a token
    port: int = 8000
    token: str | None = None  # None: drawn and printed, where one is wanted
    max_sessions: int | None = None  # at a time; None: as many as fit into memory, at most 8
    prompt_chars: int = 2000
    messages_per_second: float = 20.0  # of a client; of more only the newest count
    idle_minutes: float = 10.0  # after which a session that nobody takes anything from ends
    realtime: bool = True  # make no more than is about to be shown
    output: str = "outputs/live"  # recordings and timelines
    scale: int | None = None  # every pixel this many times; None: up to at least 256 pixels
    video: InferenceConfig = dataclasses.field(default_factory=InferenceConfig)  # which model, its size and sampling

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("prompt_chars", 1), ("messages_per_second", 0.1), ("idle_minutes", 0.01)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is too small; choose at least {least}")
        if self.max_sessions is not None and self.max_sessions < 1:
            raise ValueError(f"max_sessions {self.max_sessions}: at least one session must fit")
        if self.token is not None and len(self.token) < 8:
            raise ValueError("the token is shorter than 8 characters; choose a longer one, or leave it out and one is drawn")
        shown = (
            "prompt",
            "prompts",
            "timeline",
            "seconds",
            "num_latent_frames",
            "num_frames",
            "seed",
            "num_samples",
            "switch_frame_indices",
        )
        usual = InferenceConfig()
        for name in (*shown, "output", "scale", "crf", "overwrite"):
            if getattr(self.video, name) != getattr(usual, name):
                whose = "comes from those who type" if name in shown else "is the server's own matter (output, scale)"
                raise ValueError(f"video.{name} is given, but what is shown {whose}; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Stage `language`: the miniature's tokenizer and text encoder."""

    lr: float = 3e-3
    batch: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Stage `autoencoder`: the miniature's `AutoencoderKLWan`, the residual kind on patches of 2 x 2 pixels."""

    initial: str | None = None  # folder of an autoencoder to start from, whose sizes count; None: random weights of these sizes
    decoder_only: bool = False  # leave the encoder of `initial` as it is, so that a transformer of its latents stays valid
    base_dim: int = 32
    decoder_dim: int | None = None  # None: as base_dim; with decoder_only, an `initial` of another width gets a new decoder
    dim_mult: tuple[int, ...] = (1, 1, 1)
    num_res_blocks: int = 0  # per level of the encoder, one more in the decoder; more than `initial` has are added as the identity
    z_dim: int = 16
    spatial_padding: Literal["zeros", "circular"] = "circular"  # the world is a torus
    lr: float = 1.5e-3
    batch: int = 8
    images_per_chunk: int = 4
    stream_from: int = 3000  # until this step videos get longer; before it they are mostly a first chunk
    reset: float = 0.2  # chance, at every chunk, that new videos begin
    kl_weight: float = 1e-4
    latent_noise: float = 0.2  # latents are decoded with noise of up to this share of their deviation
    subject_weight: float = 4.0  # of pixels that are not background, against 1 of others
    edge_weight: float = 6.0  # more for pixels at the subject's edge
    gradient_weight: float = 0.5  # of the error of differences between neighbouring pixels
    hard: tuple[str, ...] = ("cross", "ring", "gray")  # values of attributes that are reconstructed worst,
    hard_weight: float = 2.0  # with which videos begin this much more often, for each of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalInitConfig:
    """Stage `causal_init`: the miniature's transformer by teacher forcing, or with `objective=ode` what section `ode` says."""

    objective: Literal["teacher_forcing", "ode"] = "teacher_forcing"
    language: str = "runs/miniature/language/export"  # what the earlier stages exported
    autoencoder: str = "runs/miniature/autoencoder/export"
    size: str = "miniature"  # of models/zoo.py
    initial: str | None = None  # folder of a transformer to start from; None: random weights of `size`
    lr: float = 4e-3  # of Muon on the blocks' matrices; AdamW on the rest has half
    clip_batch: int = 8  # videos of several blocks, every `clip_every` steps
    clip_every: int = 4
    bfloat16: bool | None = None  # linear layers, while training; None: where the processor has instructions for it
    hard: tuple[str, ...] = ("cross", "ring")  # shapes that are not convex are learned last,
    hard_weight: float = 3.0  # so first blocks with them are drawn this much more often
    first_batch: int = 128  # first blocks a step
    num_videos: int = 2000
    num_first_videos: int = 16000
    phrasings: int = 16  # of every caption
    window: int = 9  # latent frames a block sees, the sink and itself included
    sink: int = 3
    block: int = 3
    timestep_shift: float = 3.0
    first_shift: float = 8.0  # of the noise levels of first blocks: subject, place and shape are decided above sigma 0.8
    denoising_steps: tuple[int, ...] = tuple(range(1000, 0, -50))
    history_sigma: float = 0.1  # noise in the history that later blocks see, up to this level
    max_position: int = 1200  # latent frames
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Stage `teacher`: the miniature's bidirectional transformer by flow matching."""

    language: str = "runs/miniature/language/export"  # what the earlier stages exported
    autoencoder: str = "runs/miniature/autoencoder/export"
    size: str = "miniature"  # of models/zoo.py
    initial: str | None = None  # folder of a transformer to start from; None: random weights of `size`
    lr: float = 4e-3  # of Muon on the blocks' matrices; AdamW on the rest has half
    clip_frames: int = 12
    clip_batch: int = 8  # whole clips, every `clip_every` steps
    clip_every: int = 4
    short_frames: int = 3  # first frames alone, every step: all that a prompt says must be invented here
    short_batch: int = 32
    bfloat16: bool | None = None  # linear layers, while training; None: where the processor has instructions for it
    hard: tuple[str, ...] = ("cross", "ring", "gray", "brown")  # shapes that are not convex, backgrounds of low contrast: learned last,
    hard_weight: float = 2.0  # so videos with them are drawn this much more often, for each of them
    num_clips: int = 2000
    num_shorts: int = 8000
    phrasings: int = 16
    timestep_shift: float = 8.0  # subject, place and shape are decided above sigma 0.8
    ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """Stage `causal_init` by regression on the ends of a teacher's trajectories, which are made first."""

    # networks, in any layout that inference reads
    student: str | None = None  # where training starts; None: as the teacher
    teacher: str | None = None  # bidirectional
    components: str | None = None  # folder of text encoder, tokenizer and VAE
    embeddings: str = "runs/embeddings"  # folder of text embeddings, computed once

    # trajectories
    pairs: str = "runs/ode_pairs"  # folder
    num_pairs: int = 1500
    prompts: str | None = dataclasses.field(default=None, metadata=BESIDE)  # .txt, one a line; as many as there are pairs are used
    negative_prompt: str | None = None  # None: no text
    guidance_scale: float = 6.0  # s of the teacher: v_n + s (v_c - v_n)
    num_steps: int = 48  # of the teacher's Euler solution
    height: int = 480
    width: int = 832
    clip_frames: int = 21

    # the student
    window: int = 12  # latent frames a block sees, the sink and itself included
    sink: int = 3
    block: int = 3
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    clean_history: bool = False  # blocks see clean blocks before them, instead of these at their own levels
    batch: int = 2
    lr: float = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_norm: float = 10.0
    checkpointing: bool = True
    validation_videos: int = 4
    validation_frames: int = 21
    oracle: bool = False  # the miniature's: prompts are captions of its world, videos are read back


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Stages `init` and `long`: the generator on videos of its own making, judged by a short-clip teacher."""

    # networks, in any layout that inference reads
    generator: str | None = None  # where training starts
    generator_lora: str | None = None  # merged into it before anything else
    teacher: str | None = None  # bidirectional, frozen
    critic: str | None = None  # bidirectional; None: begins as the teacher
    components: str | None = None  # folder of text encoder, tokenizer and VAE
    embeddings: str = "runs/embeddings"  # folder of text embeddings, computed once

    # data
    prompts: str | None = dataclasses.field(default=None, metadata=BESIDE)  # .txt, one a line, or .jsonl of pairs
    switch_prompts: str | None = dataclasses.field(default=None, metadata=BESIDE)  # .txt, line i follows on line i of prompts
    negative_prompt: str | None = None  # of the teacher's guidance; None: no text
    height: int = 480
    width: int = 832

    # videos
    window: int = 12  # latent frames a block sees, the sink and itself included
    sink: int = 3
    block: int = 3
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    timestep_shift: float = 5.0
    context_timestep: float = 0.0
    clip_frames: int = 21  # what the teacher judges at a time
    overlap: int = 3  # with the clip before
    max_frames: tuple[int, ...] = (21,)  # lengths a video may have
    switch_at: tuple[int, ...] = ()  # frames at which the prompt may switch
    keep_sink: bool = False  # at a switch; false: the recache writes it anew
    recache: Literal["joint", "causal", "none", "clear"] = "joint"
    anchor_tail: int | None = None  # latent frames decoded for the first image of a clip; None: all there are

    # optimisation
    batch: int = 1  # videos a rank
    accumulate: int = 1  # clips a step
    ratio: int = 5  # critic updates for one of the generator
    lr: float = 2e-6
    critic_lr: float = 4e-7
    lr_schedule: Literal["constant", "cosine"] = "constant"  # of both: as it is (paper), or down to a fiftieth at the last step
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    max_norm: float = 10.0
    guidance_scale: float = 4.0  # s of the teacher: r_n + s (r_c - r_n); 3.0 in the released configurations, which count s - 1
    guidance_rescale: float = 0.0  # share by which that is brought back to the norm of r_c
    lora_rank: int | None = None  # adapters on generator and critic instead of all weights
    lora_alpha: float | None = None  # None: the rank
    ema_decay: float | None = 0.99  # of the generator; not with adapters
    ema_start: int = 200
    checkpointing: bool = True  # activations of the blocks are computed again in the backward pass
    bfloat16_linears: bool | None = False  # on a CPU, None: if it has instructions for it; on GPUs networks compute in bfloat16 as they are

    # a look at it
    validation_prompts: str | None = dataclasses.field(default=None, metadata=BESIDE)  # .txt or .jsonl; None: the first of prompts
    validation_videos: int = 4
    validation_frames: int = 21
    oracle: bool = False  # the miniature's: prompts are captions of its world, videos are read back


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train.py`: what every stage has, and a section for each."""

    stage: Literal["language", "autoencoder", "teacher", "causal_init", "init", "long"] = "causal_init"
    run: str = "runs/train"  # folder of checkpoints, metrics, pictures and, at the end, `export`
    steps: int = 1000
    seed: int = 0
    device: str = "auto"  # cuda when there is one; else cpu
    threads: int | None = None  # CPU threads; None: as many as torch takes
    save_every: int = 250
    validate_every: int = 500
    log_every: int = 25
    keep_checkpoints: int = 0  # so many of the newest are kept, each under its own name; the newest is always there
    explode: float | None = 100.0  # a loss this many times its running median stops the run; None: only one that is not finite
    wandb: Literal["off", "offline", "online"] = "off"  # metrics go there too
    wandb_project: str = "longlive"
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    causal_init: CausalInitConfig = dataclasses.field(default_factory=CausalInitConfig)
    ode: OdeConfig = dataclasses.field(default_factory=OdeConfig)
    init: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    long: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        for name, every in (("save_every", self.save_every), ("validate_every", self.validate_every), ("log_every", self.log_every)):
            if every < 1:
                raise ValueError(f"{name} {every}: choose 1 step or more")
        if self.keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints {self.keep_checkpoints}: choose 0 or more")
        if self.explode is not None and self.explode <= 1:
            raise ValueError(f"explode {self.explode}: choose a factor above 1, or null")


def load(
    schema: type[Schema],
    path: str | Path | None = None,
    dotlist: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Schema:
    """The settings of `schema` (a dataclass): its defaults, then a YAML file, then `key=value` words, then `flags` as they are.

    Raises ValueError, in one line that names the setting, for an unknown key, a wrong type or a missing value.
    """
    where = str(path)
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        layers.append((where, _beside(schema, _read_yaml(Path(path)), Path(path).parent)))
    for word in dotlist:
        key, equals, _ = word.partition("=")
        if not key or not equals:
            raise ValueError(f"{word!r} is not a setting; write key=value (and quote what contains spaces)")
        try:
            layers.append(("the command line", OmegaConf.to_container(OmegaConf.from_dotlist([word]))))  # type: ignore[arg-type]
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r} cannot be read as key=value: {_one_line(error)}") from error
    escaped = {key: value.replace("${", r"\${") if isinstance(value, str) else value for key, value in (flags or {}).items()}
    layers.append(("the command line", escaped))

    merged = OmegaConf.structured(schema)
    for source, layer in layers:
        for key in _keys(layer, schema):
            _check_key(key, schema, source)
        for key, value in layer.items():
            try:
                merged = OmegaConf.merge(merged, {key: value})
            except OmegaConfBaseException as error:
                problem = _one_line(error) if error.full_key else f"{value} has the wrong type"
                raise ValueError(f"{source}: setting {error.full_key or key}: {problem}") from error
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"setting {error.full_key}: {_one_line(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        others = difflib.get_close_matches(path.name, sorted(item.name for item in path.parent.glob("*.yaml")), 3, 0.3)
        raise ValueError(f"no configuration at {path}" + (f"; in {path.parent} there is {', '.join(others)}" if others else ""))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a YAML file of settings: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a YAML file of settings: it holds a list")
    return content  # type: ignore[return-value]


def _beside(schema: Any, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    files = {field.name for field in dataclasses.fields(schema) if field.metadata.get("beside")}
    moved = {}
    for key, value in content.items():
        kind = _nested(schema).get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            value = _beside(kind, value, folder)
        moved[key] = str(folder / value) if key in files and isinstance(value, str) else value
    return moved


@lru_cache
def _nested(schema: Any) -> dict[str, Any]:
    """The settings of a schema; those that are schemas themselves with theirs."""
    defaults = OmegaConf.structured(schema)
    return {key: OmegaConf.get_type(defaults, key) for key in defaults}


def _keys(layer: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings in a layer, dotted where schemas are nested."""
    for key, value in layer.items():
        kind = _nested(schema).get(key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
            yield from _keys(value, kind, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _valid(schema: Any, prefix: str = "") -> list[str]:
    names = []
    for key, kind in _nested(schema).items():
        names += [f"{prefix}{key}", *(_valid(kind, f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else ())]
    return names


def _check_key(key: str, schema: Any, source: str) -> None:
    valid = _valid(schema)
    if key in valid:
        return
    nearest = difflib.get_close_matches(key, valid, 1, 0.0)
    raise ValueError(f"{source}: there is no setting {key!r}; did you mean {nearest[0]!r}?")


def _one_line(error: Exception) -> str:
    """What an error says, without the lines that OmegaConf and YAML add about themselves."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]
