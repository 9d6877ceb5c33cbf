"""Stage `causal_init` by ODE regression: the causal student learns the ends of a teacher's trajectories from its own few timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from longlive.config import OdeConfig
from longlive.parallel.world import World, gather
from longlive.training.networks import TrainableNetwork, write_transformer
from longlive.training.ode import ODERegression
from longlive.training.ode_pairs import OdePairs
from longlive.training.validation import Validate
from longlive.types import Text


class OdeInitStage:
    """Regression on pairs that were generated before (CausVid, Yin et al. 2025).

    Args:
        objective: its network is that of `student`.
        generator: this rank's random numbers.
    """

    between_videos = True

    def __init__(
        self,
        config: OdeConfig,
        objective: ODERegression,
        student: TrainableNetwork,
        pairs: OdePairs,
        *,
        embed: Callable[[Sequence[str]], Text],
        generator: torch.Generator,
        validate: Validate,
        world: World,
    ) -> None:
        self.config, self.objective, self.student, self.pairs, self.embed = config, objective, student, pairs, embed
        self.generator, self.world, self._validate = generator, world, validate
        self.last_batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        """One update; every block of a clip is seen at a timestep of its own."""
        states, prompts = self.pairs.draw(self.config.batch, self.generator)
        blocks = self.config.clip_frames // self.config.block
        chosen = torch.randint(states.shape[1] - 1, (len(states), blocks), generator=self.generator)
        text = self.embed(prompts)
        self.last_batch = {"states": states, "chosen": chosen, "prompts": prompts}
        loss = self.objective(states.to(text.device), text, chosen=chosen.to(text.device))
        loss.backward()
        norm = self.student.update(self.config.max_norm)
        return {"causal_init/ode_loss": loss.item(), "causal_init/grad_norm": norm.item()}

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        return self._validate(self.student.network, folder, number)

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state(), "generator": gather(self.generator.get_state(), self.world)}

    def load(self, state: dict[str, Any]) -> None:
        self.student.load(state["student"])
        self.generator.set_state(state["generator"][self.world.rank])

    def export(self, folder: Path) -> None:
        write_transformer(self.student.network, folder, write=self.world.is_main)
