"""The student of the experiments: a LongLive of 1.2 M parameters on the state world, trained by the project's own stages.

Pre-training sees the world's videos: one network learns flow matching of whole clips (as critics do) and teacher forcing (as
generators do), and is the start of both. Distillation sees none: `DistillationStage` on videos that a `StreamingTuner` makes, judged by the
exact teacher. Knows nothing of which arms there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.legacy import Deviation, LeakyCache, NoisedContext, ZeroSinkCache
from longlive.cache.history import HistoryCache
from longlive.cache.window import Window
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Recache, Rollout
from longlive.miniature.captions import canonical, parse
from longlive.miniature.exact_teacher import ExactTeacher
from longlive.miniature.prompt_pairs import draw_pair
from longlive.miniature.state_world import LATENT_SHAPE, TEXT_DIM, TEXT_LEN, draw_identity, latents, negative, text_of
from longlive.miniature.world import Captioned, training_set
from longlive.models.wan import WanTransformer
from longlive.ops.flow import NUM_LEVELS, shifted, warp_steps
from longlive.parallel.world import SharedChoices, World, rank_generator
from longlive.training.clips import StreamingTuner
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.flow_matching import FlowMatching
from longlive.training.networks import Learner, write_transformer
from longlive.training.ode import ODERegression, trajectory
from longlive.training.optimizer import MatrixOptimizer
from longlive.training.prompts import PromptPair, PromptSampler
from longlive.training.teacher_forcing import TeacherForcing
from longlive.training.trainer import one_cycle
from longlive.types import Latents, Text

BLOCK, CLIP, OVERLAP = 3, 12, 3
WINDOW = Window(sink=3, recent=9)
SHIFT = 5.0
PRETRAINING_SHIFT = 2.0  # most of what there is to learn of motion shows at less noise
STEPS = warp_steps([1000, 750, 500, 250], SHIFT)
NUM_PAIRS = 2048  # prompts, with what they switch to, that a distillation run goes through


def new_network(seed: int, *, width: int, layers: int) -> WanTransformer:
    """One token a frame: with four, each has a quarter of what tells a position, and finding it takes several times the steps.

    A rotary base of 30, with which heads this narrow tell neighbouring frames apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, columns = LATENT_SHAPE
        return WanTransformer(
            patch_size=(1, height, columns),
            in_dim=channels,
            out_dim=channels,
            dim=width,
            ffn_dim=4 * width,
            freq_dim=64,
            text_len=TEXT_LEN,
            text_dim=TEXT_DIM,
            num_heads=4,
            num_layers=layers,
            rope_theta=30.0,
        )


@cache
def meaning(prompt: str) -> Captioned:
    """What a sentence says."""
    return Captioned(**parse(prompt))


def embed(prompts: Sequence[str]) -> Text:
    """Sentences as the state world's network reads them."""
    return text_of([meaning(prompt) for prompt in prompts])


