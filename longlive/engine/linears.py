"""Linear layers in 8 bits: they replace those of a network's blocks, whose floating-point weights are freed.

Patch, text and time embedding and head stay as they are: in the 1.3B model they are 2 % of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from longlive.engine.blocks import blocks_of, transformer_of
from longlive.ops import eight_bits

log = logging.getLogger(__name__)

LinearKind = Literal["int8", "int8-weights", "fp8"]
"""int8: tokens and weights in int8. int8-weights: only the weights. fp8: tokens and weights in e4m3."""


class _Kind(NamedTuple):
    dtype: torch.dtype
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


KINDS: dict[str, _Kind] = {
    "int8": _Kind(torch.int8, eight_bits.int8_linear),
    "int8-weights": _Kind(torch.int8, eight_bits.int8_weights_linear),
    "fp8": _Kind(torch.float8_e4m3fn, eight_bits.fp8_linear),
}


class QuantisedLinear(nn.Module):
    """A linear layer whose weights are `values` `[o, k]` in 8 bits times `scales` `[o]`; scales and bias are float32.

    The names differ from those of `nn.Linear`, so that a state dict of one cannot be loaded into the other.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        values, scales = eight_bits.quantise(linear.weight.detach(), KINDS[kind].dtype, -1)
        self.values = nn.Parameter(values, requires_grad=False)  # parameters, so that they are counted and moved as weights are
        self.scales = nn.Parameter(scales.squeeze(-1), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a quantised layer has no gradients; train the network before it is quantised")
        return KINDS[self.kind].product(x, self.values, self.scales, self.bias)

    def extra_repr(self) -> str:
        return f"{self.values.shape[1]}, {self.values.shape[0]}, {self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """`network.to(dtype)` would widen the values or round the scales: of what `fn` does only the device is taken over."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)


def linear_kind(network: nn.Module) -> str | None:
    """The kind of the network's 8-bit linear layers; None when it has none."""
    return next((module.kind for module in network.modules() if isinstance(module, QuantisedLinear)), None)


def is_quantised(network: nn.Module) -> bool:
    """Whether any linear layer of the network is in 8 bits."""
    return linear_kind(network) is not None


def quantise_linears(network: nn.Module, kind: str) -> None:
    """Put every linear layer inside the blocks of `network` into 8 bits, in place: one after the other, so that at no time there are two
    copies of more than one layer. The network can then be run, moved and copied, but neither trained nor saved.

    Raises:
        ValueError: for an unknown kind, a network with adapters that are not merged, and one that is quantised already.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize {kind!r} is unknown; choose {', '.join(KINDS)}")
    if is_quantised(network):
        raise ValueError("this network is quantised already; load its weights again to quantise them in another way")
    if any(part.startswith("lora_") for name, _ in network.named_modules() for part in name.split(".")):
        raise ValueError("this network has adapters; merge them into its weights (merge_lora) before it is quantised")
    network.requires_grad_(False)
    places = [
        (parent, name)
        for block in blocks_of(network)
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in places:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(parent, name, QuantisedLinear(linear, kind))
    transformer_of(network).save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    log.info("quantised: %d linear layers, %s", len(places), kind)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("a quantised network is not saved: save it before it is quantised, and quantise when it is loaded (quantize=...)")
