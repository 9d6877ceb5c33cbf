"""Constructor arguments of Wan's networks: translated between layouts, or read from the shapes of weights under original names.

Pure functions of configs and state dicts. Knows nothing about files (`checkpoints.store`) and builds no module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `WanTransformer` to those of `diffusers.WanTransformer3DModel`. Raises ValueError for another rotary base."""
    if config.get("rope_theta", 10000) != 10000:
        raise ValueError(
            f"diffusers' rotary embedding has base 10000, this model {config['rope_theta']}; it cannot be written for diffusers"
        )
    return {
        "patch_size": list(config["patch_size"]),
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": config["text_dim"],
        "freq_dim": config["freq_dim"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config["eps"],
    }


def config_to_wan(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` of original Wan, diffusers or `WanTransformer` to constructor arguments of `WanTransformer`.

    Raises ValueError for what `WanTransformer` does not implement (image conditioning by cross-attention, other norms).
    """
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    if "attention_head_dim" not in plain:
        fixed = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
        _refuse({key: plain[key] for key in fixed if key in plain and plain[key] != fixed[key]})
        return {key: value for key, value in plain.items() if key not in fixed}
    fixed = {
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    _refuse({key: plain[key] for key in fixed if key in plain and plain[key] != fixed[key]})
    return {
        "model_type": "t2v",
        "patch_size": list(plain["patch_size"]),
        "in_dim": plain["in_channels"],
        "dim": plain["num_attention_heads"] * plain["attention_head_dim"],
        "ffn_dim": plain["ffn_dim"],
        "freq_dim": plain["freq_dim"],
        "text_dim": plain["text_dim"],
        "out_dim": plain["out_channels"],
        "num_heads": plain["num_attention_heads"],
        "num_layers": plain["num_layers"],
        "eps": plain["eps"],
    }


def transformer_config(state: Mapping[str, Tensor], *, num_heads: int | None = None, text_len: int = 512) -> dict[str, Any]:
    """Constructor arguments of a transformer from the shapes of its weights under original names.

    The shapes determine neither `num_heads` (None: heads of width 128, as in every released Wan) nor `text_len`.
    """
    dim, in_dim, *patch_size = state["patch_embedding.weight"].shape
    if num_heads is None:
        if dim % 128:
            raise ValueError(f"the weights of a transformer of width {dim} do not determine its number of heads; give num_heads")
        num_heads = dim // 128
    patch = patch_size[0] * patch_size[1] * patch_size[2]
    return {
        "model_type": "t2v",
        "patch_size": patch_size,
        "text_len": text_len,
        "in_dim": in_dim,
        "dim": dim,
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "freq_dim": state["time_embedding.0.weight"].shape[1],
        "text_dim": state["text_embedding.0.weight"].shape[1],
        "out_dim": state["head.head.weight"].shape[0] // patch,
        "num_heads": num_heads,
        "num_layers": _count(state, r"blocks\.(\d+)\."),
        "eps": 1e-6,
    }


def text_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config` for an encoder under its original names."""
    buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    vocab, width = state["token_embedding.weight"].shape
    num_layers = _count(state, r"blocks\.(\d+)\.")
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": state["blocks.0.attn.q.weight"].shape[0] // num_heads,
        "d_ff": state["blocks.0.ffn.fc1.weight"].shape[0],
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
        "num_heads": num_heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    }


def vae_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `diffusers.AutoencoderKLWan` for a VAE under its original names.

    The mean and standard deviation of the latents are not in the weights; Wan 2.1's are the defaults.
    """
    base = state["encoder.conv1.weight"].shape[0]
    num_down = _count(state, r"encoder\.downsamples\.(\d+)\.")
    resamples = [index for index in range(num_down) if f"encoder.downsamples.{index}.resample.1.weight" in state]
    widths = [state[f"encoder.downsamples.{index}.resample.1.weight"].shape[0] for index in resamples]
    widths.append(state["encoder.head.0.gamma"].shape[0])
    return {
        "base_dim": base,
        "z_dim": state["decoder.conv1.weight"].shape[1],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": resamples[0],
        "temperal_downsample": [f"encoder.downsamples.{index}.time_conv.weight" in state for index in resamples],
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, name) for name in state) if match)


def _refuse(settings: Mapping[str, Any]) -> None:
    if settings:
        raise ValueError(
            "this transformer is not a text-to-video Wan: " + ", ".join(f"{key} is {value!r}" for key, value in settings.items())
        )
