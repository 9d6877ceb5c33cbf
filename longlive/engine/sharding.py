"""A network spread over the processes of a run (FSDP2), and blocks that compute their activations twice instead of keeping them.

Both are applied from outside to a diffusers model, whole or with adapters inside: names of parameters and state dicts stay
as they are. Knows of the network only which modules are its blocks, and what is called of them before they run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
from torch.utils.checkpoint import checkpoint

from longlive.parallel.parts import Stored, read_parts, stored

READ_APART = ("cross_attn.k", "cross_attn.norm_k", "cross_attn.v")
"""Modules of a block that reading a prompt calls, for all blocks, before the first block runs: they are gathered on their own."""

_COMPUTES_IN: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
"""Sharded models, and the type in which they compute."""

log = logging.getLogger(__name__)


def transformer_of(network: nn.Module) -> ModelMixin:
    """The diffusers model that `network` is or wraps. Raises ValueError when there is none."""
    for module in network.modules():
        if isinstance(module, ModelMixin):
            return module
    raise ValueError(f"a {type(network).__name__} holds no diffusers model; give a WanTransformer or one with adapters")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules that the model names as its smallest parts (`_no_split_modules`). Raises ValueError when there are none."""
    model = transformer_of(network)
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks: its _no_split_modules is {model._no_split_modules}")
    return blocks


def _twice(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]  # blocks draw nothing


def checkpoint_blocks(network: nn.Module) -> None:
    """From now on every block forgets its activations when a gradient is wanted and computes them again in the backward pass.

    What a block reads besides its inputs must not change in between: a view of a `HistoryCache` does not, an in-place ring would.
    Call it before `shard`. A second call changes nothing.
    """
    for block in blocks_of(network):
        forward = block.forward
        if not (isinstance(forward, partial) and forward.func is _twice):
            block.forward = partial(_twice, forward)  # type: ignore[method-assign]


def shard(network: nn.Module, mesh: DeviceMesh | None = None, *, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Spread parameters, gradients and optimiser states over the ranks, block by block (`fully_shard`), in place.

    Master weights keep their type, the network computes in `param_dtype`, gradients are averaged over ranks in `reduce_dtype`.
    Load weights, add adapters and make copies (a moving average) before; make optimisers after. A process that
    met no others, or is alone on a CPU, has nothing to spread and keeps the network as it is.

    Args:
        mesh: all ranks in one dimension if None; of two dimensions, the first replicates and the second shards.
    """
    device = next(network.parameters()).device
    if mesh is None:
        if not dist.is_initialized() or (dist.get_world_size() == 1 and device.type != "cuda"):
            log.info("one process: the network stays whole and computes in its own type (on a GPU, start with torchrun for bfloat16)")
            return
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs are not cast: timesteps, rotations and modulation are float32 on purpose, the rest the model casts itself.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in blocks_of(network):
        fully_shard([block.get_submodule(name) for name in READ_APART], mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    model = transformer_of(network)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _COMPUTES_IN[model] = param_dtype
    register_fsdp_forward_method(model, "project_text")


def compute_dtype(network: ModelMixin) -> torch.dtype:
    """The type in which a network computes: that of its weights, or of `shard`'s mixed precision."""
    return _COMPUTES_IN.get(network, network.dtype)


def full_state(network: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The state dict as if nothing were spread: original names, whole tensors, on the CPU. On rank 0; empty elsewhere. All ranks must call.

    Args:
        trainable_only: without frozen parameters, e.g. only the adapters.
    """
    return _state(network, whole=True, trainable_only=trainable_only)


def spread_state(network: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The state dict under original names, on the CPU: of what is spread (DTensor) this rank's parts. All ranks must call."""
    return _state(network, whole=False, trainable_only=trainable_only)


def _state(network: nn.Module, *, whole: bool, trainable_only: bool) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=whole, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def load_state(network: nn.Module, state: Mapping[str, Tensor | Stored], *, trainable_only: bool = False) -> None:
    """The inverse of `full_state`, of which every rank must be given all, and of `spread_state` whose parts were stored.

    Raises:
        ValueError: on all ranks, when names are missing or unknown, or a stored part is not there.
    """
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad} if trainable_only else set()
    wanted, given = set(network.state_dict()) - frozen, set(state)
    if wanted != given:
        raise ValueError(
            f"this state does not fit: {len(wanted - given)} names missing {sorted(wanted - given)[:2]}, "
            f"{len(given - wanted)} unknown {sorted(given - wanted)[:2]}"
        )
    if parts := stored(state):
        state = read_parts(dict(state), spread_state(network, trainable_only=trainable_only))
    options = StateDictOptions(full_state_dict=not parts, strict=not trainable_only)
    set_model_state_dict(network, dict(state), options=options)  # type: ignore[arg-type]  # what was stored has been read


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by parameter names, on the CPU, of what is spread this rank's parts; empty before the first step.
    All ranks must call."""
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(network, optimizer, options=StateDictOptions(cpu_offload=True))


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of `optimizer_state`: whole, or with its parts stored. An empty one leaves the optimiser new.

    Gradients are dropped: torch lays out the state of a new optimiser by an update of size zero, which it does not make over them.
    """
    if not state:
        return
    optimizer.zero_grad(set_to_none=True)
    if parts := stored(state):
        state = read_parts(dict(state), get_optimizer_state_dict(network, optimizer, options=StateDictOptions(cpu_offload=True)))
    set_optimizer_state_dict(network, optimizer, dict(state), options=StateDictOptions(full_state_dict=not parts))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a joint norm of `max_norm`; returns the norm over all ranks' parts before that."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
