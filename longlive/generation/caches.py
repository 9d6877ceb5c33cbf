"""Makes the caches of a network, and counts the bytes that a video needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.history import HistoryCache
from longlive.cache.quantised import QuantisedRing
from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.engine.blocks import blocks_of
from longlive.engine.sharding import compute_dtype
from longlive.models.tiny_vae import TinyVAE
from longlive.models.vae import decoder_width, settings_of
from longlive.models.wan import WanTransformer
from longlive.ops.eight_bits import Format


def ring_cache(
    network: WanTransformer,
    height: int,
    width: int,
    *,
    window: Window,
    batch: int = 1,
    relative: bool = False,
    quantize: Format | None = None,
) -> RingCache | QuantisedRing:
    """An empty cache of inference for `network` and latents of `height` x `width`, on its device, in the type in which it computes, or in
    8 bits. Raises ValueError for an unknown 8-bit format.
    """
    shape = _shape(network, height, width)
    if quantize is not None:
        return QuantisedRing(**shape, window=window, batch=batch, relative=relative, kind=quantize)
    return RingCache(**shape, window=window, batch=batch, relative=relative, dtype=compute_dtype(network))


def history_cache(
    network: WanTransformer,
    height: int,
    width: int,
    *,
    window: Window,
    batch: int = 1,
    slots: int | None = None,
) -> HistoryCache:
    """An empty cache of training, in the type in which the network computes; `slots`: see `HistoryCache`."""
    dtype = compute_dtype(network)
    return HistoryCache(**_shape(network, height, width), window=window, batch=batch, dtype=dtype, slots=slots)


def _shape(network: WanTransformer, height: int, width: int) -> dict[str, Any]:
    config = network.config
    return {"num_layers": config.num_layers, "num_heads": config.num_heads, "rope": network.rope(height, width)}


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def cache_bytes(
    network: WanTransformer,
    height: int,
    width: int,
    *,
    visible: int,
    sink_copies: int = 0,
    batch: int = 1,
    quantize: Format | None = None,
) -> int:
    """Bytes of the keys and values of `visible` frames of `height` x `width` latents, and of the keys of `sink_copies` of them once
    more: the infinite mode keeps the sink's as they were recorded. In 8 bits it does not need that copy; every frame then has two scales
    a head and the mean of its keys.
    """
    config = network.config
    tokens = network.rope(height, width).tokens_per_frame
    if quantize is not None:
        return visible * config.num_layers * batch * (2 * tokens * config.dim + 4 * (2 * config.num_heads + config.dim))
    return (2 * visible + sink_copies) * config.num_layers * batch * tokens * config.dim * network.dtype.itemsize


def transformer_activation_bytes(
    network: WanTransformer, height: int, width: int, *, frames: int, batch: int = 1, quantize: str | None = None, quantised_frames: int = 0
) -> int:
    """Estimated bytes at work in an eager pass over so many frames of `height` x `width` latents.

    `quantize`: the kind of linear layers in 8 bits; `quantised_frames`: frames in an 8-bit cache, whose keys and values are read back
    into floating point a layer at a time. Counted on the meta device (`tests/unit/test_memory.py`): feed-forward, or reading the cache.
    """
    config, size = network.config, network.dtype.itemsize
    tokens = batch * network.rope(height, width).tokens_per_frame
    widest = {None: 2 * size, "int8-weights": 3 * size}.get(quantize, 9 + size)  # also in float32 and 8 bits, products in int32
    feed_forward = frames * (4 * size * config.dim + widest * config.ffn_dim)
    attention = frames * 10 * size * config.dim + quantised_frames * 2 * (4 + size) * config.dim
    return tokens * max(feed_forward, attention)


class _DecoderShape(NamedTuple):
    """Of the widest level: bytes of one channel of an image, and channels at work and remembered for each of the level's own.

    Counted on the meta device (`tests/unit/test_memory.py`): in Wan's decoder eight tensors are alive when most are.
    """

    channel: int
    width: int
    working: float
    remembered: float
    images_per_latent: int


def _decoder_shape(network: AutoencoderKLWan | TinyVAE, height: int, width: int) -> _DecoderShape:
    config = settings_of(network)  # type: ignore[arg-type]  # of both the same kind
    patch = config.patch_size or 1
    channel = height * width // patch**2 * network.dtype.itemsize
    if isinstance(network, TinyVAE):
        return _DecoderShape(channel, config.widths[-1], 2.35, 1.35, network.images_per_latent)
    return _DecoderShape(channel, decoder_width(network), 8.1, 25, config.scale_factor_temporal)


def decoder_activation_bytes(network: AutoencoderKLWan | TinyVAE, height: int, width: int, *, latent_frames: int, batch: int = 1) -> int:
    """Estimated bytes at work while so many latent frames of `height` x `width` pixels are decoded in one call."""
    shape = _decoder_shape(network, height, width)
    return round(batch * latent_frames * shape.images_per_latent * shape.channel * shape.width * shape.working)


def decoder_memory_bytes(network: AutoencoderKLWan | TinyVAE, height: int, width: int, *, batch: int = 1) -> int:
    """Estimated bytes that a decoder keeps of the frames before, for a video of `height` x `width` pixels."""
    shape = _decoder_shape(network, height, width)
    return round(batch * shape.channel * shape.width * shape.remembered)


def quantised_weight_bytes(network: WanTransformer) -> int:
    """Bytes of the network's weights once the linear layers of its blocks are in 8 bits, with a scale per row and a bias in float32."""
    linears = [layer for block in blocks_of(network) for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    before = weight_bytes(*linears)
    return weight_bytes(network) - before + sum(layer.weight.numel() + 4 * 2 * layer.out_features for layer in linears)


class VideoBytes(NamedTuple):
    """Bytes of a video at their peak: keys and values, the transformer at work, the decoder at work with what it remembers."""

    cache: int
    activations: int
    decoding: int


def video_bytes(
    transformer: WanTransformer,
    decoder: AutoencoderKLWan | TinyVAE,
    height: int,
    width: int,
    *,
    stride: int,
    visible: int,
    block: int,
    recache: bool = True,
    sink_copies: int = 0,
    batch: int = 1,
    quantize: str | None = None,
    quantize_cache: Format | None = None,
    decode_latent_frames: int | None = None,
) -> VideoBytes:
    """Of a video of `height` x `width` pixels, `stride` to a latent; the other arguments are those of the functions above.

    `recache`: a prompt switch may pass all visible frames through the transformer at once; `decode_latent_frames`: at most in one call of
    the decoder; None: a block.
    """
    latents = height // stride, width // stride
    frames = visible if quantize_cache is not None else 0
    at_once, at_work = min(block, decode_latent_frames or block), visible if recache else block
    return VideoBytes(
        cache_bytes(transformer, *latents, visible=visible, sink_copies=sink_copies, batch=batch, quantize=quantize_cache),
        transformer_activation_bytes(transformer, *latents, frames=at_work, batch=batch, quantize=quantize, quantised_frames=frames),
        decoder_memory_bytes(decoder, height, width, batch=batch)
        + decoder_activation_bytes(decoder, height, width, latent_frames=at_once, batch=batch),
    )