class WorldStage:
    """Four objectives a step; what is exported is the average of the weights.

    Whole clips, bidirectional, for the critic to be; first blocks, where all that a prompt does not say must be invented, by regression
    on the exact teacher's trajectories; second blocks, which can only go on by moving the subject as the prompt says; and clips, whose
    later blocks see it come round again. All but the first are trained at the levels at which the generator works.
    """

    def __init__(self, network: WanTransformer, *, steps: int, batch: int, lr: float, trajectories: int, seed: int) -> None:
        self.network, self.steps, self.size = network.requires_grad_(True), steps, batch
        self.bidirectional = FlowMatching(network)
        self.regression = ODERegression(network, block=BLOCK, window=WINDOW, levels=STEPS, clean_history=True)
        self.forced = TeacherForcing(network, block=BLOCK, window=WINDOW)
        self.optimizer = MatrixOptimizer(network, lr=lr, hidden=lambda name: name.startswith("blocks.") and "modulation" not in name)
        self.average = EMA(network, decay=0.99)
        self.captions = training_set()
        self._batch: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(seed)
        parts = [self._trajectories(min(512, trajectories)) for _ in range(-(-trajectories // 512))]
        self.states, self.texts = (torch.cat(part) for part in zip(*parts, strict=True))

    def step(self, number: int) -> dict[str, float]:
        self.optimizer.zero_grad()
        size, losses = self.size, {}
        clip, text, noise = self._draw("clip", size, CLIP)
        levels = NUM_LEVELS * shifted(self._uniform(size), PRETRAINING_SHIFT)
        losses["clip"] = self.bidirectional(clip, text, t=levels, noise=noise)
        which = self._below(len(self.states), 4 * size)
        losses["first"] = self.regression(self.states[which], self.texts[which], chosen=self._below(len(STEPS), 4 * size, 1))
        clip, text, noise = self._draw("second", size, 2 * BLOCK)
        second = noise[:, BLOCK:]
        losses["second"] = self.forced(clip, range(2 * BLOCK), text, t=self._few_levels(size, 1), noise=second, context_blocks=1)
        clip, text, noise = self._draw("causal", size // 2, CLIP)
        losses["causal"] = self.forced(clip, range(CLIP), text, t=self._few_levels(size // 2, CLIP // BLOCK), noise=noise)
        torch.stack(list(losses.values())).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(one_cycle(number, self.steps, warmup=min(50, self.steps // 4)))
        self.average.update(self.network, number)
        return {f"world/{name}_loss": loss.item() for name, loss in losses.items()} | {"world/grad_norm": norm.item()}

    def _captions(self, count: int) -> list[Captioned]:
        return [self.captions[i] for i in self._below(len(self.captions), count).tolist()]

    def _trajectories(self, count: int) -> tuple[Tensor, Text]:
        """Of first blocks, from noise to clean, as the exact teacher's flow leads."""
        text = text_of(self._captions(count))
        noise = torch.randn(count, BLOCK, *LATENT_SHAPE, generator=self.generator)
        keep = [12 * state for state in range(len(STEPS) + 1)]
        return trajectory(ExactTeacher(), noise, text, keep=keep, shift=SHIFT), text  # type: ignore[arg-type]

    def _draw(self, name: str, batch: int, num_frames: int) -> tuple[Latents, Text, Latents]:
        """Videos, what is said of them, and noise."""
        captions = self._captions(batch)
        videos = latents(captions, [draw_identity(self.generator) for _ in captions], num_frames)
        self._batch[name] = videos
        return videos, text_of(captions), torch.randn(videos.shape, generator=self.generator)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _below(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def _few_levels(self, *shape: int) -> Tensor:
        return torch.tensor(STEPS)[self._below(len(STEPS), *shape)]

    def batch(self) -> dict[str, Any]:
        return self._batch

    @property
    def at_rest(self) -> bool:
        return True

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.generator.set_state(state["generator"])

    def export(self, folder: Path) -> None:
        write_transformer(self.average.average, folder, write=True)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What one run of distillation does; the defaults are the stage `init` as the paper has it, at this size.

    Attributes:
        max_frames: length of the videos that are made for training.
        switch_at: frames at which their prompt may switch; empty: never.
        recache, keep_sink: what a switch does with the past.
        deviation: of the public code, if one is to be measured.
    """

    steps: int
    batch: int
    lr: float
    critic_lr: float
    ratio: int
    window: Window = WINDOW
    max_frames: int = CLIP
    switch_at: tuple[int, ...] = ()
    recache: Recache = "joint"
    keep_sink: bool = False
    deviation: Deviation | None = None


class _Distilled(DistillationStage):
    """Exports the critic too, with which the next stage goes on."""

    def export(self, folder: Path) -> None:
        super().export(folder)
        write_transformer(self.critic.network, folder / "critic", write=True)


def distillation_stage(generator: WanTransformer, critic: WanTransformer, settings: Distillation, *, seed: int) -> DistillationStage:
    """Distribution matching of `generator` with the exact teacher as the real score; both networks are changed in place."""
    average = EMA(generator, decay=0.95, warm_up=False)
    learners = [Learner(network, lr=lr) for network, lr in ((generator, settings.lr), (critic, settings.critic_lr))]
    random = {name: rank_generator(seed + number, 0) for number, name in enumerate(("noise", "levels"), 1)}
    here = World()
    return _Distilled(
        _tuner(generator, settings, random["noise"], seed, here),
        DMD(ExactTeacher(), Denoiser(critic), guidance=0.0, shift=SHIFT),  # type: ignore[arg-type]  # stands where a Denoiser does
        *learners,
        negative=negative(settings.batch),
        random=random,
        validate=lambda network, folder, number: {},
        here=here,
        average=average,
        ema_start=0,
        ratio=settings.ratio,
    )


def _tuner(network: WanTransformer, settings: Distillation, random: torch.Generator, seed: int, here: World) -> StreamingTuner:
    def noise(frames: int) -> Latents:
        return torch.randn(settings.batch, frames, *LATENT_SHAPE, generator=random)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random)

    caches = {"zero_sink": ZeroSinkCache, "gradient_leak": LeakyCache}
    kind = NoisedContext if settings.deviation == "context_noise" else Rollout
    rollout = kind(
        Denoiser(network),
        caches.get(settings.deviation or "", HistoryCache)(window=settings.window, theta=network.config.rope_theta),
        steps=STEPS,
        draw=draw,
        recache=settings.recache,
    )
    pairs_from = torch.Generator().manual_seed(seed)
    captions = training_set()
    drawn = [draw_pair(pairs_from, captions) for _ in range(NUM_PAIRS)]
    pairs = [PromptPair(canonical(pair.before), canonical(pair.after)) for pair in drawn]
    return StreamingTuner(
        rollout,
        PromptSampler(pairs, batch=settings.batch, seed=seed),
        embed=embed,
        noise=noise,
        choices=SharedChoices(seed, here),
        block=BLOCK,
        clip_frames=CLIP,
        overlap=OVERLAP,
        max_frames=(settings.max_frames,),
        switch_at=settings.switch_at,
        keep_sink=settings.keep_sink,
    )
