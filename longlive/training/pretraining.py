"""What the stages that pre-train a transformer share: the network, its optimiser, the average of its weights, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longlive.engine.apply import Recipe, apply
from longlive.engine.low_precision import resolve_bfloat16_linears
from longlive.models.wan import WanTransformer
from longlive.training.ema import EMA
from longlive.training.optimizer import MatrixOptimizer, warmup_cosine


class PretrainingStage:
    """A stage of one network and one process: Muon on the blocks' matrices, AdamW on the rest, linear warm-up and cosine decay.

    What is exported is the moving average of the weights. A subclass defines `step`, which calls `update`, and `validate`; it records
    in `last_batch` what the step was given.
    """

    between_videos = True

    def __init__(
        self, network: WanTransformer, *, steps: int, lr: float, ema_decay: float, bfloat16_linears: bool | None, seed: int
    ) -> None:
        self.network, self.steps = network, steps
        self.optimizer = MatrixOptimizer(network, lr=lr, hidden=lambda name: name.startswith("blocks.") and "modulation" not in name)
        self.ema = EMA(network, decay=ema_decay)
        apply(network, Recipe(bfloat16_linears=resolve_bfloat16_linears(bfloat16_linears)))
        self.generator = torch.Generator().manual_seed(seed)
        self.last_batch: dict[str, Any] = {}

    def update(self, number: int) -> float:
        """Take optimiser step `number`, clear the gradient, update the average; returns the gradient's norm before clipping to 1."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(warmup_cosine(number, self.steps))
        self.optimizer.zero_grad()
        self.ema.update(self.network, number)
        return norm.item()

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])

    def export(self, folder: Path) -> None:
        """Write the averaged weights to `folder/transformer`."""
        self.ema.average.save_pretrained(folder / "transformer")
