"""Switch prompts of the miniature world: sentences that follow each other, the meanings of each and the next differing in one attribute.

    python -m longlive.miniature.prompt_pairs --num 10000 --seed 0 --output data/miniature_prompts

writes pairs to `prompts.txt` and `switch_prompts.txt`, line-aligned; with `--switches 3` chains of four to `prompts.jsonl`. Knows nothing
about training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longlive.files import write_text
from longlive.miniature.captions import SwitchPair, canonical, caption
from longlive.miniature.world import ATTRIBUTES, NUM_HELD_OUT, Captioned, training_set


class PairFiles(NamedTuple):
    """Two text files; line i of `switch` continues line i of `prompts`."""

    prompts: Path
    switch: Path


def draw_pair(
    generator: torch.Generator,
    captions: Sequence[Captioned],
    *,
    weights: Mapping[str, float] | None = None,
    before: Captioned | None = None,
) -> SwitchPair:
    """A caption, another of `captions` that differs in exactly one attribute, and the name of that attribute.

    The first is `before` or drawn uniformly, then an attribute that can change within `captions`, then its new value.

    Args:
        weights: how often each attribute is drawn, 1 for those that are not named; None: all as often.

    Raises:
        ValueError: when no other caption differs in one attribute only.
    """
    return _draw(generator, captions, frozenset(captions), weights, before)


def write_pairs(
    folder: str | Path,
    *,
    num: int,
    seed: int,
    phrasings: int = 16,
    captions: Sequence[Captioned] | None = None,
    weights: Mapping[str, float] | None = None,
) -> PairFiles:
    """Write `num` pairs to `prompts.txt` and `switch_prompts.txt` in `folder`; the same arguments give the same bytes.

    Args:
        phrasings: sentences per caption, the first of them canonical; this bounds the number of texts to embed.
        captions: None: the combinations of the training set.
        weights: as in `draw_pair`.
    """
    sides = zip(*_chains(num, 1, seed=seed, phrasings=phrasings, captions=captions, weights=weights), strict=True)
    files = PairFiles(Path(folder) / "prompts.txt", Path(folder) / "switch_prompts.txt")
    for path, side in zip(files, sides):
        write_text(path, "\n".join(side) + "\n")
    return files


def write_chains(
    folder: str | Path,
    *,
    num: int,
    switches: int,
    seed: int,
    phrasings: int = 16,
    captions: Sequence[Captioned] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Path:
    """Write `num` chains of `switches` + 1 prompts to `prompts.jsonl` in `folder`; otherwise as `write_pairs`."""
    chains = _chains(num, switches, seed=seed, phrasings=phrasings, captions=captions, weights=weights)
    path = Path(folder) / "prompts.jsonl"
    write_text(path, "".join(json.dumps({"prompts": chain}) + "\n" for chain in chains))
    return path


def _chains(
    num: int,
    switches: int,
    *,
    seed: int,
    phrasings: int,
    captions: Sequence[Captioned] | None,
    weights: Mapping[str, float] | None,
) -> list[list[str]]:
    if num < 1 or phrasings < 1 or switches < 1:
        raise ValueError(f"{num} chains of {switches} switches in {phrasings} phrasings: at least one of each")
    if weights is not None and (wrong := [name for name in weights if name not in ATTRIBUTES]):
        raise ValueError(f"{wrong[0]!r} is no attribute of this world; choose from {', '.join(ATTRIBUTES)}")
    if weights is not None and min(weights.values(), default=1.0) <= 0:
        raise ValueError(f"weights {dict(weights)}: choose numbers above 0")
    captions = training_set() if captions is None else captions
    generator = torch.Generator().manual_seed(seed)
    sentences = {c: [canonical(c), *(caption(c, generator) for _ in range(phrasings - 1))] for c in captions}
    allowed, chains = frozenset(captions), []
    for _ in range(num):
        meanings: list[Captioned] = []
        for _ in range(switches):
            pair = _draw(generator, captions, allowed, weights, meanings[-1] if meanings else None)
            meanings += [pair.after] if meanings else [pair.before, pair.after]
        chains.append([sentences[meaning][_below(phrasings, generator)] for meaning in meanings])
    return chains


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _draw(
    generator: torch.Generator,
    captions: Sequence[Captioned],
    allowed: Collection[Captioned],
    weights: Mapping[str, float] | None,
    before: Captioned | None,
) -> SwitchPair:
    if not captions:
        raise ValueError("no captions to draw a pair from; give at least two that differ in one attribute")
    if before is None:
        before = captions[_below(len(captions), generator)]
    after: dict[str, list[Captioned]] = {}
    for attribute, values in ATTRIBUTES.items():
        changed = [before.with_one_change(attribute, value) for value in values if value != vars(before)[attribute]]
        after[attribute] = [other for other in changed if other in allowed]
    attributes = [attribute for attribute, others in after.items() if others]
    if not attributes:
        raise ValueError(f'no caption of the {len(captions)} differs from "{canonical(before)}" in one attribute only; give more')
    if weights is None:
        attribute = attributes[_below(len(attributes), generator)]
    else:
        often = torch.tensor([weights.get(name, 1.0) for name in attributes])
        attribute = attributes[int(torch.multinomial(often, 1, generator=generator))]
    return SwitchPair(before, after[attribute][_below(len(after[attribute]), generator)], attribute)


def _weight(text: str) -> tuple[str, float]:
    """For argparse: "background=3"."""
    name, _, number = text.partition("=")
    return name, float(number)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, required=True, help="pairs, or chains")
    parser.add_argument("--switches", type=int, default=1, help="per video; with more than one (the default) chains are written")
    parser.add_argument("--weights", type=_weight, nargs="+", metavar="ATTRIBUTE=NUMBER", help="how often attributes change (default 1)")
    parser.add_argument(
        "--held-out", type=int, default=NUM_HELD_OUT, help="combinations to leave out: 100 for testing, 150: and validation"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--phrasings", type=int, default=16, help="sentences per caption; 1: only the canonical one")
    arguments = parser.parse_args(argv)
    settings = {"num": arguments.num, "seed": arguments.seed, "phrasings": arguments.phrasings}
    settings |= {"captions": training_set(arguments.held_out), "weights": dict(arguments.weights) if arguments.weights else None}
    try:
        if arguments.held_out < NUM_HELD_OUT:
            raise ValueError(f"--held-out {arguments.held_out}: prompts of the test would be trained on; choose {NUM_HELD_OUT} or more")
        if arguments.switches == 1:
            write_pairs(arguments.output, **settings)
        else:
            write_chains(arguments.output, switches=arguments.switches, **settings)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"prompt_pairs: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
