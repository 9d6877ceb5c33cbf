"""Texts between texts: weighted mixes of prompts, and the way from one prompt to another.

A mix is written as a prompt, `a red circle::0.7 | a blue square::0.3`, so that it can stand wherever a prompt can: in Python, prompt files,
timelines, on the command line and on the page. Weights are divided by their sum. Pure functions of strings and embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch

from longlive.types import Text

Interpolation = Literal["linear", "slerp"]

_PART = re.compile(r"(.*\S)\s*::\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*", re.DOTALL)


def mix(weights: Mapping[str, float]) -> str:
    """The prompt that is a weighted mix of others. Raises ValueError when the weights do not have a sum above 0."""
    prompt = " | ".join(f"{part}::{weight:.6f}" for part, weight in weights.items())
    if len(weights) < 2 or parts_of(prompt) is None:
        raise ValueError(f"a mix has at least two prompts without '|': {dict(weights)}")
    return prompt


def parts_of(prompt: str) -> list[tuple[str, float]] | None:
    """The prompts of a mix with their weights, whose sum is 1; None for a plain prompt.

    Raises ValueError for a mix in which a part has no weight, or whose weights do not have a sum above 0.
    """
    found = [_PART.fullmatch(part) for part in prompt.split("|")]
    if len(found) < 2 or not any(found):
        return None
    parts = [(match[1].strip(), float(match[2])) for match in found if match is not None]
    if len(parts) < len(found):
        raise ValueError(f"the mix {prompt!r} has a part without a weight; write each as prompt::weight, with | between them")
    if not sum(weight for _, weight in parts) > 1e-6:
        raise ValueError(f"the weights of the mix {prompt!r} have no sum above 0")
    total = sum(weight for _, weight in parts)
    return [(part, weight / total) for part, weight in parts]


def interpolate(start: Text, goal: Text, fraction: float, how: Interpolation) -> Text:
    """The embedding at `fraction` of the way from `start` (0) to `goal` (1).

    "linear": (1 - fraction) start + fraction goal. "slerp": each token's direction moves on the great circle (Shoemake 1985) and its length
    linearly; where one of the tokens is zero, as after a prompt's end, linear.
    """
    a, b = start.float(), goal.float()
    straight = torch.lerp(a, b, fraction)
    if how == "linear":
        return straight.to(goal.dtype)
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = ((a * b).sum(-1, keepdim=True) / (length_a * length_b).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    sine = angle.sin()
    unit_a, unit_b = a / length_a.clamp_min(1e-12), b / length_b.clamp_min(1e-12)
    direction = (((1 - fraction) * angle).sin() * unit_a + (fraction * angle).sin() * unit_b) / sine.clamp_min(1e-12)
    turned = torch.lerp(length_a, length_b, fraction) * direction
    return torch.where((length_a == 0) | (length_b == 0) | (sine < 1e-4), straight, turned).to(goal.dtype)
