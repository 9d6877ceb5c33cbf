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

import torch
from torch import Tensor

from experiments.exact_teacher import ExactTeacher
from experiments.legacy import Deviation, LeakyCache, NoisedContext, ZeroSinkCache
from experiments.state_world import LATENT_SHAPE, TEXT_DIM, TEXT_LEN, draw_identity, latents, negative, text_of
from longlive.cache.history import HistoryCache
from longlive.cache.window import Window
from longlive.engine.low_precision import use_bfloat16_linears
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Recache, Transition
from longlive.miniature.captions import canonical, parse
from longlive.miniature.prompt_pairs import draw_pair
from longlive.miniature.world import Captioned, training_set
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import NUM_TIMESTEPS, add_noise, shifted, warp_steps
from longlive.parallel.world import SharedChoices, World, rank_generator
from longlive.training.clips import StreamingTuner
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD
from longlive.training.ema import EMA
from longlive.training.flow_matching import FlowMatching
from longlive.training.networks import Learner, write_transformer
from longlive.training.pretraining import Pretraining, PretrainingStage
from longlive.training.prompts import PromptPair, PromptSampler
from longlive.training.teacher_forcing import TeacherForcing
from longlive.types import Latents, Text

BLOCK, CLIP, OVERLAP = 3, 12, 3
WINDOW = Window(sink=3, recent=9)
SHIFT = 2.0  # with 5 and so few numbers in a block, three steps of four would see next to nothing but noise
STEPS = warp_steps([1000, 750, 500, 250], SHIFT)
HISTORY_SIGMA = 0.2  # noise in what later blocks see in pre-training, up to this level: their own past will have mistakes in it
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


