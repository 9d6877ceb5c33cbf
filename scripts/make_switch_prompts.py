"""Have a causal language model of your own continue each prompt of a file: the same subject and setting with one thing changed.

    python scripts/make_switch_prompts.py --model models/some-instruct-model --prompts prompts.txt --output switch_prompts.txt

The model is a folder that transformers' AutoModelForCausalLM reads; its chat template is used if it has one. Line i of the output continues
line i of the prompts (.txt or .jsonl). Until all lines are there they are in `<output>.partial`. The same command continues a run that was
stopped: the same batches with the same seeds, so that it writes what it would have written. `<output>.json` says how it was made.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from longlive.evaluation.writer import Write, add_writer_arguments, ask, write_lines
from longlive.models.text import normalize_prompt
from longlive.parallel.world import seed_of
from longlive.training.prompts import read_chains

REQUEST = """\
A video is playing, and its description is below. Write the description of how the same shot goes on.

- Name the subject and the setting again, with the details by which they are known: who reads only your text must picture the same video.
- Change exactly one thing: {change}. Leave everything else as it is.
- Write one paragraph, about as long as the description and in its language and tone, in the present tense, of what can be seen.
- Write nothing else: no title, no quotation marks, no list, no comment. Do not point back to what was before: no "now", "then", "instead".

Description: {prompt}

New description:"""
CHANGES = {  # how often each is asked for, relative to the others; mostly the action changes
    "what the subject does, an action that can follow from the one described": 5,
    "one person, animal or object that was not there comes into the picture": 3,
    "the subject's mood, as face and posture show it": 1,
    "one thing that the subject holds, wears or uses": 1,
    "the weather, or indoors the light that falls in": 1,
    "the time of day, and with it the light": 1,
    "the visual style, such as the medium, the film look or the palette": 1,
}


def continuations(prompts: Sequence[str], write: Write, *, first_line: int, seed: int, attempts: int) -> list[str]:
    """A continuation of each prompt. One that is empty, or the prompt itself, is asked for again with another seed.

    Raises ValueError with the line (the first prompt's is `first_line`) when none was found in `attempts` attempts.
    """

    def request(i: int, attempt: int) -> str:
        return REQUEST.format(change=_change(seed, first_line + i, attempt), prompt=" ".join(prompts[i].split()))

    def is_the_same(i: int, text: str) -> bool:
        return normalize_prompt(text).casefold() == normalize_prompt(prompts[i]).casefold()

    return ask(prompts, write, request, is_the_same, first_line=first_line, seed=seed, attempts=attempts)


def _change(seed: int, line: int, attempt: int) -> str:
    generator = torch.Generator().manual_seed(seed_of("change", seed, line, attempt))
    return list(CHANGES)[int(torch.multinomial(torch.tensor([float(weight) for weight in CHANGES.values()]), 1, generator=generator))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help=".txt, one per line, or .jsonl")
    add_writer_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Write what is missing; returns a sentence for the terminal. Raises ValueError or OSError for what cannot be done."""
    prompts = [chain[0] for chain in read_chains(args.prompts)]
    return write_lines(
        args, prompts, partial(continuations, seed=args.seed, attempts=args.attempts), request=[REQUEST, json.dumps(CHANGES)]
    )


def main(argv: list[str] | None = None) -> int:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    args = parse(argv)
    try:
        print(run(args), flush=True)
    except (ValueError, OSError) as error:
        print(f"make_switch_prompts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
