"""The transformer and its blocks inside a network, whether it is wrapped (adapters, FSDP2) or not."""

from __future__ import annotations

from diffusers import ModelMixin
from torch import nn


def transformer_of(network: nn.Module) -> ModelMixin:
    """The diffusers model that `network` is or wraps. Raises ValueError when there is none."""
    for module in network.modules():
        if isinstance(module, ModelMixin):
            return module
    raise ValueError(f"a {type(network).__name__} holds no diffusers model; give a WanTransformer or one with adapters")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules whose classes the model lists in `_no_split_modules`. Raises ValueError when there are none."""
    model = transformer_of(network)
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks: its _no_split_modules is {model._no_split_modules}")
    return blocks
