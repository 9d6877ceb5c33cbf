"""Names of weights: original Wan, diffusers, transformers, LongLive and Self-Forcing, and the way from each to the other.

Pure functions of state dicts and configs; tensors pass through untouched and are never copied. Original Wan names are the names
`WanTransformer` uses. Knows nothing about files (`checkpoints.store`) and builds no module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
Table = dict[str, str]

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("model.", "base_model.model.", "diffusion_model.")

TRANSFORMER: Table = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
TRANSFORMER_BLOCK: Table = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the cross-attention norm; diffusers numbers norms in order of use
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{wan}.{part}": f"{diffusers}.{name}"
    for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}.items()
}

TEXT: Table = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
TEXT_BLOCK: Table = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

VAE: Table = {"conv1": "quant_conv", "conv2": "post_quant_conv"} | {
    f"{side}.{wan}": f"{side}.{diffusers}"
    for side in ("encoder", "decoder")
    for wan, diffusers in {
        "conv1": "conv_in",
        "head.0": "norm_out",
        "head.2": "conv_out",
        "middle.1": "mid_block.attentions.0",
    }.items()
}
VAE_RESIDUAL: Table = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
VAE_RESAMPLE: Table = {"resample": "resample", "time_conv": "time_conv"}

WAN_CONFIG = (
    "model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers", "eps",
)  # fmt: skip


def clean_name(name: str) -> str:
    """`name` without the traces of FSDP, checkpointing, compiling, adapters and wrappers: the name the network itself uses."""
    for infix in WRAPPERS:
        name = name.replace(infix, "")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(".base_layer.", ".")


def clean_names(state: Mapping[str, Tensor]) -> State:
    """`state` under its clean names. Raises ValueError when two weights would share one."""
    cleaned = {}
    for name, tensor in state.items():
        new = clean_name(name)
        if new in cleaned:
            raise ValueError(f"two weights are both {new!r} once wrappers are taken off, {name!r} is one; the file may hold only one")
        cleaned[new] = tensor
    return cleaned


def transformer_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Original Wan names to those of `diffusers.WanTransformer3DModel`."""
    return _rename(state, _stems(TRANSFORMER, r"(blocks\.\d+\.)", TRANSFORMER_BLOCK), "the original Wan transformer")


def transformer_to_wan(state: Mapping[str, Tensor]) -> State:
    """Names of `diffusers.WanTransformer3DModel` to the original ones."""
    return _rename(state, _stems(_turned(TRANSFORMER), r"(blocks\.\d+\.)", _turned(TRANSFORMER_BLOCK)), "diffusers' WanTransformer3DModel")


def transformer_to_longlive(state: Mapping[str, Tensor]) -> State:
    """Original Wan names to those in the `generator` of `longlive_base.pt` and `self_forcing_dmd.pt`: the network sits in a wrapper."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def text_to_transformers(state: Mapping[str, Tensor]) -> State:
    """Names of `models_t5_umt5-xxl-enc-bf16.pth` to those of transformers' `UMT5EncoderModel`."""
    pattern = _stems(TEXT, r"blocks(\.\d+\.)", TEXT_BLOCK, "encoder.block")
    return _rename(state, pattern, "the original T5 encoder")


def text_to_wan(state: Mapping[str, Tensor]) -> State:
    """Names of transformers' `UMT5EncoderModel` to those of `models_t5_umt5-xxl-enc-bf16.pth`."""
    pattern = _stems(_turned(TEXT), r"encoder\.block(\.\d+\.)", _turned(TEXT_BLOCK), "blocks")
    return _rename(untied(state), pattern, "transformers' UMT5EncoderModel")


def untied(state: Mapping[str, Tensor]) -> State:
    """A UMT5 encoder's weights with the token embedding, which two modules share, once and as `shared.weight`."""
    alias = "encoder.embed_tokens.weight"
    if alias not in state:
        return dict(state)
    return {"shared.weight": state[alias]} | {name: tensor for name, tensor in state.items() if name != alias}


