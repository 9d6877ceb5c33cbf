"""Stage `causal_init` by ODE regression: the causal student learns the ends of a teacher's trajectories from its own few levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from longlive.models.wan import WanTransformer
from longlive.parallel.world import World, gather
from longlive.training.networks import Learner, write_transformer
from longlive.training.ode import ODERegression
from longlive.training.ode_pairs import OdePairs
from longlive.types import Text

Validate = Callable[[WanTransformer, Path, int], dict[str, float]]


class OdeInitStage:
    """Regression on pairs that were made before (spec: training 6.1).

    Args:
        objective: its network is that of `student`.
        blocks: of a clip; each is seen at a level of its own.
        draw: this rank's random numbers.
    """

    def __init__(
        self,
        objective: ODERegression,
        student: Learner,
        pairs: OdePairs,
        *,
        embed: Callable[[Sequence[str]], Text],
        blocks: int,
        batch: int,
        max_norm: float,
        draw: torch.Generator,
        validate: Validate,
        world: World,
    ) -> None:
        self.objective, self.student, self.pairs, self.embed = objective, student, pairs, embed
        self.blocks, self.size, self.max_norm, self.draw, self.world = blocks, batch, max_norm, draw, world
        self._validate = validate
        self._batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        states, prompts = self.pairs.draw(self.size, self.draw)
        chosen = torch.randint(states.shape[1] - 1, (len(states), self.blocks), generator=self.draw)
        text = self.embed(prompts)
        self._batch = {"states": states, "chosen": chosen, "prompts": prompts}
        loss = self.objective(states.to(text.device), text, chosen=chosen.to(text.device))
        loss.backward()
        norm = self.student.update(self.max_norm)
        return {"causal_init/ode_loss": loss.item(), "causal_init/grad_norm": norm.item()}

    @property
    def at_rest(self) -> bool:
        return True

    def batch(self) -> dict[str, Any]:
        """What the last step was made of."""
        return self._batch

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Videos with the student of now."""
        return self._validate(self.student.network, folder, number)

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state(), "draw": gather(self.draw.get_state(), self.world)}

    def load(self, state: dict[str, Any]) -> None:
        self.student.load(state["student"])
        self.draw.set_state(state["draw"][self.world.rank])

    def export(self, folder: Path) -> None:
        write_transformer(self.student.network, folder, write=self.world.is_main)
