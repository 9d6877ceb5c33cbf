"""What a video needs of a device's memory, part by part at its peak, and the settings with which it fits.

Counts networks by their configurations alone, so that they need not be loaded; transformer and decoder are taken to be at work at the
same time, as they are when a block is made while the one before is decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from longlive.engine.linears import LinearKind
from longlive.generation.caches import quantised_weight_bytes, video_bytes, weight_bytes
from longlive.generation.pipeline import LongLivePipeline
from longlive.models.text import TextEncoderMode
from longlive.models.tiny_vae import TinyVAE
from longlive.models.vae import settings_of
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments
from longlive.ops.eight_bits import Format

RESERVED = 600 * 2**20
"""Of a GPU: CUDA's context and the libraries' working memory, which is not counted but allowed for."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The settings (of the same names in `InferenceConfig`) that decide how much memory a video needs."""

    text_encoder: TextEncoderMode = "resident"
    decode_latent_frames: int | None = None
    quantize: LinearKind | None = None
    quantize_cache: Format | None = None
    decoder: str = "full"

    def words(self) -> str:
        """As on a command line: only what differs from the defaults."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        usual = dataclasses.asdict(MemorySettings())
        return " ".join(f"{name}={value}" for name, value in given.items() if value != usual[name]) or "the defaults"


def ladder(*, tiny: bool) -> Iterator[MemorySettings]:
    """Settings that need less and less memory, by how little they change: first what leaves the images as they are, then 8 bits with
    the VAE's own decoder, then the tiny decoder without and with 8 bits.

    `tiny`: whether there is a tiny decoder.
    """
    yield MemorySettings()
    yield MemorySettings(text_encoder="cpu")
    for decoder in ("full", "tiny") if tiny else ("full",):
        exact = MemorySettings(text_encoder="cpu", decode_latent_frames=1, decoder=decoder)
        yield exact
        yield dataclasses.replace(exact, quantize="int8-weights")
        yield dataclasses.replace(exact, quantize="int8-weights", quantize_cache="int8")


class Parts(NamedTuple):
    """Bytes of every part at its peak."""

    transformer: int
    cache: int
    activations: int
    decoder: int
    decoding: int
    text_encoder: int

    @property
    def total(self) -> int:
        return sum(self)


class Model(NamedTuple):
    """What is counted; networks may be on the meta device. `text_encoder`: bytes of its weights; `recache`: see `video_bytes`."""

    transformer: WanTransformer
    vae: AutoencoderKLWan
    text_encoder: int
    tiny: TinyVAE | None
    visible: int
    sink_copies: int
    block: int
    recache: bool

    @classmethod
    def of(cls, pipe: LongLivePipeline, tiny: TinyVAE | None, *, visible: int) -> Model:
        """Of a pipeline with a window of `visible` latent frames."""
        info = pipe.info
        copies = info.sink if info.relative_rope else 0
        return cls(pipe.transformer, pipe.vae, weight_bytes(pipe.text_encoder), tiny, visible, copies, info.block, info.recache == "joint")

    @classmethod
    def released(cls) -> Model:
        """LongLive-1.3B with UMT5-XXL, Wan's autoencoder and a tiny decoder in TAEHV's layout, all in bfloat16, on the meta device."""
        with torch.device("meta"):
            networks = WanTransformer(**arguments("1.3b")), AutoencoderKLWan(), TinyVAE(), UMT5EncoderModel(UMT5_XXL)
        for network in networks:
            torch.nn.Module.to(network, torch.bfloat16)
        transformer, vae, tiny, reader = networks
        return cls(transformer, vae, weight_bytes(reader), tiny, visible=12, sink_copies=0, block=3, recache=True)


UMT5_XXL = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)  # the text encoder of Wan2.1


def count(model: Model, settings: MemorySettings, *, height: int, width: int, on_gpu: bool = True) -> Parts:
    """What a video of `height` x `width` pixels needs. `on_gpu`: the device is a GPU, where a text encoder on the CPU does not count.

    A text encoder that is moved to the device on demand is there while a block is made, so that it counts.
    """
    network = model.tiny if settings.decoder != "full" and model.tiny is not None else model.vae
    quantised = settings.quantize is not None
    video = video_bytes(
        model.transformer,
        network,
        height,
        width,
        stride=settings_of(model.vae).scale_factor_spatial,
        visible=model.visible,
        block=model.block,
        sink_copies=model.sink_copies,
        recache=model.recache,
        quantize=settings.quantize,
        quantize_cache=settings.quantize_cache,
        decode_latent_frames=settings.decode_latent_frames,
    )
    return Parts(
        transformer=quantised_weight_bytes(model.transformer) if quantised else weight_bytes(model.transformer),
        cache=video.cache,
        activations=video.activations,
        decoder=weight_bytes(*{model.vae, network}),  # a tiny one is held beside the VAE
        decoding=video.decoding,
        text_encoder=0 if on_gpu and settings.text_encoder == "cpu" else model.text_encoder,
    )


def choose(model: Model, available: int, *, height: int, width: int, on_gpu: bool = True) -> tuple[MemorySettings, Parts]:
    """The first settings of the ladder that fit into `available` bytes, and what they need.

    Raises:
        ValueError: when none of them does; says how much the last ones need.
    """
    for settings in ladder(tiny=model.tiny is not None):
        parts = count(model, settings, height=height, width=width, on_gpu=on_gpu)
        if parts.total <= available:
            return settings, parts
    raise ValueError(
        f"a video of {height} x {width} needs {parts.total / 2**30:.2f} GiB with {settings.words()}, and {available / 2**30:.2f} GiB are "
        "available; choose a smaller height and width"
    )
