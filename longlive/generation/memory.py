"""The cache a network needs, and the bytes a video needs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.generation.cues import TEMPORAL_STRIDE
from longlive.models.vae import settings_of
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


def working_bytes(
    network: WanTransformer, vae: AutoencoderKLWan, height: int, width: int, *, visible: int, block: int, batch: int, relative: bool
) -> int:
    """Estimated bytes of key-value cache and activations for one block of `height` x `width` latents."""
    config, element = network.config, network.dtype.itemsize
    tokens = tokens_per_frame(network, height, width)
    cache = (2 * visible + (visible if relative else 0)) * config.num_layers * batch * tokens * config.dim * element
    activations = batch * block * tokens * (12 * config.dim * 4 + 2 * config.ffn_dim * element)  # modulation and residuals in float32
    settings = settings_of(vae)
    patch = settings.patch_size or 1
    pixels = batch * TEMPORAL_STRIDE * block * height * width * settings.scale_factor_spatial**2
    decoder = pixels // patch**2 * 6 * settings.base_dim * vae.dtype.itemsize
    return cache + max(activations, decoder)
