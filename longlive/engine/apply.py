"""How a network runs, applied from outside in one fixed order; the model files know nothing of it.

The order: 8-bit linear layers, which replace modules of the blocks; activation checkpointing, which wraps the blocks; bfloat16 linear
layers; sharding last, because it hooks into whatever `forward` a block has then. Passes that are compiled or recorded (`engine.steady`)
come after all of this: they can be taken away again. Load weights, add or merge adapters and copy a network
(for a moving average) before; make the optimiser after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from longlive.engine.checkpointing import checkpoint_blocks
from longlive.engine.linears import LinearKind, quantise_linears
from longlive.engine.low_precision import use_bfloat16_linears
from longlive.engine.sharding import shard


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Over which ranks and in which number types a network is sharded (see `engine.sharding.shard`)."""

    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    mesh: DeviceMesh | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `apply` does to a network; by default nothing.

    Attributes:
        quantize: linear layers of the blocks are in 8 bits; for inference only (see `engine.linears`).
        checkpointing: blocks recompute their activations in the backward pass.
        bfloat16_linears: linear layers of a float32 network compute in bfloat16; for CPUs.
        sharding: parameters, gradients and optimiser states are sharded over ranks; None: every rank has all of them.

    Raises:
        ValueError: when 8-bit layers are asked for together with what is for training.
    """

    quantize: LinearKind | None = None
    checkpointing: bool = False
    bfloat16_linears: bool = False
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        training = {"checkpointing": self.checkpointing, "bfloat16_linears": self.bfloat16_linears, "sharding": self.sharding is not None}
        if self.quantize is not None and any(training.values()):
            asked = " and ".join(name for name, given in training.items() if given)
            raise ValueError(f"a network in 8 bits cannot be trained: quantize {self.quantize!r} goes without {asked}")


def apply(network: nn.Module, recipe: Recipe) -> None:
    """Apply `recipe` to `network` in place.

    Raises:
        ValueError: when the network has no blocks to checkpoint or shard, or cannot be quantised (see `quantise_linears`).
    """
    if recipe.quantize is not None:
        quantise_linears(network, recipe.quantize)
    if recipe.checkpointing:
        checkpoint_blocks(network)
    if recipe.bfloat16_linears:
        use_bfloat16_linears(network)
    if recipe.sharding is not None:
        shard(network, recipe.sharding.mesh, param_dtype=recipe.sharding.param_dtype, reduce_dtype=recipe.sharding.reduce_dtype)
