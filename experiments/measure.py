"""Scores of trained arms in two kinds of test, videos with a switch and long videos without, for every training seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from experiments.arms import Trained
from experiments.metrics import DriftScores, Estimate, SwitchScores, bootstrap, drift_scores, estimate, latency, slope, switch_scores
from experiments.report import Claim, Expected
from experiments.state_model import BLOCK, CLIP, WINDOW
from experiments.videos import Cut, Video, make, switch_pairs
from longlive.cache.window import Window
from longlive.evaluation.charts import Line
from longlive.generation.transition import Recache, Transition
from longlive.models.wan import WanTransformer
from longlive.types import Latents

SWITCH, AFTER = 24, 24  # the frame of the switch, two clips in, and the frames that follow it
NOISE_SEED = 9000  # of the test videos, the same for all training seeds

Scores = dict[str, Tensor]
"""The values of each metric, `[S, V, ...]`: training seeds, test videos."""


@dataclass(frozen=True)
class Case:
    """A trained arm, and how its videos are generated."""

    arm: str
    recache: Recache = "joint"
    keep_sink: bool = False
    window: Window = WINDOW
    relative: bool = False


def _stacked(scores: Sequence[SwitchScores] | Sequence[DriftScores]) -> Scores:
    return {part.name: torch.stack([getattr(one, part.name) for one in scores]) for part in fields(scores[0])}


def switch_video(network: WanTransformer, case: Case, num_videos: int) -> Latents:
    """Videos of `SWITCH + AFTER` frames whose prompt switches at `SWITCH`."""
    pairs = switch_pairs(num_videos)
    cut = Cut(SWITCH, [pair.after for pair in pairs], Transition(case.keep_sink, case.recache))
    before = [pair.before for pair in pairs]
    return make(
        network, before, num_latent_frames=SWITCH + AFTER, seed=NOISE_SEED, window=case.window, relative=case.relative, cut=cut
    ).latents


def switched(trained: Trained, case: Case, also: Callable[[Latents], None] | None = None) -> Scores:
    """Scores of videos with a switch; `also` is called with the videos of each seed."""
    pairs, found = switch_pairs(trained.scale.videos), []
    for seed in trained.scale.seeds:
        video = switch_video(trained.generator(case.arm, seed), case, len(pairs))
        if also is not None:
            also(video)
        found.append(switch_scores(video, pairs, SWITCH))
    return _stacked(found)


def lasting(trained: Trained, case: Case, clips: int, also: Callable[[Video], None] | None = None) -> Scores:
    """Scores of videos of one prompt, `clips` clips long; `also` is called with the videos of each seed."""
    captions, found = [pair.before for pair in switch_pairs(trained.scale.videos)], []
    for seed in trained.scale.seeds:
        network = trained.generator(case.arm, seed)
        video = make(network, captions, num_latent_frames=clips * CLIP, seed=NOISE_SEED, window=case.window, relative=case.relative)
        if also is not None:
            also(video)
        found.append(drift_scores(video.latents, captions))
    return _stacked(found)


def line(label: str, values: Tensor, *, step: int, first: int, resamples: int) -> Line:
    """The curve of values `[S, V, K]` at x = `first`, `first + step`, …"""
    estimates = bootstrap(values, resamples=resamples)
    xs = [first + step * k for k in range(len(estimates))]
    return Line(label, xs, [e.mean for e in estimates], [e.low for e in estimates], [e.high for e in estimates])


def claim(
    statement: str,
    expected: Expected,
    first: Scores,
    second: Scores,
    name: str,
    *,
    resamples: int,
    at: int | slice | None = None,
    margin: float = 0.0,
) -> Claim:
    """A claim about the paired difference of two arms in metric `name`; `at`: the block or clip, or a slice to average over."""
    one, other = (_part(scores[name].double(), at) for scores in (first, second))
    return Claim(statement, expected, estimate(one - other, resamples=resamples), margin)


def _part(values: Tensor, at: int | slice | None) -> Tensor:
    if at is None:
        return values
    return values[..., at].mean(dim=-1) if isinstance(at, slice) else values[..., at]


def latency_claim(statement: str, expected: Expected, first: Scores, second: Scores, *, resamples: int, margin: float = 0.0) -> Claim:
    """A claim about the difference of two arms' latencies, in frames."""
    both = torch.stack([first["adherence"], second["adherence"]], dim=2)
    (difference,) = bootstrap(both, lambda means: latency(means[..., 0, :]) - latency(means[..., 1, :]), resamples=resamples)
    return Claim(statement, expected, difference, margin)


def switch_cells(scores: Scores, *, resamples: int) -> list[Estimate]:
    """A row of `SWITCH_COLUMNS`."""
    at = [estimate(scores["adherence"][..., k], resamples=resamples) for k in (0, 1, 2, 3)]
    (wait,) = bootstrap(scores["adherence"], latency, resamples=resamples)
    rest = [estimate(scores[name], resamples=resamples) for name in ("unchanged", "identity", "jump", "flicker", "distance")]
    return [*at, wait, *rest]


SWITCH_COLUMNS = (
    *(f"adherence +{BLOCK * k}" for k in (1, 2, 3, 4)),
    f"latency, frames (≥ {AFTER}: never)",
    "unchanged attributes",
    "identity kept",
    "position jump, cells",
    "flicker",
    "distance to the manifold",
)


def drift_cells(scores: Scores, *, resamples: int) -> list[Estimate]:
    """A row of `DRIFT_COLUMNS`."""
    cells = []
    for name in ("adherence", "identity", "light", "step", "distance"):
        cells.append(estimate(scores[name][..., 0], resamples=resamples))
        cells.append(estimate(scores[name][..., -1], resamples=resamples))
        cells += bootstrap(scores[name], slope, resamples=resamples)
    return cells


DRIFT_COLUMNS = tuple(
    f"{name}, {when}"
    for name in ("all four attributes", "identity kept", "light turned, degrees", "step error, cells", "distance to the manifold")
    for when in ("first clip", "last clip", "slope per 100 frames")
)


def setting(trained: Trained, videos: str, **more: str) -> dict[str, object]:
    """The setting of an experiment for its report; `videos` describes a test video."""
    scale = trained.scale
    return {
        "networks": f"{scale.layers} layers, width {scale.width}, 1 token per frame; block {BLOCK}, clip {CLIP}, window {WINDOW.visible} "
        f"frames, the sink's {WINDOW.sink} included",
        "training": f"pre-training {scale.pretraining_steps} steps, once; for each seed init, {scale.init_steps} steps of "
        f"{scale.batch} videos, and from it every other arm, {scale.long_steps} steps; the generator learns in each "
        f"{scale.init_critic_updates}th and each {scale.long_critic_updates}nd of them",
        "training seeds": len(scale.seeds),
        "test videos": f"{scale.videos} for each seed, of captions that training never shows; {videos}",
        "intervals": f"95 %, bootstrap of {scale.resamples} over seeds and videos; arms share prompts and noise, differences are paired",
        **more,
    }
