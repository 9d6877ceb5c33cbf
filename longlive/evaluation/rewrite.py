"""A causal language model of your own turns short prompts of a benchmark into long ones, like the captions that Wan was trained on.

An answer must contain the words of its prompt, or the model is asked again. Words are compared, not meanings: a description that
contradicts its prompt is not noticed.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from longlive.evaluation.writer import Write, add_writer_arguments, ask, record_of, write_lines
from longlive.files import read_json
from longlive.models.text import normalize_prompt

REQUEST = """\
A video is ordered with the short prompt below. Write the long description of exactly this video.

- Keep all that the prompt says, and say it in the prompt's own words: each person, animal and thing, how many they are, their colours, \
where they are and on which side of each other, what they do, the place, and every word about style, view or camera.
- Fill in what the prompt leaves open: what everything looks like, what surrounds it, the light, the camera, and how things move.
- Nothing that you fill in may contradict the prompt. Bring in no further main subject, and no writing that the prompt does not ask for.
- If the prompt asks for a still frame, nothing in the picture moves, and neither does the camera.
- Write one paragraph of 60 to 100 words, in English, in the present tense, of what can be seen.
- Write nothing else: no title, no quotation marks, no list, no comment.

Prompt: {prompt}

Description:"""
LONG = 60  # words; a prompt with so many need not become longer
CHECKED_LETTERS = 4  # words of so many letters must occur in the answer
CHECKED_SHORT = frozenset("one two six ten red tan".split())  # shorter numbers and colours that must, too  # noqa: SIM905
# Words that may be missing. None that says where something is: "under" and "behind" must occur.
FUNCTION_WORDS = frozenset(
    """
    also been being could does doing from have having itself should some such than that their them themselves then there these they
    this those very were what when where which while whom whose will with would
    """.split()  # noqa: SIM905
)
ENDINGS = ("s", "es", "ed", "ing", "e")  # "e" since riding lacks that of ride


def lost_words(prompt: str, text: str) -> list[str]:
    """The words of `prompt` that `text` lacks, in their order, each once.

    Words of four letters or more count, and shorter colours and numbers, but no function words. Two words are the same when they share a
    stem: the word itself, or what is left of it without one of `ENDINGS`, three letters at least.
    """
    present = {stem for word in _words(text) for stem in _stems(word)}
    checked = [word for word in _words(prompt) if len(word) >= CHECKED_LETTERS or word in CHECKED_SHORT]
    return [word for word in dict.fromkeys(checked) if word not in FUNCTION_WORDS and present.isdisjoint(_stems(word))]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", normalize_prompt(text).casefold())


def _stems(word: str) -> set[str]:
    return {word} | {stem for ending in ENDINGS if len(stem := word.removesuffix(ending)) >= 3}


def _is_too_short(prompt: str, text: str) -> bool:
    return len(text.split()) <= min(len(prompt.split()), LONG - 1)


def descriptions(prompts: Sequence[str], write: Write, *, first_line: int, seed: int, attempts: int, lenient: bool = False) -> list[str]:
    """A longer description for each prompt. After one that is not longer than its prompt, or lacks words of it, the model is asked again.

    Raises ValueError as `ask` does; with `lenient` the best answer is taken.
    """

    def request(i: int, _: int) -> str:
        return REQUEST.format(prompt=" ".join(prompts[i].split()))

    def faults(i: int, text: str) -> int:
        worse_than_all_words = len(_words(prompts[i])) + 1  # else the prompt itself would be better than an answer that lacks two words
        return len(lost_words(prompts[i], text)) + worse_than_all_words * _is_too_short(prompts[i], text)

    return ask(prompts, write, request, faults, first_line=first_line, seed=seed, attempts=attempts, lenient=lenient)


def run(arguments: argparse.Namespace, prompts: Sequence[str]) -> str:
    """Write `arguments.output`, whose line i is a longer description for prompt i; returns a sentence for the terminal.

    The record (see `write_lines`) also has the request and the shortcomings of the lines. `attempts` are among the settings that decide a
    line only with `lenient`; else they decide whether there is a line, not which.

    Raises:
        ValueError: for an empty prompt, when a prompt gets no acceptable description (see `ask`), and as `write_lines` does.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise ValueError(f"prompt {empty[0]} of {len(prompts)} is empty; every line of {arguments.output} belongs to a prompt")
    lines = partial(descriptions, seed=arguments.seed, attempts=arguments.attempts, lenient=arguments.lenient)
    settings = {"lenient": True, "attempts": arguments.attempts} if arguments.lenient else {"lenient": False}
    sentence = write_lines(arguments, prompts, lines, request=[REQUEST], review=partial(shortcomings, prompts), **settings)
    if arguments.lenient:
        sentence += f"; {read_json(record_of(arguments.output))['lines_lacking_words']} of them lack words of their prompts"
    return sentence


def shortcomings(prompts: Sequence[str], lines: Sequence[str]) -> dict[str, Any]:
    """The request, and the lines (numbered from 1) that lack words or are not longer than their prompts, for the record."""
    pairs = list(enumerate(zip(prompts, lines), 1))
    lacking = {str(number): lost for number, (prompt, line) in pairs if (lost := lost_words(prompt, line))}
    return {
        "request_text": REQUEST,
        "lines": len(lines),
        "lines_lacking_words": len(lacking),
        "lacking_words": lacking,
        "lines_not_longer": [number for number, (prompt, line) in pairs if _is_too_short(prompt, line)],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `run` reads; the caller decides where the prompts come from."""
    add_writer_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="take the best answer where none has all words of the prompt")
