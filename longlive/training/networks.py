"""Networks of a stage: read from any layout, made trainable whole or by adapters, spread over ranks, with their optimisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longlive.checkpoints import convert, store
from longlive.engine.sharding import (
    checkpoint_blocks,
    clip_gradients,
    full_state,
    load_optimizer_state,
    load_state,
    optimizer_state,
    shard,
    spread_state,
)
from longlive.models.lora import add_lora, lora_state, merge_lora
from longlive.models.wan import WanTransformer


def load_network(
    path: str | Path, *, lora: str | Path | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> WanTransformer:
    """A frozen transformer from any layout that inference reads, with a LoRA (its alpha being its rank) merged into it if there is one.

    Raises:
        ValueError, FileNotFoundError: what does not fit or is missing.
    """
    loaded = store.load_transformer(path)
    config = loaded.config or convert.transformer_config(loaded.state)
    with torch.device("meta"):
        network = WanTransformer(**config)
    store.fill(network, loaded.state, what=f"the transformer of {path}", dtype=torch.float32 if lora else dtype)
    if lora is not None:
        network = merge_lora(network, store.load_lora(lora))
    torch.nn.Module.to(network, device, dtype)
    return network.requires_grad_(False)


class Learner:
    """A network in training and its AdamW: all its weights, or adapters of `lora_rank` on frozen ones. All ranks make it alike.

    Args:
        network: float32, whole, on its device; changed in place.
        checkpointing: blocks compute their activations again in the backward pass.
        compute: number type in which a network spread over ranks computes.
    """

    def __init__(
        self,
        network: WanTransformer,
        *,
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 0.01,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        checkpointing: bool = False,
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.lora_alpha, self.lr = network, lora_alpha, lr
        self._adapted = None if lora_rank is None else add_lora(network, rank=lora_rank, alpha=lora_alpha)
        if self._adapted is None:
            network.requires_grad_(True)
        if checkpointing:
            checkpoint_blocks(network)
        shard(network, param_dtype=compute, reduce_dtype=torch.float32)
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)

    @property
    def adapters_only(self) -> bool:
        return self._adapted is not None

    def update(self, max_norm: float, rate: float = 1.0) -> Tensor:
        """Clip the gradient's joint norm, step at `rate` times the learning rate, forget the gradient; returns the norm before clipping."""
        norm = clip_gradients(self.weights, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.network, FSDPModule):
            # The outermost weights stay gathered from a forward pass until the next backward pass. A rollout without a gradient
            # may have come just before: all passes until the next backward would go on with the weights of before this step.
            self.network.reshard()
        return norm

    def state(self) -> dict[str, Any]:
        """What is trained, and the optimiser's state; of what is spread over ranks this rank's parts."""
        weights = spread_state(self.network, trainable_only=self.adapters_only)
        return {"weights": weights, "optimizer": optimizer_state(self.network, self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        load_state(self.network, state["weights"], trainable_only=self.adapters_only)
        load_optimizer_state(self.network, self.optimizer, state["optimizer"])

    def adapters(self) -> dict[str, Tensor]:
        """The adapters in the released layout (`lora.pt`); on the first rank."""
        assert self._adapted is not None
        state = full_state(self._adapted, trainable_only=True)
        return {name: tensor.contiguous() for name, tensor in lora_state(self._adapted, state).items()} if state else {}


def write_transformer(network: WanTransformer, folder: Path, *, write: bool) -> None:
    """`folder/transformer` in diffusers layout, gathered from all ranks; the one with `write` writes."""
    state = full_state(network)
    if write:
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        store.write_safetensors(state, folder / "transformer", config=network_config(network))


def network_config(network: WanTransformer) -> dict[str, Any]:
    """What `config.json` beside the weights says."""
    return {"_class_name": type(network).__name__, **{k: v for k, v in network.config.items() if not k.startswith("_")}}
