"""Metrics of videos of the state world, in closed form, one number per video, and 95 % intervals by bootstrap.

Values of an arm are tensors `[S, V, ...]`: training seeds, test videos. Videos of all arms and seeds share prompts and noise, so
differences of arms are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.exact_teacher import manifold_distance, nearest_clip
from experiments.state_model import BLOCK, CLIP
from experiments.state_world import ELEMENTS, StateIdentity, latents, read, tables, to_images
from longlive.miniature.captions import SwitchPair
from longlive.miniature.world import ATTRIBUTES, Captioned
from longlive.types import Latents

STEADY, IN_A_ROW = 0.9, 3  # the new prompt is followed from the first of IN_A_ROW blocks with at least this share right
LOOK_BACK = 6  # frames before a switch that define the subject's identity


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 20 else 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def _weights(count: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "R n"]:
    """The weight of each of `count` items in each resample: how often it is drawn, over the number of draws."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64)
    )


def bootstrap(
    values: Float[Tensor, "S V *rest"], statistic: Callable[[Tensor], Tensor] | None = None, *, resamples: int, seed: int = 0
) -> list[Estimate]:
    """Mean and percentile interval of a statistic of the mean over seeds and videos, which are resampled independently.

    Args:
        statistic: from means `[..., *rest]` to estimates `[..., K]`; None: the means themselves, flattened.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds, videos = values.shape[:2]
    flat = values.double().reshape(seeds, videos, -1)
    means = torch.einsum("rs,svk,rv->rk", _weights(seeds, resamples, generator), flat, _weights(videos, resamples, generator))
    every = torch.cat([flat.mean(dim=(0, 1))[None], means]).view(resamples + 1, *values.shape[2:])
    found = (every if statistic is None else statistic(every)).reshape(resamples + 1, -1)
    low, high = torch.quantile(found[1:], torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [Estimate(*numbers) for numbers in zip(found[0].tolist(), low.tolist(), high.tolist())]


def estimate(values: Float[Tensor, "S V"], *, resamples: int) -> Estimate:
    """Mean over seeds and videos."""
    return bootstrap(values, resamples=resamples)[0]


def per_block(values: Tensor, length: int = BLOCK) -> Tensor:
    """Mean over each `length` frames: `[V, F]` -> `[V, F / length]`."""
    return values.float().unflatten(1, (-1, length)).mean(dim=2)


def latency(adherence: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape"]:
    """Frames from the switch to the first of three consecutive blocks that are at least 90 % right; all frames if there are none."""
    steady = (adherence >= STEADY - 1e-9).unfold(-1, IN_A_ROW, 1).all(dim=-1)
    first = steady.long().argmax(dim=-1)
    return BLOCK * torch.where(steady.any(dim=-1), first, adherence.shape[-1]).double()


def slope(values: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape"]:
    """Change per 100 frames of a value per clip, by least squares, from the second clip on."""
    y = values[..., 1:]
    x = CLIP * torch.arange(y.shape[-1], dtype=y.dtype)
    x = x - x.mean()
    return 100 * (y * x).sum(dim=-1) / x.square().sum()


@dataclass(frozen=True)
class SwitchScores:
    """One value per video (`adherence`: one for each block after the switch).

    Attributes:
        adherence: share of the block's frames that show the new value of the changed attribute.
        unchanged: share of right values of the other captioned attributes, after the switch.
        identity: share of frames after the switch with the size, and within 22.5 degrees the texture, from before it.
        jump: cells between the first new position and the expected one.
        flicker: relative distance of the first new frame from the expected one, in everything that the switch does not change.
        distance: of the last clip from the nearest of the new prompt's videos.
    """

    adherence: Float[Tensor, "V K"]
    unchanged: Float[Tensor, " V"]
    identity: Float[Tensor, " V"]
    jump: Float[Tensor, " V"]
    flicker: Float[Tensor, " V"]
    distance: Float[Tensor, " V"]


def switch_scores(video: Latents, pairs: Sequence[SwitchPair], frame: int) -> SwitchScores:
    """Scores of videos whose prompt switches at `frame`."""
    later = video.shape[1] - frame
    reading = read(video)
    captions = [[pair.before] * frame + [pair.after] * later for pair in pairs]
    right = {name: values[:, frame:].float() for name, values in reading.correct_frames(captions).items()}
    changed = torch.stack([right[pair.attribute][v] for v, pair in enumerate(pairs)])
    changes = reading.identity_changed(slice(frame - LOOK_BACK, frame))
    kept = 1 - torch.stack([changes[name][:, frame:].float() for name in ("size", "texture")]).mean(dim=0)
    return SwitchScores(
        adherence=per_block(changed),
        unchanged=((sum(right.values()) - changed) / (len(ATTRIBUTES) - 1)).mean(dim=1),
        identity=kept.mean(dim=1),
        jump=reading.jump(captions)[:, frame],
        flicker=_flicker(video, pairs, frame),
        distance=manifold_distance(video[:, -CLIP:], [pair.after for pair in pairs]),
    )


def expected_frame(video: Latents, pairs: Sequence[SwitchPair], frame: int) -> Latents:
    """The expected first frame after the switch, `[V, 1, 8, 4, 4]`: the subject of the last frames, moved and changed."""
    last = read(nearest_clip(video[:, frame - LOOK_BACK : frame], [pair.before for pair in pairs]))
    names = ("size", "texture", "x", "y")
    identities = [StateIdentity(*values) for values in zip(*(getattr(last, name)[:, -1].tolist() for name in names))]
    return latents([[pair.before, pair.after] for pair in pairs], identities, 1, start=1)


def _flicker(video: Latents, pairs: Sequence[SwitchPair], frame: int) -> Float[Tensor, " V"]:
    keep = torch.eye(ELEMENTS, dtype=torch.float64).repeat(len(pairs), 1, 1)
    for v, pair in enumerate(pairs):
        if pair.attribute != "motion":  # a motion is in no single frame
            rows = tables()[pair.attribute]
            keep[v] -= torch.linalg.pinv(rows) @ rows
    wanted = expected_frame(video, pairs, frame).flatten(1).double()
    beyond = video[:, frame].flatten(1).double() - wanted
    return (torch.einsum("vij,vj->vi", keep, beyond).norm(dim=1) / torch.einsum("vij,vj->vi", keep, wanted).norm(dim=1)).float()


def image_jump(video: Latents, captions: Sequence[Captioned], frame: int) -> Float[Tensor, " V"]:
    """`image_change` of the state world's first image after a switch at `frame`."""
    return image_change(to_images(video[:, frame - LOOK_BACK : frame + 1]), captions)


