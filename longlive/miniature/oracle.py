"""Recognises what a video of the miniature world shows, from its pixels and in closed form, without a learned classifier.

Background: per-channel median. Colour: mean of the pixels with the strongest contrast, nearest palette entry at any shading. Mask: pixels
nearer to the colour than to the background. Shape: best intersection over union with templates of the same area. Position: circular mean.
Motion: nearest direction of the circular displacement. Light: the direction in which the subject gets brighter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longlive.miniature.world import ATTRIBUTES, BACKGROUNDS, COLORS, MOTIONS, SHADE, SHAPES, SIZE, SPEED, Captioned, soft_mask

CONFIDENT_IOU = 0.7  # with less overlap with its best template a shape is not recognised
STRONGEST = 48  # pixels


@dataclass(frozen=True)
class Reading:
    """What the oracle recognised: indices into the world's attribute values, `[B, T]`; -1 where it recognised none.

    `position` `[B, T, 2]` in pixels (x, y), `radius` and `light` (radians, from x to y) `[B, T]` are NaN where there is no subject; `iou`
    `[B, T]` is the overlap with the best template; `displacement` `[B, T - 1, 2]` is in pixels per frame; `motion` is `[B, T - 1]`.
    """

    background: Tensor
    color: Tensor
    shape: Tensor
    iou: Tensor
    position: Tensor
    radius: Tensor
    light: Tensor
    displacement: Tensor
    motion: Tensor

    def verdict(self, video: int, frames: slice = slice(None)) -> Captioned | None:
        """The majority of each attribute over some pixel frames; None when one of them was not recognised."""
        values = {name: _majority(getattr(self, name)[video, frames]) for name in ("shape", "color", "background")}
        step = self.displacement[video, frames].nanmean(dim=0)
        values["motion"] = int(_nearest_motion(step)) if step.isfinite().all() else -1
        if any(value < 0 for value in values.values()):
            return None
        return Captioned(**{name: ATTRIBUTES[name][value] for name, value in values.items()})

    def correct(self, captions: list[Captioned], frames: slice = slice(None)) -> dict[str, Tensor]:
        """For each attribute whether the video shows it, `[B]` bool; unrecognised values count as wrong."""
        result = {}
        for name in ("shape", "color", "background"):
            said = [_majority(row[frames]) for row in getattr(self, name)]
            result[name] = torch.tensor([s >= 0 and ATTRIBUTES[name][s] == getattr(c, name) for s, c in zip(said, captions, strict=True)])
        steps = self.displacement[:, frames].nanmean(dim=1)
        motions = _nearest_motion(steps)
        result["motion"] = torch.tensor(
            [
                bool(step.isfinite().all()) and ATTRIBUTES["motion"][int(m)] == c.motion
                for step, m, c in zip(steps, motions, captions, strict=True)
            ]
        )
        return result

    def shares(self, captions: list[Captioned], frames: slice = slice(None)) -> dict[str, float]:
        """Share of videos that show each attribute, and all of them; `iou`, the mean overlap of their images with the best template.

        Shape, the hardest, and overlap also for every shape and background that the captions have: `shape/cross`, `iou/gray` …
        """
        correct = {name: value.float() for name, value in self.correct(captions, frames).items()}
        correct["all"] = torch.stack(list(correct.values())).amin(0)
        correct["iou"] = self.iou[:, frames].mean(dim=1)
        found = {name: value.mean().item() for name, value in correct.items()}
        for name in ("shape", "background"):
            for value in ATTRIBUTES[name]:
                those = torch.tensor([getattr(c, name) == value for c in captions])
                if those.any():
                    found |= {f"{what}/{value}": correct[what][those].mean().item() for what in ("shape", "iou")}
        return found

    def steady_motion(self, window: int) -> Tensor:
        """The motion around every image, `[B, T]`: nearest to the mean of the `window` displacements around it; -1 where none is known."""
        known = self.displacement.isfinite().all(-1, keepdim=True)
        both = torch.cat([torch.where(known, self.displacement, 0.0), known.float()], -1)  # [B, T - 1, 3]
        total = torch.nn.functional.pad(both, (0, 0, 1, 0)).cumsum(1)
        images = torch.arange(total.shape[1])
        begin = (images - window // 2).clamp(min=0)
        end = (images + window - window // 2).clamp(max=total.shape[1] - 1)
        around = total[:, end] - total[:, begin]
        count = around[..., 2]
        return torch.where(count > 0, _nearest_motion(around[..., :2] / count.clamp(min=1)[..., None]), -1)


def _majority(values: Tensor) -> int:
    """The most frequent value, which may be -1 ("cannot say")."""
    seen, counts = values.unique(return_counts=True)
    return int(seen[counts.argmax()])


def _nearest_motion(step: Tensor) -> Tensor:
    return (
        torch.cdist(step.reshape(-1, 2).float(), SPEED * torch.tensor(list(MOTIONS.values())).float()).argmin(-1).reshape(step.shape[:-1])
    )


def _wrap(distance: Tensor) -> Tensor:
    return (distance + SIZE / 2) % SIZE - SIZE / 2


def _read_frames(images: Tensor) -> tuple[Tensor, ...]:
    """`[N, 3, 64, 64]` in 0..255 -> background, colour, shape, iou, centre (x, y), radius, light of every image."""
    background = images.flatten(2).median(dim=-1).values  # [N, 3]
    ground = torch.cdist(background, torch.tensor(list(BACKGROUNDS.values())).float()).argmin(-1)
    difference = (images - background[..., None, None]).abs().sum(1).flatten(1)  # [N, Y X]
    strongest = difference.topk(STRONGEST).indices[:, None].expand(-1, 3, -1)
    seen = images.flatten(2).gather(-1, strongest).mean(-1)  # [N, 3]

    shades = torch.linspace(1 - SHADE, 1, 5)
    palette = torch.tensor(list(COLORS.values())).float()[:, None] * shades[:, None]  # [colours, shades, 3]
    color = torch.cdist(seen, palette.flatten(0, 1)).argmin(-1) // len(shades)
    to_subject = (images[:, None] - palette[color][..., None, None]).square().sum(2).amin(1)
    to_ground = (images - background[..., None, None]).square().sum(1)
    mask = (to_subject < to_ground).float()  # [N, Y, X]

    pixel = torch.arange(SIZE)
    angle = pixel * (2 * torch.pi / SIZE)
    centre = []
    for weight in (mask.sum(1), mask.sum(2)):  # along x, along y
        centre.append(torch.atan2((weight * angle.sin()).sum(-1), (weight * angle.cos()).sum(-1)) * SIZE / (2 * torch.pi) % SIZE)
    x, y = centre
    radius = (mask.sum((1, 2)) / torch.pi).sqrt()
    dx = _wrap(pixel - x[:, None])[:, None, :]
    dy = _wrap(pixel - y[:, None])[:, :, None]
    ious = []
    for shape in SHAPES:
        template = (soft_mask(shape, dx, dy, radius[:, None, None]) > 0.5).float()
        both = (template * mask).sum((1, 2))
        ious.append(both / (template + mask - template * mask).sum((1, 2)).clamp(min=1))
    iou, shape = torch.stack(ious, -1).max(-1)
    brightness, inner = images.sum(1), mask  # without the pixels at the edge, which show the background too
    for axis in (1, 2):
        inner = inner * mask.roll(1, axis) * mask.roll(-1, axis)
    beyond_mean = inner * (brightness - (inner * brightness).sum((1, 2), keepdim=True) / inner.sum((1, 2), keepdim=True).clamp(min=1))
    light = torch.atan2((beyond_mean * dy).sum((1, 2)), (beyond_mean * dx).sum((1, 2)))
    there = (radius > 4) & (radius < 24)
    named = there & (iou >= CONFIDENT_IOU)
    return (
        ground,
        torch.where(there, color, -1),
        torch.where(named, shape, -1),
        torch.where(there, iou, 0.0),
        torch.stack([torch.where(there, x, torch.nan), torch.where(there, y, torch.nan)], -1),
        torch.where(there, radius, torch.nan),
        torch.where(there, light, torch.nan),
    )


def read(images: Tensor, chunk: int = 256) -> Reading:
    """Read videos, uint8 `[B, T, 3, 64, 64]`.

    Raises:
        ValueError: when the images are not uint8 of the world's size.
    """
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[2:] != (3, SIZE, SIZE):
        raise ValueError(f"the oracle reads uint8 [B, T, 3, {SIZE}, {SIZE}], got {images.dtype} {list(images.shape)}")
    parts = [_read_frames(part.float()) for part in images.flatten(0, 1).split(chunk)]
    background, color, shape, iou, position, radius, light = (torch.cat(p).unflatten(0, images.shape[:2]) for p in zip(*parts, strict=True))
    displacement = _wrap(position[:, 1:] - position[:, :-1])
    motion = torch.where(displacement.isfinite().all(-1), _nearest_motion(displacement.nan_to_num()), -1)
    return Reading(background, color, shape, iou, position, radius, light, displacement, motion)
