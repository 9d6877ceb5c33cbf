"""Low-rank adapters through peft, in the released layout, merged into the weights before inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from longlive.models.wan import WanTransformer

NAME = "default"  # peft's name of the adapter; released files leave it out


def adapted_linears(model: WanTransformer) -> list[str]:
    """Names of the layers LongLive adapts: every linear layer inside every transformer block. Raises ValueError when there is none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")]
    if not names:
        raise ValueError("the blocks of this network hold no floating-point linear layer: add or merge adapters before it is quantised")
    return names


def add_lora(model: WanTransformer, *, rank: int, alpha: float | None = None) -> PeftModel:
    """Wrap `model` with new adapters (B = 0: the output does not change yet); only they are trainable. `alpha` defaults to `rank`."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft takes fractions too
        lora_dropout=0.0,
        target_modules=adapted_linears(model),
    )
    return get_peft_model(model, config)


def lora_state(model: PeftModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Adapter weights in the released layout: `base_model.model.blocks.0.self_attn.q.lora_A.weight` …

    `state`: a state dict of the model to take them from (gathered from several ranks, say); its own if None.
    """
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=NAME)


def merge_lora(model: WanTransformer, state: Mapping[str, Tensor], *, alpha: float | None = None) -> WanTransformer:
    """Add B A alpha / rank to the weights of `model`, in place; no adapter is left at run time.

    Raises:
        ValueError: when the adapter does not fit: which tensors are missing, unexpected or of another shape.
    """
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"these {len(state)} tensors are no LoRA of one rank: ranks found are {sorted(ranks)}")
    rank = ranks.pop()
    with torch.device("meta"):  # the adapter's tensors are assigned below, so that nothing is initialised in vain
        wrapped = add_lora(model, rank=rank, alpha=alpha)
    expected = {name: tuple(tensor.shape) for name, tensor in lora_state(wrapped).items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        wrapped.unload()
        raise ValueError(f"this LoRA does not fit the model, {len(problems)} differences: {'; '.join(problems[:4])}")
    set_peft_model_state_dict(
        wrapped, {name: tensor.float().to(model.device) for name, tensor in state.items()}, adapter_name=NAME, low_cpu_mem_usage=True
    )
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, WanTransformer)
    return merged
