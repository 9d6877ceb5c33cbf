"""Switch prompts of the miniature world: pairs of sentences whose meanings differ in one attribute.

    python -m longlive.miniature.prompt_pairs --num 10000 --seed 0 --output data/miniature_prompts

writes `prompts.txt` and `switch_prompts.txt`, line-aligned. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longlive.files import write_text
from longlive.miniature.captions import SwitchPair, canonical, caption
from longlive.miniature.world import ATTRIBUTES, Captioned, training_set


class PairFiles(NamedTuple):
    """Two text files; line i of `switch` continues line i of `prompts`."""

    prompts: Path
    switch: Path


def draw_pair(generator: torch.Generator, captions: Sequence[Captioned]) -> SwitchPair:
    """A caption, another of `captions` that differs in exactly one attribute, and the name of that attribute.

    The first is drawn uniformly, then an attribute that can change within `captions`, then its new value. Raises ValueError when no
    other caption differs in one attribute only.
    """
    return _draw(generator, captions, frozenset(captions))


def write_pairs(folder: str | Path, *, num: int, seed: int, phrasings: int = 16, captions: Sequence[Captioned] | None = None) -> PairFiles:
    """Write `num` pairs to `prompts.txt` and `switch_prompts.txt` in `folder`; the same arguments give the same bytes.

    Args:
        phrasings: sentences per caption, the first of them canonical; this bounds the number of texts to embed.
        captions: None: the combinations of the training set.
    """
    if num < 1 or phrasings < 1:
        raise ValueError(f"{num} pairs in {phrasings} phrasings: at least one of each")
    captions = training_set() if captions is None else captions
    generator = torch.Generator().manual_seed(seed)
    sentences = {c: [canonical(c), *(caption(c, generator) for _ in range(phrasings - 1))] for c in captions}
    lines: tuple[list[str], list[str]] = ([], [])
    allowed = frozenset(captions)
    for _ in range(num):
        pair = _draw(generator, captions, allowed)
        for side, meaning in zip(lines, (pair.before, pair.after)):
            side.append(sentences[meaning][_below(phrasings, generator)])
    files = PairFiles(Path(folder) / "prompts.txt", Path(folder) / "switch_prompts.txt")
    for path, side in zip(files, lines):
        write_text(path, "\n".join(side) + "\n")
    return files


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _draw(generator: torch.Generator, captions: Sequence[Captioned], allowed: Collection[Captioned]) -> SwitchPair:
    if not captions:
        raise ValueError("no captions to draw a pair from; give at least two that differ in one attribute")
    before = captions[_below(len(captions), generator)]
    after: dict[str, list[Captioned]] = {}
    for attribute, values in ATTRIBUTES.items():
        changed = [before.with_one_change(attribute, value) for value in values if value != vars(before)[attribute]]
        after[attribute] = [other for other in changed if other in allowed]
    attributes = [attribute for attribute, others in after.items() if others]
    if not attributes:
        raise ValueError(f'no caption of the {len(captions)} differs from "{canonical(before)}" in one attribute only; give more')
    attribute = attributes[_below(len(attributes), generator)]
    return SwitchPair(before, after[attribute][_below(len(after[attribute]), generator)], attribute)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, required=True, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--phrasings", type=int, default=16, help="sentences per caption; 1: only the canonical one")
    arguments = parser.parse_args(argv)
    try:
        write_pairs(arguments.output, num=arguments.num, seed=arguments.seed, phrasings=arguments.phrasings)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"prompt_pairs: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
