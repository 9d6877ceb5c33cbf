"""Prompt switches that change one attribute: pairs of captions to try, and what a video shows after each, as the oracle reads it.

A switch must change what the new prompt changes, and nothing else: neither the other attributes nor what no prompt describes (position,
size, light). Knows nothing of models or training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longlive.miniature import oracle
from longlive.miniature.captions import SwitchPair
from longlive.miniature.world import ATTRIBUTES, FPS, MOTIONS, SIZE, SPEED, Captioned

AFTER = FPS  # images from the switch to those that are judged: one second
JUDGED = FPS // 2  # images, half a second
WATCHED = 3 * FPS  # images after the switch in which the subject may not be lost
GONE = 4  # consecutive images without a subject: one latent frame, a quarter of a second
LEFT = 0.25  # of the subject's area; with less it counts as gone
JUMP = 4.0  # pixels
GROWTH = 0.15  # less than the nearest sizes differ by (17 %), more than shape and background change what the oracle reads (12 %)
TURN = math.pi / 4  # the light has eight directions


def switch_pairs(new: Sequence[Captioned], per_kind: int, *, seed: int, old: Iterable[Captioned]) -> list[SwitchPair]:
    """`per_kind` switches of each attribute in turn (shape, color, background, motion, shape …), in an order that `seed` determines.

    Every caption that a video switches to is one of `new`. So is the caption before it, as far as `new` has such pairs; the others begin
    with a caption of `old`. Raises ValueError when there are too few pairs.
    """
    generator, known = torch.Generator().manual_seed(seed), frozenset(new)
    allowed = known | frozenset(old)
    kinds = []
    for attribute, values in ATTRIBUTES.items():
        changes = [(after.with_one_change(attribute, value), after) for after in new for value in values]
        pairs = [SwitchPair(before, after, attribute) for before, after in changes if before != after and before in allowed]
        order = torch.randperm(len(pairs), generator=generator).tolist()
        drawn = sorted((pairs[i] for i in order), key=lambda pair: pair.before not in known)  # stable: the order within both stays
        if len(drawn) < per_kind:
            raise ValueError(f"only {len(drawn)} pairs of captions differ in {attribute} alone, not {per_kind}; give more captions")
        kinds.append(drawn[:per_kind])
    return [pair for one_of_each in zip(*kinds) for pair in one_of_each]


@dataclass(frozen=True)
class AfterSwitch:
    """What `B` videos show after their switch. One second later, over half a second, the majority of the images:

    Attributes:
        new: whether the attribute that the switch changes is right, `[B]` bool.
        kept: share of the other three attributes that are right, `[B]`.
        size: relative change of the radius against the half second before the switch, `[B]`; NaN where there was no subject then or now.
        turn: change of the light's direction in radians, `[B]`; as `size`.
        jump: in the first second, the greatest distance in pixels between a position and one expected from the image before and the
            motion that the old or the new caption names, `[B]`; half the image's size where there is no subject.
        lost: whether in the first three seconds the subject was gone for a quarter of a second: none found, or with less than a quarter
            of its area, `[B]` bool.
    """

    new: Tensor
    kept: Tensor
    size: Tensor
    turn: Tensor
    jump: Tensor
    lost: Tensor

    @property
    def right(self) -> Tensor:
        """Whether all four attributes are right one second later, and the subject was not lost, `[B]` bool."""
        return self.new & (self.kept == 1) & ~self.lost

    def where(self, chosen: Tensor) -> AfterSwitch:
        """The videos that a mask `[B]` chooses."""
        return AfterSwitch(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def outcomes(self) -> dict[str, Tensor]:
        """`right`, `new`, `kept` and `lost`, and whether position, size and light are kept: numbers from 0 to 1, `[B]`."""
        kept = {"position": self.jump <= JUMP, "size": self.size.abs() <= GROWTH, "light": self.turn.abs() <= TURN}
        return {"right": self.right, "new": self.new, "kept": self.kept, "lost": self.lost, **kept}


def images_needed(at: int) -> range:
    """The images of a video that `after_switch` reads when the new prompt begins with image `at`."""
    return range(max(0, at - JUDGED), at + WATCHED + 1)


def after_switch(images: Tensor, pairs: Sequence[SwitchPair], at: int) -> AfterSwitch:
    """Read videos, uint8 `[B, T, 3, 64, 64]`, whose prompts switch as `pairs` says with image `at`.

    Raises ValueError when there is no image before the switch, or less than a second and a half after it.
    """
    if not 0 < at <= images.shape[1] - AFTER - JUDGED:
        raise ValueError(f"a switch at image {at} of {images.shape[1]} cannot be judged; {AFTER + JUDGED} images must follow it")
    reading, before = oracle.read(images), slice(max(0, at - JUDGED), at)
    later = slice(at + AFTER, at + AFTER + JUDGED)
    correct = reading.correct([pair.after for pair in pairs], later)
    changed = torch.tensor([[name == pair.attribute for name in ATTRIBUTES] for pair in pairs])  # [B, 4]
    shown = torch.stack([correct[name] for name in ATTRIBUTES], -1)
    radius = reading.radius[:, before].nanmedian(1).values
    gone = ~(reading.radius[:, at : at + WATCHED + 1] >= LEFT**0.5 * radius[:, None])
    light = [_mean_angle(reading.light[:, part]) for part in (before, later)]
    return AfterSwitch(
        new=(shown & changed).any(1),
        kept=(shown & ~changed).sum(1) / (len(ATTRIBUTES) - 1),
        size=reading.radius[:, later].nanmedian(1).values / radius - 1,
        turn=(light[1] - light[0] + torch.pi) % (2 * torch.pi) - torch.pi,
        jump=_jump(reading.displacement[:, at - 1 : at + AFTER], pairs),
        lost=gone.unfold(1, GONE, 1).all(-1).any(1),
    )


def _mean_angle(angles: Tensor) -> Tensor:
    """`[B, T]` in radians -> `[B]`; what is NaN is left out."""
    return torch.atan2(angles.sin().nanmean(1), angles.cos().nanmean(1))


def _jump(displacement: Tensor, pairs: Sequence[SwitchPair]) -> Tensor:
    steps = SPEED * torch.tensor([[MOTIONS[pair.before.motion], MOTIONS[pair.after.motion]] for pair in pairs]).float()  # [B, 2, 2]
    beyond = (displacement[:, :, None] - steps[:, None] + SIZE / 2) % SIZE - SIZE / 2  # [B, T, 2, 2]
    return beyond.norm(dim=-1).amin(-1).nan_to_num(SIZE / 2).amax(1)
