"""Linear layers that compute in bfloat16 while everything else stays in float32.

On a CPU with bfloat16 instructions a matrix product is then four times as fast. Unlike autocast this leaves attention, norms and
modulation in float32, where bfloat16 kernels gain nothing on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    """x W^T + b with operands rounded to bfloat16, forward and backward; gradients of the weights are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.bfloat16()).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradients[0].flatten(0, -2)
        rounded = flat.bfloat16()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            (rounded @ weight).float().view(x.shape) if for_x else None,
            (rounded.T @ x.flatten(0, -2)).float() if for_weight else None,
            flat.sum(0) if for_bias else None,
        )


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[return-value]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrices; one without takes several times as long for their products as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_bfloat16_linears(setting: bool | None) -> bool:
    """The value of the setting `bfloat16_linears`; None: what is faster on this CPU."""
    return cpu_has_bfloat16() if setting is None else setting


def use_bfloat16_linears(module: nn.Module) -> None:
    """Make the linear layers of a float32 `module` compute in bfloat16, in place; weights and state dict stay as they are.

    Layers without a bias, those of adapters, stay in float32.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
