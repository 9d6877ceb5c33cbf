"""Names of weights in the layouts of original Wan, diffusers, transformers, LongLive and Self-Forcing, and conversions between them.

Pure functions of state dicts; tensors are passed on without a copy. `WanTransformer` uses the original Wan names. Knows nothing about
files (`checkpoints.store`) and builds no module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

State = dict[str, Tensor]
Table = dict[str, str]

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("module.", "model.", "base_model.model.", "diffusion_model.")

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


def clean_name(name: str) -> str:
    """`name` without what FSDP, activation checkpointing, compilation, adapters and wrappers add: the network's own name."""
    for infix in WRAPPERS:
        name = name.replace(infix, "")
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(".base_layer.", ".")


def clean_names(state: Mapping[str, Tensor]) -> State:
    """`state` under its clean names. Raises ValueError when two weights have the same clean name."""
    cleaned = {}
    for name, tensor in state.items():
        new = clean_name(name)
        if new in cleaned:
            raise ValueError(f"two weights are both named {new!r} without wrappers, one of them {name!r}; the file may contain only one")
        cleaned[new] = tensor
    return cleaned


def transformer_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Original Wan names to those of `diffusers.WanTransformer3DModel`."""
    return _rename(state, _stems(TRANSFORMER, r"(blocks\.\d+\.)", TRANSFORMER_BLOCK), "the original Wan transformer")


def transformer_to_wan(state: Mapping[str, Tensor]) -> State:
    """Names of `diffusers.WanTransformer3DModel` to the original ones."""
    return _rename(
        state, _stems(_inverse(TRANSFORMER), r"(blocks\.\d+\.)", _inverse(TRANSFORMER_BLOCK)), "diffusers' WanTransformer3DModel"
    )


def transformer_to_longlive(state: Mapping[str, Tensor]) -> State:
    """Original Wan names to those in the `generator` of `longlive_base.pt` and `self_forcing_dmd.pt`, where the network is wrapped."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def text_to_transformers(state: Mapping[str, Tensor]) -> State:
    """Names of `models_t5_umt5-xxl-enc-bf16.pth` to those of transformers' `UMT5EncoderModel`."""
    pattern = _stems(TEXT, r"blocks(\.\d+\.)", TEXT_BLOCK, "encoder.block")
    return _rename(state, pattern, "the original T5 encoder")


def text_to_wan(state: Mapping[str, Tensor]) -> State:
    """Names of transformers' `UMT5EncoderModel` to those of `models_t5_umt5-xxl-enc-bf16.pth`."""
    pattern = _stems(_inverse(TEXT), r"encoder\.block(\.\d+\.)", _inverse(TEXT_BLOCK), "blocks")
    return _rename(untied(state), pattern, "transformers' UMT5EncoderModel")


def untied(state: Mapping[str, Tensor]) -> State:
    """A UMT5 encoder's weights with the token embedding, which two modules share, only once, as `shared.weight`."""
    alias = "encoder.embed_tokens.weight"
    if alias not in state:
        return dict(state)
    return {"shared.weight": state[alias]} | {name: tensor for name, tensor in state.items() if name != alias}


def vae_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """Names of `Wan2.1_VAE.pth` to those of `diffusers.AutoencoderKLWan`.

    The decoder's flat list `upsamples` becomes levels, each of which ends with an upsampler.
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

    residual, resample = _inverse(VAE_RESIDUAL), _inverse(VAE_RESAMPLE)

    def rename(name: str) -> str | None:
        if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", name):
            return _join(f"{match[1]}.middle.{int(match[2]) * 2}.", _stem(match[3], residual))
        if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
            return _join(f"encoder.downsamples.{match[1]}.", _stem(match[2], residual | resample))
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", name):
            return _join(f"decoder.upsamples.{first(int(match[1])) + int(match[2])}.", _stem(match[3], residual))
        if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name):
            return _join(f"decoder.upsamples.{first(int(match[1]) + 1) - 1}.", _stem(match[2], resample))
        return _stem(name, _inverse(VAE))

    return _rename(state, rename, "diffusers' AutoencoderKLWan")


def transformer_stem(name: str) -> str | None:
    """The original name of a layer under that of `diffusers.WanTransformer3DModel`; None when it is none."""
    return _stems(_inverse(TRANSFORMER), r"(blocks\.\d+\.)", _inverse(TRANSFORMER_BLOCK))(name)


def some(names: list[str], count: int = 4) -> str:
    """The first few of `names`, and the number of the others."""
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
    """`name` with its longest prefix that is in `table` replaced; None when there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = ".".join(parts[:end])
        if stem in table:
            return ".".join([table[stem], *parts[end:]])
    return None


def _join(prefix: str, rest: str | None) -> str | None:
    return None if rest is None else prefix + rest


def _inverse(table: Table) -> dict[str, str]:
    return {new: old for old, new in table.items()}
