"""Pipelines of random weights, as large as real ones, that run in one of the ways there are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from reference import LORA_RANK, ReferencePipeline, ReferenceTransformer, adapt, random_lora
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature.language import build_tokenizer
from longlive.models.tiny_vae import TinyVAE
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments

ENGINES = ("reference", "eager", "compiled", "graphs")
MINIATURE_TINY: dict[str, Any] = {"widths": (64, 32), "growth": (2, 2), "num_blocks": 2, "patch_size": 2}
MINIATURE_VAE: dict[str, Any] = {  # the sizes that configs/miniature/autoencoder.yaml trains
    "base_dim": 32,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}


@contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New weights are created on `device` in `dtype` directly."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Set weights to a standard deviation of 0.02, as trained ones have: on zeros a GPU draws less power and runs faster."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(part.weight, std=0.02)
    return module.eval().requires_grad_(False)


def build(
    size: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention_backend: str = "auto",
    seed: int = 0,
    reference: bool = False,
    layers: int | None = None,
    **settings: Any,
) -> LongLivePipeline:
    """A pipeline of random weights of a named size, with Wan's autoencoder (the miniature with its own).

    `reference`: the plain way, with a LoRA of the released rank that is not merged. `layers`: None: as many as the size has.
    """
    torch.manual_seed(seed)
    with building(device, dtype):
        sizes: dict[str, Any] = arguments(size) | ({} if layers is None else {"num_layers": layers})
        transformer = (ReferenceTransformer if reference else WanTransformer)(**sizes)
        vae = AutoencoderKLWan(**(MINIATURE_VAE if size == "miniature" else {}))
    randomise(transformer)
    randomise(vae)
    if reference:
        adapt(transformer, random_lora(transformer), alpha=LORA_RANK)
    transformer.use_attention(attention_backend)
    tokenizer = build_tokenizer()
    width = transformer.config.text_dim
    reader = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, num_heads=1, d_ff=8, num_layers=1))
    torch.nn.Module.to(reader, dtype)
    return (ReferencePipeline if reference else LongLivePipeline)(transformer, vae, reader, tokenizer, **settings)


def accelerate(pipe: LongLivePipeline, *, size: str, engine: str, quantize: Any, quantize_cache: Any, decoder: str) -> None:
    """Let the pipeline run as `engine` says, in 8 bits if asked; `decoder="tiny"` is one of random weights.

    Raises:
        ValueError: for what the device or the plain way cannot do.
    """
    if engine == "reference":
        if quantize or quantize_cache:
            raise ValueError("the plain way knows no 8 bits; choose another engine")
    else:
        pipe.accelerate(compile=engine != "eager", graphs=engine == "graphs", quantize=quantize, quantize_cache=quantize_cache)
    if decoder == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            randomise(TinyVAE(**(MINIATURE_TINY if size == "miniature" else {}))).save_pretrained(folder)  # type: ignore[operator]
            pipe.accelerate(decoder=folder)
