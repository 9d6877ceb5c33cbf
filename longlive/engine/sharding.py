"""A network sharded over the ranks of a run (FSDP2): how it is sharded, and its state as whole tensors or as this rank's shards.

Works from outside on a diffusers model, with or without adapters: names of parameters and state dicts do not change. Knows of the
network only which modules are its blocks and which of their modules run before them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from longlive.engine.blocks import blocks_of, transformer_of
from longlive.parallel.shards import StoredShards, has_stored, read_shards

TEXT_MODULES = ("cross_attn.k", "cross_attn.norm_k", "cross_attn.v")
"""Modules of a block that projecting a prompt calls, in all blocks before the first block runs: they are gathered separately."""

_COMPUTES_IN: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
"""Sharded models, and the type in which they compute."""

log = logging.getLogger(__name__)


def shard(network: nn.Module, mesh: DeviceMesh | None = None, *, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimiser states over the ranks, block by block (`fully_shard`), in place.

    Master weights keep their type, the network computes in `param_dtype`, gradients are averaged over ranks in `reduce_dtype`.
    Load weights, add adapters and make copies (a moving average) before; make optimisers after. A process that joined no group, or is
    alone on a CPU, leaves the network as it is.

    Args:
        mesh: None: all ranks in one dimension. With two dimensions the first replicates and the second shards.
    """
    device = next(network.parameters()).device
    if mesh is None:
        if not dist.is_initialized() or (dist.get_world_size() == 1 and device.type != "cuda"):
            log.info("one process: the network is not sharded and computes in its own type (on a GPU, start with torchrun for bfloat16)")
            return
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs are not cast: timesteps, rotations and modulation are float32 on purpose; the model casts the rest itself.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in blocks_of(network):
        fully_shard([block.get_submodule(name) for name in TEXT_MODULES], mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "write_kv")
    model = transformer_of(network)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _COMPUTES_IN[model] = param_dtype
    for method in ("project_text", "write_kv"):
        register_fsdp_forward_method(model, method)


def compute_dtype(network: ModelMixin) -> torch.dtype:
    """The type in which a network computes: that of its weights, or of `shard`'s mixed precision."""
    return _COMPUTES_IN.get(network, network.dtype)  # type: ignore[return-value]  # diffusers allows None


def full_state(network: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The state dict of the network before sharding: original names, whole tensors, on the CPU. On rank 0; empty elsewhere.

    All ranks must call.

    Args:
        trainable_only: without frozen parameters, e.g. only the adapters.
    """
    return _state(network, whole=True, trainable_only=trainable_only)


def sharded_state(network: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The state dict under original names, on the CPU; of sharded tensors (DTensor) this rank's shards. All ranks must call."""
    return _state(network, whole=False, trainable_only=trainable_only)


def _state(network: nn.Module, *, whole: bool, trainable_only: bool) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=whole, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def load_state(network: nn.Module, state: Mapping[str, Tensor | StoredShards], *, trainable_only: bool = False) -> None:
    """The inverse of `full_state`, which every rank must be given in full, and of a `sharded_state` whose shards were stored.

    Raises:
        ValueError: on all ranks, when names are missing or unknown, or stored shards are missing.
    """
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad} if trainable_only else set()
    wanted, given = set(network.state_dict()) - frozen, set(state)
    if wanted != given:
        raise ValueError(
            f"this state does not fit: {len(wanted - given)} names missing {sorted(wanted - given)[:2]}, "
            f"{len(given - wanted)} unknown {sorted(given - wanted)[:2]}"
        )
    if stored := has_stored(state):
        state = read_shards(dict(state), sharded_state(network, trainable_only=trainable_only))
    options = StateDictOptions(full_state_dict=not stored, strict=not trainable_only)
    set_model_state_dict(network, dict(state), options=options)  # type: ignore[arg-type]  # stored shards were read above


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by parameter names, on the CPU, of sharded tensors this rank's shards; empty before the first step.

    All ranks must call.
    """
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(network, optimizer, options=StateDictOptions(cpu_offload=True))


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of `optimizer_state`: whole, or with its shards stored. An empty state leaves the optimiser new.

    Gradients are dropped: torch allocates the state of a new optimiser by a step of size zero, which needs them to be None.
    """
    if not state:
        return
    optimizer.zero_grad(set_to_none=True)
    if stored := has_stored(state):
        state = read_shards(dict(state), get_optimizer_state_dict(network, optimizer, options=StateDictOptions(cpu_offload=True)))
    set_optimizer_state_dict(network, optimizer, dict(state), options=StateDictOptions(full_state_dict=not stored))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a joint norm of at most `max_norm`; returns the norm before that, over the shards of all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