class WorldStage(PretrainingStage):
    """Five objectives a step; what is exported is the average of the weights.

    Clips and their beginnings, bidirectional, at all levels; then, at the levels at which the generator works: first blocks, where all
    that a prompt does not say must be invented; second blocks, which can only go on by moving the subject as the prompt says; and
    clips, whose later blocks see it come round again. In the first three the exact teacher's prediction, the mean of all that may be,
    stands for the one video that was drawn: the same minimum, with a small part of the noise in the gradient.
    """

    def __init__(self, network: WanTransformer, *, steps: int, batch: int, lr: float, seed: int) -> None:
        self.size, self.steps = batch, steps
        self.teacher = ExactTeacher()
        self.bidirectional = FlowMatching(network)
        self.forced = TeacherForcing(network, block=BLOCK, window=WINDOW)
        super().__init__(Pretraining(network.requires_grad_(True), steps=steps, lr=lr, ema_decay=0.99, bfloat16=True, seed=seed))
        self.captions = training_set()

    def step(self, number: int) -> dict[str, float]:
        alike = number > self.steps // 2
        losses = {
            "clip": self._whole("clip", self.size, CLIP, alike=alike),
            "short": self._whole("short", 4 * self.size, BLOCK, alike=alike),
            "first": self._first(),
        }
        for name, videos, blocks, known in (("second", 2, 2, 1), ("causal", 1, CLIP // BLOCK, 0)):
            clip, text, noise = self._draw(name, videos * self.size, BLOCK * blocks)
            damage = HISTORY_SIGMA * torch.rand(len(clip), 1, 1, 1, 1, generator=self.generator)
            history = (1 - damage) * clip + damage * torch.randn(clip.shape, generator=self.generator)
            t, noise = self._few_levels(len(clip), blocks - known), noise[:, BLOCK * known :]
            frames = range(BLOCK * blocks)
            losses[name] = self.forced(clip, frames, text, t=t, noise=noise, context_blocks=known, history=history)
        torch.stack(list(losses.values())).sum().backward()
        return {f"world/{name}_loss": loss.item() for name, loss in losses.items()} | {"world/grad_norm": self.learner.update(number)}

    def _whole(self, name: str, batch: int, num_latent_frames: int, *, alike: bool) -> Tensor:
        """Beginnings of videos, bidirectional, with noise that grows from frame to frame; in the second half of training every other
        video has one level for all frames.

        A clear frame before a noisy one shows which way a word of motion means. With all frames alike, that left is not right can only
        be found together with before not being after, and nothing is gained by either alone: in 3000 steps it was not found.
        """
        clip, text, noise = self._draw(name, batch, num_latent_frames)
        drawn = torch.rand(batch, num_latent_frames, generator=self.generator)
        drawn = drawn.sort(dim=1).values
        if alike:
            drawn[::2] = torch.rand(len(drawn[::2]), 1, generator=self.generator)
        levels = (NUM_TIMESTEPS * shifted(drawn, SHIFT)).clamp(min=20.0)
        wanted = self.teacher(add_noise(clip, noise, levels), levels, text)
        return self.bidirectional(wanted.x0, text, t=levels, noise=wanted.noise)

    def _first(self) -> Tensor:
        """First blocks as sampling goes through them, every one at every level: noise on what the exact teacher made of the last level."""
        _, text, noise = self._draw("first", self.size, BLOCK)
        noisy, wanted = noise, []
        for t in STEPS:
            levels = torch.full(noise.shape[:2], t)
            if wanted:
                noisy = add_noise(wanted[-1].x0, torch.randn(noise.shape, generator=self.generator), levels)
            wanted.append(self.teacher(noisy, levels, text))
        x0, implied = (torch.cat(parts) for parts in zip(*((one.x0, one.noise) for one in wanted), strict=True))
        levels = torch.tensor(STEPS).repeat_interleave(len(noise))[:, None]
        return self.forced(x0, range(BLOCK), text.repeat(len(STEPS), 1, 1), t=levels, noise=implied)

    def _captions(self, count: int) -> list[Captioned]:
        return [self.captions[i] for i in torch.randint(len(self.captions), (count,), generator=self.generator).tolist()]

    def _draw(self, name: str, batch: int, num_latent_frames: int) -> tuple[Latents, Text, Latents]:
        """Videos, what is said of them, and noise."""
        captions = self._captions(batch)
        videos = latents(captions, [draw_identity(self.generator) for _ in captions], num_latent_frames)
        self._batch[name] = videos
        return videos, text_of(captions), torch.randn(videos.shape, generator=self.generator)

    def _few_levels(self, *shape: int) -> Tensor:
        return torch.tensor(STEPS)[torch.randint(len(STEPS), shape, generator=self.generator)]

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What one run of distillation does; the defaults are the stage `init` as the paper has it, at this size.

    Attributes:
        max_frames: lengths of the videos that are made for training.
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
    max_frames: tuple[int, ...] = (CLIP,)
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
    for network in (generator, critic):
        use_bfloat16_linears(network)
    learners = [Learner(network, lr=lr) for network, lr in ((generator, settings.lr), (critic, settings.critic_lr))]
    random = {name: rank_generator(seed + number, 0) for number, name in enumerate(("noise", "levels"), 1)}
    world = World()
    return _Distilled(
        _tuner(generator, settings, random["noise"], seed, world),
        DMD(ExactTeacher(), Denoiser(critic), guidance_scale=1.0, shift=SHIFT),
        *learners,
        negative=negative(settings.batch),
        random=random,
        validate=lambda network, folder, number: {},
        world=world,
        average=average,
        ema_start=0,
        ratio=settings.ratio,
    )


def _tuner(network: WanTransformer, settings: Distillation, random: torch.Generator, seed: int, world: World) -> StreamingTuner:
    def noise(frames: int) -> Latents:
        return torch.randn(settings.batch, frames, *LATENT_SHAPE, generator=random)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random)

    caches = {"zero_sink": ZeroSinkCache, "gradient_leak": LeakyCache}
    kind = NoisedContext if settings.deviation == "context_noise" else Rollout
    rollout = kind(
        Denoiser(network),
        caches.get(settings.deviation or "", HistoryCache)(
            num_layers=network.config.num_layers,
            batch=settings.batch,
            num_heads=network.config.num_heads,
            rope=network.rope(*LATENT_SHAPE[1:]),
            window=settings.window,
        ),
        FewStep(STEPS, draw),
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
        choices=SharedChoices(seed, world),
        block=BLOCK,
        clip_frames=CLIP,
        overlap=OVERLAP,
        max_frames=settings.max_frames,
        switch_at=settings.switch_at,
        transition=Transition(settings.keep_sink, settings.recache),
    )
