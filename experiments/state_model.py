"""The student of the experiments: a LongLive of 1.2 M parameters on the state world, trained by the project's own stages.

Pre-training uses videos of the world: one network is trained with flow matching of whole clips, as critics are, and teacher forcing, as
generators are, and is the start of both. Distillation uses no videos: `DistillationStage` with the exact teacher. Knows nothing of arms.
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
from longlive.config import DistillationConfig
from longlive.engine.apply import Recipe
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
from longlive.training.networks import TrainableNetwork, write_transformer
from longlive.training.pretraining import PretrainingStage
from longlive.training.prompts import PromptSampler
from longlive.training.teacher_forcing import TeacherForcing
from longlive.types import Latents, Text

BLOCK, CLIP, OVERLAP = 3, 12, 3
WINDOW = Window(sink=3, recent=9)
SHIFT = 2.0  # with 5 and so few numbers per block, three of four steps would see almost only noise
STEPS = warp_steps([1000, 750, 500, 250], SHIFT)
HISTORY_SIGMA = 0.2  # in pre-training later blocks see a past with noise of up to this level, as a generated one has errors
NUM_PAIRS = 2048  # prompts and switch prompts of a distillation run


def new_network(seed: int, *, width: int, layers: int) -> WanTransformer:
    """A network with one token per frame: with four, each has a quarter of the position's information, and training takes several times
    as many steps. The rotary base of 30 lets heads this narrow distinguish neighbouring frames.
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
    """The caption that a sentence expresses."""
    return Captioned(**parse(prompt))


def embed(prompts: Sequence[str]) -> Text:
    """Embeddings of sentences for the state world's network."""
    return text_of([meaning(prompt) for prompt in prompts])


class WorldStage(PretrainingStage):
    """Five objectives per step; what is exported is the average of the weights.

    Clips and beginnings of clips, bidirectional, at all timesteps; then, at the generator's timesteps: first blocks, where everything that
    a prompt does not name must be invented; second blocks, which continue by moving the subject as the prompt says; and clips, whose later
    blocks see it return. The first three use the exact teacher's prediction, the mean of all possible videos, in place of the video that
    was drawn: the minimum is the same, and the gradient has much less noise.
    """

    def __init__(self, network: WanTransformer, *, steps: int, batch: int, lr: float, seed: int) -> None:
        super().__init__(network.requires_grad_(True), steps=steps, lr=lr, ema_decay=0.99, bfloat16_linears=True, seed=seed)
        self.size = batch
        self.teacher = ExactTeacher()
        self.bidirectional = FlowMatching(network)
        self.forced = TeacherForcing(network, block=BLOCK, window=WINDOW)
        self.captions = training_set()

    def step(self, number: int) -> dict[str, float]:
        equal_noise = number > self.steps // 2
        losses = {
            "clip": self._whole("clip", self.size, CLIP, equal_noise=equal_noise),
            "short": self._whole("short", 4 * self.size, BLOCK, equal_noise=equal_noise),
            "first": self._first(),
        }
        for name, videos, blocks, known in (("second", 2, 2, 1), ("causal", 1, CLIP // BLOCK, 0)):
            clip, text, noise = self._draw(name, videos * self.size, BLOCK * blocks)
            damage = HISTORY_SIGMA * torch.rand(len(clip), 1, 1, 1, 1, generator=self.generator)
            history = (1 - damage) * clip + damage * torch.randn(clip.shape, generator=self.generator)
            t, noise = self._few_timesteps(len(clip), blocks - known), noise[:, BLOCK * known :]
            frames = range(BLOCK * blocks)
            losses[name] = self.forced(clip, frames, text, t=t, noise=noise, context_blocks=known, history=history)
        torch.stack(list(losses.values())).sum().backward()
        return {f"world/{name}_loss": loss.item() for name, loss in losses.items()} | {"world/grad_norm": self.update(number)}

    def _whole(self, name: str, batch: int, num_latent_frames: int, *, equal_noise: bool) -> Tensor:
        """Beginnings of videos, bidirectional, with noise that grows from frame to frame; in the second half of training every other
        video has one timestep for all frames.

        A clear frame before a noisy one shows the direction that a word of motion means. With equal noise in all frames the network must
        learn the direction of motion and the order of frames at once, since neither helps alone: in 3000 steps it did not.
        """
        clip, text, noise = self._draw(name, batch, num_latent_frames)
        drawn = torch.rand(batch, num_latent_frames, generator=self.generator)
        drawn = drawn.sort(dim=1).values
        if equal_noise:
            drawn[::2] = torch.rand(len(drawn[::2]), 1, generator=self.generator)
        levels = (NUM_TIMESTEPS * shifted(drawn, SHIFT)).clamp(min=20.0)
        wanted = self.teacher(add_noise(clip, noise, levels), levels, text)
        return self.bidirectional(wanted.x0, text, t=levels, noise=wanted.noise)

    def _first(self) -> Tensor:
        """First blocks as in sampling, each at every timestep: noise added to the exact teacher's prediction at the previous timestep."""
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
        """Videos, the embeddings of their captions, and noise."""
        captions = self._captions(batch)
        videos = latents(captions, [draw_identity(self.generator) for _ in captions], num_latent_frames)
        self.last_batch[name] = videos
        return videos, text_of(captions), torch.randn(videos.shape, generator=self.generator)

    def _few_timesteps(self, *shape: int) -> Tensor:
        return torch.tensor(STEPS)[torch.randint(len(STEPS), shape, generator=self.generator)]

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of a run of distillation; the defaults are those of the paper's stage `init` at this size.

    Attributes:
        max_frames: lengths of the generated training videos.
        switch_at: frames at which their prompt may switch; empty: never.
        recache, keep_sink: what a switch does with the past.
        deviation: of the public code, whose cost is measured.
    """

    steps: int
    batch: int
    lr: float
    critic_lr: float
    critic_updates: int
    window: Window = WINDOW
    max_frames: tuple[int, ...] = (CLIP,)
    switch_at: tuple[int, ...] = ()
    recache: Recache = "joint"
    keep_sink: bool = False
    deviation: Deviation | None = None


class _Distilled(DistillationStage):
    """Also exports the critic, with which the next stage starts."""

    def export(self, folder: Path) -> None:
        super().export(folder)
        write_transformer(self.critic.network, folder / "critic", write=True)


def distillation_stage(generator: WanTransformer, critic: WanTransformer, settings: Distillation, *, seed: int) -> DistillationStage:
    """Distribution matching with the exact teacher as the real score; both networks are trained in place."""
    average = EMA(generator, decay=0.95, warm_up=False)
    recipe = Recipe(bfloat16_linears=True)
    trained = [TrainableNetwork(network, lr=lr, recipe=recipe) for network, lr in ((generator, settings.lr), (critic, settings.critic_lr))]
    random = {name: rank_generator(seed + number, 0) for number, name in enumerate(("noise", "timesteps"), 1)}
    world = World()
    return _Distilled(
        DistillationConfig(ema_start=0, critic_updates=settings.critic_updates),
        _tuner(generator, settings, random["noise"], seed, world),
        DMD(ExactTeacher(), Denoiser(critic), guidance_scale=1.0, shift=SHIFT),
        *trained,
        steps=settings.steps,
        negative=negative(settings.batch),
        random=random,
        validate=lambda network, folder, number: {},
        world=world,
        average=average,
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
    pairs = [(canonical(pair.before), canonical(pair.after)) for pair in drawn]
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
