"""Low-rank adapters: trained through peft, merged into the weights for inference and taken out again."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from longlive.models.wan import WanTransformer

PREFIX = "base_model.model."  # of names in the released layout
NAME = "default"  # peft's name of the adapter; released files leave it out


def adapted_linears(model: WanTransformer) -> list[str]:
    """Names of the layers LongLive adapts: every linear layer inside every transformer block. Raises ValueError when there is none."""
    check_unquantised(model)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")]


def check_unquantised(model: WanTransformer) -> None:
    """Raises ValueError when the blocks have no linear layer in floating point, whose weights an adapter could change."""
    if not any(isinstance(module, nn.Linear) for module in model.blocks.modules()):
        raise ValueError("the blocks of this network hold no floating-point linear layer: add or merge adapters before it is quantised")


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


def merge_lora(model: WanTransformer, state: Mapping[str, Tensor], *, alpha: float | None = None, strength: float = 1.0) -> WanTransformer:
    """Add a LoRA to the weights of `model`, in place; no adapter is left at run time.

    Args:
        state: under the names of `checkpoints.lora`: factors of some or all layers, of any rank, and whole differences.
        alpha: multiplies B A as alpha / rank; None: as alpha = rank.
        strength: multiplies everything that is added.

    Raises:
        ValueError: when the LoRA does not fit: which tensors are missing, unexpected or of another shape.
    """
    for parameter, change in _changes(model, state, alpha=alpha, strength=strength):
        parameter.data += change
    return model


class MergedLoras:
    """LoRAs in the weights of a network, each with a strength that can be changed, until they are taken out again exactly.

    The weights as they were, and the LoRAs, are kept on the CPU: for LongLive-1.3B in bfloat16 about 2.6 GB, and 1.4 GB for a LoRA of
    rank 256 in float32. The network's weights are always those weights plus the sum of the LoRAs, rounded once, so that it does not matter
    how the strengths came about.
    """

    def __init__(self, network: WanTransformer) -> None:
        self._network = network
        self._before: dict[str, Tensor] = {}
        self._loras: dict[str, tuple[Mapping[str, Tensor], float | None]] = {}
        self.strengths: dict[str, float] = {}

    def bound_to(self, network: WanTransformer) -> MergedLoras:
        """The same LoRAs for another module around the same weights."""
        bound = copy.copy(self)
        bound._network = network
        return bound

    def add(self, name: str, state: Mapping[str, Tensor], *, alpha: float | None = None, strength: float = 1.0) -> None:
        """Merge a LoRA under a new name. Raises ValueError, with nothing changed, when it does not fit or the name is taken."""
        if name in self._loras:
            raise ValueError(f"there is a LoRA {name!r} already; choose another name, or take that one out first")
        check_strength(strength)
        parameters = dict(self._network.named_parameters())
        touched = _check_fit(self._network, state)
        self._before |= {key: parameters[key].detach().to("cpu", copy=True) for key in touched if key not in self._before}
        self._loras[name], self.strengths[name] = (state, alpha), strength
        self._merge()

    def set(self, strengths: Mapping[str, float]) -> None:
        """Merge exactly these LoRAs with these strengths; the others have none. Raises ValueError for a name that there is not."""
        self._check_names(strengths)
        for strength in strengths.values():
            check_strength(strength)
        self.strengths = {name: float(strengths.get(name, 0.0)) for name in self._loras}
        self._merge()

    def remove(self, names: Collection[str] | None = None) -> None:
        """Take these LoRAs (None: all) out and forget them. Raises ValueError for a name that there is not."""
        names = list(self._loras) if names is None else names
        self._check_names(names)
        for name in names:
            del self._loras[name], self.strengths[name]
        self._merge()
        if not self._loras:
            self._before.clear()

    def _check_names(self, names: Collection[str]) -> None:
        if unknown := [name for name in names if name not in self._loras]:
            raise ValueError(f"there is no LoRA {unknown[0]!r}; there is {', '.join(self._loras) or 'none'}")
        check_unquantised(self._network)

    @torch.no_grad()
    def _merge(self) -> None:
        parameters = dict(self._network.named_parameters())
        sums: dict[nn.Parameter, Tensor] = {}
        for name, (state, alpha) in self._loras.items():
            if self.strengths[name] != 0:
                for parameter, change in _changes(self._network, state, alpha=alpha, strength=self.strengths[name]):
                    sums[parameter] = sums[parameter] + change if parameter in sums else change
        for name, before in self._before.items():
            parameters[name].copy_(before)
            if parameters[name] in sums:
                parameters[name].add_(sums[parameters[name]])


def adapter_state(network: WanTransformer) -> tuple[Any, ...]:
    """Which adapters beside the weights act, and how strongly: what has been computed under another state is out of date."""
    if not network._hf_peft_config_loaded:
        return ()
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    return tuple(
        (id(layer), layer.disable_adapters, *((name, layer.scaling.get(name)) for name in layer.active_adapters)) for layer in layers
    )


def check_strength(strength: float) -> None:
    """Raises ValueError unless the strength of a LoRA is a finite number."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA is a number, not {strength!r}")


def _check_fit(model: WanTransformer, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that a LoRA changes. Raises ValueError when it does not fit the model."""
    check_unquantised(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems: list[str] = []
    touched: dict[str, None] = {}
    for name, tensor in state.items():
        target, part = _target(name)
        shape, layer, wanted = shapes.get(target), target.removesuffix(".weight"), None
        if shape is None or part not in ("lora_A", "lora_B", "diff", "diff_b") or (part.startswith("lora") and len(shape) < 2):
            problems.append(f"{name} is unexpected")
            continue
        touched[target] = None
        if part in ("diff", "diff_b"):
            wanted = shape
        elif (other := state.get(f"{PREFIX}{layer}.{'lora_B' if part == 'lora_A' else 'lora_A'}.weight")) is None:
            problems.append(f"the other factor of {name} is missing")
            continue
        elif part == "lora_A":
            wanted = (other.shape[1], *shape[1:])
        else:
            wanted = (shape[0], other.shape[0], *(1,) * (len(shape) - 2))
        if tuple(tensor.shape) != wanted:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
    if problems or not touched:
        words = f", {len(problems)} differences: {'; '.join(problems[:4])}" if problems else ": it is empty"
        raise ValueError(f"this LoRA does not fit the model{words}")
    return list(touched)


def _target(name: str) -> tuple[str, str]:
    """The parameter that a LoRA's tensor changes, and which part of the change it is: lora_A, lora_B, diff or diff_b."""
    layer, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return f"{layer}.{'bias' if part == 'diff_b' else 'weight'}", part


@torch.no_grad()
def _changes(
    model: WanTransformer, state: Mapping[str, Tensor], *, alpha: float | None, strength: float
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter that a LoRA changes, with what is added to it, in float32."""
    _check_fit(model, state)
    parameters, device = dict(model.named_parameters()), model.device
    for name, tensor in state.items():
        target, part = _target(name)
        if part == "lora_A":
            b = state[name.replace(".lora_A.", ".lora_B.")]
            scale = (1.0 if alpha is None else alpha / len(tensor)) * strength
            product = b.flatten(1).to(device, torch.float32) @ tensor.flatten(1).to(device, torch.float32)
            yield parameters[target], (product * scale).view(parameters[target].shape)
        elif part in ("diff", "diff_b"):
            yield parameters[target], tensor.to(device, torch.float32) * strength
