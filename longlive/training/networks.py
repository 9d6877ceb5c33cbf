"""Networks of a stage: loaded from any layout, trained in full or by adapters, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longlive.checkpoints import configs, store
from longlive.checkpoints.lora import load_lora
from longlive.engine.apply import Recipe, apply
from longlive.engine.sharding import clip_gradients, full_state, load_optimizer_state, load_state, optimizer_state, sharded_state
from longlive.models.lora import add_lora, lora_state, merge_lora
from longlive.models.wan import WanTransformer


def load_network(
    path: str | Path, *, lora: str | Path | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> WanTransformer:
    """A frozen transformer from any layout that inference reads; a LoRA, whose alpha is taken to be its rank, is merged into it.

    Raises:
        ValueError, FileNotFoundError: for weights that do not fit or are missing.
    """
    loaded = store.load_transformer(path)
    config = loaded.config or configs.transformer_config(loaded.state)
    with torch.device("meta"):
        network = WanTransformer(**config)
    store.fill(network, loaded.state, what=f"the transformer of {path}", dtype=torch.float32 if lora else dtype)
    if lora is not None:
        network = merge_lora(network, load_lora(lora))
    torch.nn.Module.to(network, device, dtype)
    return network.requires_grad_(False)


class TrainableNetwork:
    """A network and its AdamW, which trains all weights, or adapters of `lora_rank` on frozen weights. All ranks must construct it alike.

    Args:
        network: float32, whole, on its device; changed in place.
        recipe: applied after adapters were added and before the optimiser is made.
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
        recipe: Recipe,
    ) -> None:
        self.network, self.lr = network, lr
        self._adapted = None if lora_rank is None else add_lora(network, rank=lora_rank, alpha=lora_alpha)
        if self._adapted is None:
            network.requires_grad_(True)
        apply(network, recipe)
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)

    @property
    def adapters_only(self) -> bool:
        """Whether only adapters are trained."""
        return self._adapted is not None

    def update(self, max_norm: float, lr_factor: float = 1.0) -> Tensor:
        """Clip the gradient's joint norm, take a step at `lr_factor * lr`, clear the gradient; returns the norm before clipping."""
        norm = clip_gradients(self.weights, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_factor * self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.network, FSDPModule):
            # The root module's weights stay gathered from a forward pass until the next backward pass. A rollout without gradient may
            # have come just before: every pass until the next backward would use the weights from before this step.
            self.network.reshard()
        return norm

    def state(self) -> dict[str, Any]:
        """The trained weights and the optimiser's state; of sharded tensors this rank's shards."""
        weights = sharded_state(self.network, trainable_only=self.adapters_only)
        return {"weights": weights, "optimizer": optimizer_state(self.network, self.optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        load_state(self.network, state["weights"], trainable_only=self.adapters_only)
        load_optimizer_state(self.network, self.optimizer, state["optimizer"])

    def adapters(self) -> dict[str, Tensor]:
        """The adapters under the names of the released `lora.pt`; on rank 0, empty elsewhere. All ranks must call."""
        assert self._adapted is not None
        state = full_state(self._adapted, trainable_only=True)
        return {name: tensor.contiguous() for name, tensor in lora_state(self._adapted, state).items()} if state else {}


def write_transformer(network: WanTransformer, folder: Path, *, write: bool) -> None:
    """Write `folder/transformer` in diffusers layout, gathered from all ranks, on the rank with `write`. All ranks must call."""
    state = full_state(network)
    if write:
        config = {"_class_name": type(network).__name__, **{k: v for k, v in network.config.items() if not k.startswith("_")}}
        store.write_safetensors(state, folder / "transformer", config=config)
