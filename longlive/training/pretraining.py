"""What the miniature's transformers have in common before distillation: one network, its optimiser, average and random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longlive.engine.low_precision import use_bfloat16_linears
from longlive.models.wan import WanTransformer
from longlive.training.ema import EMA
from longlive.training.optimizer import MatrixOptimizer
from longlive.training.trainer import one_cycle


class Pretraining:
    """Muon on the blocks' matrices, AdamW on the rest, one cycle of `steps`; what is exported is the average of the weights.

    Args:
        bfloat16: linear layers compute in bfloat16.
    """

    def __init__(self, network: WanTransformer, *, steps: int, lr: float, ema_decay: float, bfloat16: bool, seed: int) -> None:
        self.network, self.steps = network, steps
        self.optimizer = MatrixOptimizer(network, lr=lr, hidden=lambda name: name.startswith("blocks.") and "modulation" not in name)
        self.ema = EMA(network, decay=ema_decay)
        if bfloat16:
            use_bfloat16_linears(network)
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, number: int) -> float:
        """Take step `number` with the gradient there is, and forget it; returns its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(one_cycle(number, self.steps))
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
        """The inverse of `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])

    def export(self, folder: Path) -> None:
        """Write the average as `folder/transformer`."""
        self.ema.average.save_pretrained(folder / "transformer")


class PretrainingStage:
    """What the trainer asks of a stage that is no more than its learner: the step and what it measures are the stage's own."""

    def __init__(self, learner: Pretraining) -> None:
        self.learner, self.generator = learner, learner.generator
        self._batch: dict[str, Any] = {}

    @property
    def at_rest(self) -> bool:
        return True

    def batch(self) -> dict[str, Any]:
        """What the last step was made of."""
        return self._batch

    def state(self) -> dict[str, Any]:
        return self.learner.state()

    def load(self, state: dict[str, Any]) -> None:
        self.learner.load(state)

    def export(self, folder: Path) -> None:
        self.learner.export(folder)
