"""Makes the caches of a network, and counts the bytes that a video needs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.history import HistoryCache
from longlive.cache.quantised import QuantisedRing
from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.engine.linears import is_quantised
from longlive.engine.sharding import compute_dtype
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


def activation_bytes(
    network: WanTransformer, vae: AutoencoderKLWan, height: int, width: int, *, block: int, batch: int, quantised_frames: int = 0
) -> int:
    """Estimated bytes at work on one block of `height` x `width` latents.

    `quantised_frames`: frames in an 8-bit cache, whose keys and values are read back into floating point a layer at a time.
    """
    config = network.config
    tokens = network.rope(height, width).tokens_per_frame
    activations = batch * block * tokens * (12 * config.dim * 4 + 2 * config.ffn_dim * network.dtype.itemsize)  # residuals in float32
    if is_quantised(network):
        activations += batch * block * tokens * config.ffn_dim * 12  # activations in float32 and 8 bits, products in int32
    activations += batch * quantised_frames * tokens * config.dim * 2 * (4 + network.dtype.itemsize)
    settings = settings_of(vae)
    patch = settings.patch_size or 1
    pixels = batch * settings.scale_factor_temporal * block * height * width * settings.scale_factor_spatial**2
    decoder = pixels // patch**2 * 6 * decoder_width(vae) * vae.dtype.itemsize
    return max(activations, decoder)