def vae_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Names of `Wan2.1_VAE.pth` to those of `diffusers.AutoencoderKLWan`.

    The decoder's flat `upsamples` become levels: every upsampler ends one.
    """
    upsamplers = sorted({int(name.split(".")[2]) for name in state if re.match(r"decoder\.upsamples\.\d+\.resample\.", name)})

    def upsample(index: int) -> str:
        level = sum(position < index for position in upsamplers)
        if index in upsamplers:
            return f"decoder.up_blocks.{level}.upsamplers.0."
        return f"decoder.up_blocks.{level}.resnets.{index - (upsamplers[level - 1] + 1 if level else 0)}."

    def rename(name: str) -> str | None:
        if match := re.fullmatch(r"(encoder|decoder)\.middle\.([02])\.(.+)", name):
            return _join(f"{match[1]}.mid_block.resnets.{int(match[2]) // 2}.", _stem(match[3], VAE_RESIDUAL))
        if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", name):
            return _join(f"encoder.down_blocks.{match[1]}.", _stem(match[2], VAE_RESIDUAL | VAE_RESAMPLE))
        if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name):
            return _join(upsample(int(match[1])), _stem(match[2], VAE_RESIDUAL | VAE_RESAMPLE))
        return _stem(name, VAE)

    return _rename(state, rename, "the original Wan VAE")


def vae_to_wan(state: Mapping[str, Tensor]) -> State:
    """Names of `diffusers.AutoencoderKLWan` to those of `Wan2.1_VAE.pth`."""
    resnets: dict[int, int] = {}
    for name in state:
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            resnets[int(match[1])] = max(resnets.get(int(match[1]), 0), int(match[2]) + 1)

    def first(level: int) -> int:
        return sum(count + 1 for lower, count in resnets.items() if lower < level)

    residual, resample = _turned(VAE_RESIDUAL), _turned(VAE_RESAMPLE)

    def rename(name: str) -> str | None:
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", name):
            return _join(f"{match[1]}.middle.{int(match[2]) * 2}.", _stem(match[3], residual))
        if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
            return _join(f"encoder.downsamples.{match[1]}.", _stem(match[2], residual | resample))
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", name):
            return _join(f"decoder.upsamples.{first(int(match[1])) + int(match[2])}.", _stem(match[3], residual))
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name):
            return _join(f"decoder.upsamples.{first(int(match[1]) + 1) - 1}.", _stem(match[2], resample))
        return _stem(name, _turned(VAE))

    return _rename(state, rename, "diffusers' AutoencoderKLWan")


def lora_to_longlive(state: Mapping[str, Tensor]) -> State:
    """A LoRA under any of its names (peft, with or without an adapter's name or wrappers, or diffusers') under those of `lora.pt`:
    `base_model.model.<original name>.lora_A.weight`. Raises ValueError when it is not made of pairs of one rank."""
    diffusers = _is_diffusers_lora(state)
    lora = clean_names({re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name): tensor for name, tensor in state.items()})
    if diffusers:
        lora = transformer_to_wan({name.removeprefix("transformer."): tensor for name, tensor in lora.items()})
    lora = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    lora_rank(lora)
    return lora


def lora_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """A LoRA under the names `WanPipeline.load_lora_weights` of diffusers reads (which takes alpha to be the rank)."""
    return {f"transformer.{name}": tensor for name, tensor in transformer_to_diffusers(clean_names(lora_to_longlive(state))).items()}


def lora_rank(state: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA. Raises ValueError when it is not made of pairs `lora_A [rank, in]`, `lora_B [out, rank]` of one rank."""
    odd = [name for name in state if not re.search(r"\.lora_[AB]\.weight$", name)]
    if odd or not state:
        raise ValueError(f"not only LoRA matrices here: {some(odd)}" if odd else "this LoRA is empty")
    for name in state:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in state:
            raise ValueError(f"the LoRA has {name} but not {other}; the file is incomplete")
    ranks = {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in state.items()}
    if len(ranks) > 1:
        raise ValueError(f"the LoRA mixes ranks {sorted(ranks)}; one rank for all layers is needed")
    return ranks.pop()


def config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `WanTransformer` to those of `diffusers.WanTransformer3DModel`."""
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
    """A `config.json` of original Wan, of diffusers or of `WanTransformer` to constructor arguments of `WanTransformer`.

    Raises ValueError for what `WanTransformer` does not do (image conditioning by cross-attention, other norms).
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
    """What the shapes of a transformer under original names say about its constructor arguments.

    They do not say `num_heads` (None: heads of 128, as in every released Wan) nor `text_len`.
    """
    dim, in_dim, *patch_size = state["patch_embedding.weight"].shape
    if num_heads is None:
        if dim % 128:
            raise ValueError(f"the number of heads of a transformer of width {dim} cannot be told from its weights; give num_heads")
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

    The mean and deviation of latents are not in the weights; Wan 2.1's are the defaults.
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


def some(names: list[str], count: int = 4) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _rename(state: Mapping[str, Tensor], rename: Callable[[str], str | None], what: str) -> State:
    names = {name: rename(name) for name in state}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(names)} weights are unknown to {what}: {some(unknown)}")
    return {new: state[name] for name, new in names.items() if new is not None}


def _stems(top: Table, block_pattern: str, block: Table, block_prefix: str = "") -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        if match := re.match(block_pattern, name):
            return _join(block_prefix + match[1], _stem(name[match.end() :], block))
        return _stem(name, top)

    return rename


def _stem(name: str, table: Table) -> str | None:
    """`name` with its longest beginning that is in `table` exchanged; None when there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = ".".join(parts[:end])
        if stem in table:
            return ".".join([table[stem], *parts[end:]])
    return None


def _join(prefix: str, rest: str | None) -> str | None:
    return None if rest is None else prefix + rest


def _turned(table: Table) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, name) for name in state) if match)


def _is_diffusers_lora(state: Mapping[str, Tensor]) -> bool:
    return any(re.search(r"\.(attn[12]\.to_\w+|ffn\.net)\.", name) for name in state)


def _refuse(settings: Mapping[str, Any]) -> None:
    if settings:
        raise ValueError(
            "this transformer is not a text-to-video Wan: " + ", ".join(f"{key} is {value!r}" for key, value in settings.items())
        )
