"""The cache a network needs, and the bytes a video needs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.generation.cues import TEMPORAL_STRIDE
from longlive.models.vae import decoder_width, settings_of
from longlive.models.wan import WanTransformer


def tokens_per_frame(network: WanTransformer, height: int, width: int) -> int:
    """Tokens of one latent frame of `height` x `width` latents."""
    _, rows, columns = network.config.patch_size
    return height // rows * (width // columns)


def ring_cache(network: WanTransformer, height: int, width: int, *, window: Window, batch: int = 1, relative: bool = False) -> RingCache:
    """An empty ring for `network` and latents of `height` x `width`, on its device and in its dtype."""
    config = network.config
    return RingCache(
        num_layers=config.num_layers,
        batch=batch,
        tokens_per_frame=tokens_per_frame(network, height, width),
        num_heads=config.num_heads,
        head_dim=config.dim // config.num_heads,
        window=window,
        relative=relative,
        theta=config.rope_theta,
        dtype=network.dtype,
        device=network.device,
    )


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def cache_bytes(network: WanTransformer, height: int, width: int, *, visible: int, turned: int = 0, batch: int = 1) -> int:
    """Bytes of the keys and values of `visible` frames of `height` x `width` latents, and of the keys of `turned` of them once more: the
    infinite mode keeps the sink's as they were written.
    """
    config = network.config
    tokens = tokens_per_frame(network, height, width)
    return (2 * visible + turned) * config.num_layers * batch * tokens * config.dim * network.dtype.itemsize


def activation_bytes(network: WanTransformer, vae: AutoencoderKLWan, height: int, width: int, *, block: int, batch: int) -> int:
    """Estimated bytes at work on one block of `height` x `width` latents."""
    config = network.config
    tokens = tokens_per_frame(network, height, width)
    activations = batch * block * tokens * (12 * config.dim * 4 + 2 * config.ffn_dim * network.dtype.itemsize)  # residuals in float32
    settings = settings_of(vae)
    patch = settings.patch_size or 1
    pixels = batch * TEMPORAL_STRIDE * block * height * width * settings.scale_factor_spatial**2
    decoder = pixels // patch**2 * 6 * decoder_width(vae) * vae.dtype.itemsize
    return max(activations, decoder)
