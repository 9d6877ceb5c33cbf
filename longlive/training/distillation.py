"""Stages `init` and `long`: distribution matching of the generator on videos of its own making.

Every step trains the critic on a clip; every `ratio`-th step trains the generator on a clip of its own first. The clips come from one
`StreamingTuner`: one clip long in `init`, up to minutes long with prompt switches in `long`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longlive.checkpoints import store
from longlive.engine.sharding import load_state, spread_state
from longlive.models.wan import WanTransformer
from longlive.parallel.world import World, gather
from longlive.training.clips import Clip, StreamingTuner
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.networks import Learner, write_transformer
from longlive.types import Text

Validate = Callable[[WanTransformer, Path, int], dict[str, float]]
"""Makes videos with the generator as it is now, leaves pictures in a folder, measures; the number is that of the step."""


class DistillationStage:
    """Distribution matching with a critic that follows the generator (spec: training 2.4, 4.4, 4.6).

    Args:
        tuner, objective: their networks are those of `generator` and `critic`.
        negative: embedding of the negative prompt for a batch.
        random: this rank's generators of random numbers, by name, to be saved; "levels" draws what clips are judged at.
        average: of the generator's weights, begun at step `ema_start`; None for adapters.
        ratio: critic updates for one update of the generator, which comes with the first of them.
        accumulate: clips a step for each network.
        max_norm: of the gradient of each network.
        rate: factor on both learning rates at a step.
    """

    def __init__(
        self,
        tuner: StreamingTuner,
        objective: DMD,
        generator: Learner,
        critic: Learner,
        *,
        negative: Text,
        random: dict[str, torch.Generator],
        validate: Validate,
        world: World,
        average: EMA[WanTransformer] | None = None,
        ema_start: int = 200,
        ratio: int = 5,
        accumulate: int = 1,
        max_norm: float = 10.0,
        rate: Callable[[int], float] = lambda number: 1.0,
    ) -> None:
        if ratio < 1 or accumulate < 1:
            raise ValueError(f"ratio {ratio} and accumulate {accumulate} count updates and clips; choose 1 or more")
        self.tuner, self.objective, self.generator, self.critic = tuner, objective, generator, critic
        self.negative, self.random, self.world, self.max_norm = negative, random, world, max_norm
        self.ratio, self.accumulate, self.average, self.ema_start = ratio, accumulate, average, ema_start
        self._validate, self._rate = validate, rate
        self._averaging = False
        self._batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        """One update of the critic and, every `ratio` steps, of the generator; the generator's clip comes first."""
        trains_generator = number % self.ratio == 0
        sums: dict[str, Tensor] = {}
        for _ in range(self.accumulate):
            parts = self._train_generator() if trains_generator else {}
            parts |= self._train_critic()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / self.accumulate
        if trains_generator:
            sums["generator/grad_norm"] = self.generator.update(self.max_norm, self._rate(number))
            self._follow(number)
        sums["critic/grad_norm"] = self.critic.update(self.max_norm, self._rate(number))
        return {name: float(value) for name, value in sums.items()} | {"video/frames": float(self.tuner.rollout.end)}

    def _train_generator(self) -> dict[str, Tensor]:
        clip = self.tuner.clip(grad=True)
        t, noise = self._noise(clip)
        found = self.objective.generator_loss(clip.latents, clip.text, self.negative, t=t, noise=noise, fresh=clip.fresh)
        (found.loss / self.accumulate).backward()
        self._batch["generator"] = self._saved(clip, t, noise)
        return {"generator/loss": found.loss.detach(), "generator/gradient": found.gradient.abs().mean()}

    def _train_critic(self) -> dict[str, Tensor]:
        clip = self.tuner.clip(grad=False)
        t, noise = self._noise(clip)
        loss = self.objective.critic_loss(clip.latents, clip.text, t=t, noise=noise, fresh=clip.fresh)
        (loss / self.accumulate).backward()
        self._batch["critic"] = self._saved(clip, t, noise)
        return {"critic/loss": loss.detach()}

    def _noise(self, clip: Clip) -> tuple[Tensor, Tensor]:
        draw = self.random["levels"]
        noise = torch.randn(clip.latents.shape, generator=draw).to(clip.latents)
        return self.objective.draw_timesteps(clip.latents, draw), noise

    @staticmethod
    def _saved(clip: Clip, t: Tensor, noise: Tensor) -> dict[str, Any]:
        parts = {"latents": clip.latents.detach(), "fresh": clip.fresh, "t": t, "noise": noise}
        return parts | {"prompts": clip.prompts, "frames": (clip.frames.start, clip.frames.stop)}

    def _follow(self, number: int) -> None:
        if self.average is None or number < self.ema_start:
            return
        if self._averaging:
            self.average.update(self.generator.network, number)
        else:
            self.average.copy(self.generator.network)
            self._averaging = True

    @property
    def best(self) -> WanTransformer:
        """The generator: the average of its weights once there is one."""
        return self.average.average if self.average is not None and self._averaging else self.generator.network

    @property
    def at_rest(self) -> bool:
        """Whether `state` has no video under way in it, with its cache."""
        return self.tuner.between_videos

    def batch(self) -> dict[str, Any]:
        """What the last step was made of, for a look at it when a loss is not finite."""
        return self._batch

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Videos with the generator of now."""
        measured = self._validate(self.best, folder, number)
        if isinstance(self.best, FSDPModule):
            self.best.reshard()  # the outermost weights stay gathered after a pass without a gradient: the average could not go on
        return measured

    def state(self) -> dict[str, Any]:
        own = {"tuner": self.tuner.state(), "random": {name: generator.get_state() for name, generator in self.random.items()}}
        return {
            "generator": self.generator.state(),
            "critic": self.critic.state(),
            "average": spread_state(self.average.average) if self.average is not None and self._averaging else None,
            "choices": self.tuner.choices.state(),
            "ranks": gather(own, self.world),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; raises ValueError on another number of ranks."""
        if len(state["ranks"]) != self.world.size:
            raise ValueError(f"the run has {len(state['ranks'])} ranks, here are {self.world.size}; go on with as many")
        self.generator.load(state["generator"])
        self.critic.load(state["critic"])
        self._averaging = state["average"] is not None
        if self.average is not None and state["average"] is not None:
            load_state(self.average.average, state["average"])
        self.tuner.choices.load(state["choices"])
        own = state["ranks"][self.world.rank]
        self.tuner.load(own["tuner"], device=self.negative.device)
        for name, generator in self.random.items():
            generator.set_state(own["random"][name])

    def export(self, folder: Path) -> None:
        """`transformer/` in diffusers layout, or the adapters as `lora.pt` in the released one."""
        if not self.generator.adapters_only:
            write_transformer(self.best, folder, write=self.world.is_main)
            return
        parts = {"generator_lora": self.generator.adapters(), "critic_lora": self.critic.adapters()}
        if self.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            store.write_pt(parts, folder / "lora.pt")