def image_change(images: Tensor, captions: Sequence[Captioned]) -> Float[Tensor, " V"]:
    """Mean absolute difference of the last two images, over the median of earlier differences in videos that move.

    `images`: uint8 `[V, T, 3, Y, X]`.
    """
    change = (images[:, 1:].float() - images[:, :-1].float()).abs().mean(dim=(2, 3, 4))
    moving = torch.tensor([caption.motion != "still" for caption in captions])
    return change[:, -1] / change[moving, :-1].median()


@dataclass(frozen=True)
class DriftScores:
    """One value per clip of a video without a switch, `[V, K]`.

    Attributes:
        adherence: share of frames that show all four captioned attributes.
        identity: share of frames whose size, and texture within 22.5 degrees, are those of the first block.
        light: degrees that the direction of the light, which no prompt says, has turned since the first block; 90 is chance.
        step: cells between each position and where the frame before and the caption put it.
        distance: of the clip from the nearest of the prompt's videos: 0 is one of them, 1 as far as the mean of the world.
    """

    adherence: Float[Tensor, "V K"]
    identity: Float[Tensor, "V K"]
    light: Float[Tensor, "V K"]
    step: Float[Tensor, "V K"]
    distance: Float[Tensor, "V K"]


def drift_scores(video: Latents, captions: Sequence[Captioned]) -> DriftScores:
    """Scores of videos of one prompt each, clip by clip."""
    reading = read(video)
    right = torch.stack(list(reading.correct_frames(list(captions)).values())).all(dim=0)
    changes = reading.identity_changed(slice(0, BLOCK))
    kept = 1 - torch.stack([changes[name].float() for name in ("size", "texture")]).mean(dim=0)
    clips = [video[:, start : start + CLIP] for start in range(0, video.shape[1], CLIP)]
    return DriftScores(
        adherence=per_block(right, CLIP),
        identity=per_block(kept, CLIP),
        light=per_block(reading.turned(slice(0, BLOCK)), CLIP),
        step=per_block(reading.jump(list(captions)), CLIP),
        distance=torch.stack([manifold_distance(clip, list(captions)) for clip in clips], dim=1),
    )
