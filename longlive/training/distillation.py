"""Stages `init` and `long`: distribution matching on the generator's own videos.

Every step trains the critic on a clip; every `critic_updates`-th step first trains the generator on a clip. The clips come from one
`StreamingTuner`, whose videos are one clip long in `init` and up to minutes long, with prompt switches, in `long`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from longlive.checkpoints import store
from longlive.config import DistillationConfig
from longlive.engine.sharding import load_state, sharded_state
from longlive.models.wan import WanTransformer
from longlive.parallel.world import World, gather
from longlive.training.clips import Clip, StreamingTuner
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.networks import TrainableNetwork, write_transformer
from longlive.training.optimizer import warmup_cosine
from longlive.training.validation import Validate
from longlive.types import Latents, Text, Timesteps

KnownScore = Callable[[Clip], Callable[[Latents, Timesteps], Latents]]
"""x0 predictions for noisy versions of a clip, without a network."""


class DistillationStage:
    """Distribution matching with a critic that follows the generator (DMD2, Yin et al. 2024).

    Args:
        tuner, objective: their networks are those of `generator` and `critic`.
        steps: of the whole run, for the learning-rate schedule.
        negative: embeddings of the negative prompt for a batch.
        random: this rank's generators, which are saved; "timesteps" draws timesteps and noise for teacher and critic.
        average: of the generator's weights, started at step `config.ema_start`; None for adapters.
        exact: the real score of a world that is known, in place of the teacher's.
    """

    def __init__(
        self,
        config: DistillationConfig,
        tuner: StreamingTuner,
        objective: DMD,
        generator: TrainableNetwork,
        critic: TrainableNetwork,
        *,
        steps: int,
        negative: Text,
        random: dict[str, torch.Generator],
        validate: Validate,
        world: World,
        average: EMA[WanTransformer] | None = None,
        exact: KnownScore | None = None,
    ) -> None:
        self.config, self.tuner, self.objective, self.generator, self.critic = config, tuner, objective, generator, critic
        self.negative, self.random, self.world, self.average, self.exact = negative, random, world, average, exact
        self._validate = validate
        self._lr_factor = partial(warmup_cosine, steps=steps, warmup=0) if config.lr_schedule == "cosine" else lambda number: 1.0
        self._averaging = False
        self.last_batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        """One update of the critic and, every `critic_updates` steps, of the generator, whose clip comes first."""
        trains_generator, clips = number % self.config.critic_updates == 0, self.config.gradient_accumulation
        sums: dict[str, Tensor] = {}
        for _ in range(clips):
            parts = self._train_generator() if trains_generator else {}
            parts |= self._train_critic()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / clips
        lr_factor = self._lr_factor(number)
        if trains_generator:
            sums["generator/grad_norm"] = self.generator.update(self.config.max_norm, lr_factor)
            self._update_average(number)
        sums["critic/grad_norm"] = self.critic.update(self.config.max_norm, lr_factor)
        return {name: float(value) for name, value in sums.items()} | {"video/frames": float(self.tuner.rollout.end)}

    def _train_generator(self) -> dict[str, Tensor]:
        clip = self.tuner.clip(grad=True)
        t, noise = self._draw(clip)
        exact = None if self.exact is None else self.exact(clip)
        found = self.objective.generator_loss(clip.latents, clip.text, self.negative, t=t, noise=noise, fresh=clip.fresh, exact=exact)
        (found.loss / self.config.gradient_accumulation).backward()
        self.last_batch["generator"] = self._to_save(clip, t, noise)
        return {"generator/loss": found.loss.detach(), "generator/gradient": found.gradient.abs().mean()}

    def _train_critic(self) -> dict[str, Tensor]:
        clip = self.tuner.clip(grad=False)
        t, noise = self._draw(clip)
        loss = self.objective.critic_loss(clip.latents, clip.text, t=t, noise=noise, fresh=clip.fresh)
        (loss / self.config.gradient_accumulation).backward()
        self.last_batch["critic"] = self._to_save(clip, t, noise)
        return {"critic/loss": loss.detach()}

    def _draw(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Timesteps and noise at which a clip is judged."""
        generator = self.random["timesteps"]
        noise = torch.randn(clip.latents.shape, generator=generator).to(clip.latents)
        return self.objective.draw_timesteps(clip.latents, generator), noise

    @staticmethod
    def _to_save(clip: Clip, t: Tensor, noise: Tensor) -> dict[str, Any]:
        parts = {"latents": clip.latents.detach(), "fresh": clip.fresh, "t": t, "noise": noise}
        return parts | {"prompts": clip.prompts, "frames": (clip.frames.start, clip.frames.stop)}

    def _update_average(self, number: int) -> None:
        if self.average is None or number < self.config.ema_start:
            return
        if self._averaging:
            self.average.update(self.generator.network, number)
        else:
            self.average.copy(self.generator.network)
            self._averaging = True

    @property
    def exported_generator(self) -> WanTransformer:
        """The generator that is validated and exported: with averaged weights once the average was started."""
        return self.average.average if self.average is not None and self._averaging else self.generator.network

    @property
    def between_videos(self) -> bool:
        """Whether `state` contains no video in progress, with its cache."""
        return self.tuner.between_videos

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        network = self.exported_generator
        measured = self._validate(network, folder, number)
        if isinstance(network, FSDPModule):
            network.reshard()  # after a pass without gradient the root module's weights stay gathered, and could not be averaged
        return measured

    def state(self) -> dict[str, Any]:
        own = {"tuner": self.tuner.state(), "random": {name: generator.get_state() for name, generator in self.random.items()}}
        return {
            "generator": self.generator.state(),
            "critic": self.critic.state(),
            "average": sharded_state(self.average.average) if self.average is not None and self._averaging else None,
            "choices": self.tuner.choices.state(),
            "ranks": gather(own, self.world),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises ValueError for another number of ranks."""
        if len(state["ranks"]) != self.world.size:
            raise ValueError(f"the state is of {len(state['ranks'])} ranks, this run has {self.world.size}; start as many")
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
        """Write `transformer/` and `critic/transformer/` in diffusers layout, or the adapters as `lora.pt` in that of the released file."""
        if not self.generator.adapters_only:
            write_transformer(self.exported_generator, folder, write=self.world.is_main)
            write_transformer(self.critic.network, folder / "critic", write=self.world.is_main)
            return
        parts = {"generator_lora": self.generator.adapters(), "critic_lora": self.critic.adapters()}
        if self.world.is_main:
            store.write_pt(parts, folder / "lora.pt")
