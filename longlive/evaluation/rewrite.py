"""Short prompts of a benchmark become long ones, as the captions are that Wan was trained on, by a causal language model of your own.

An answer must hold what the prompt says in its own words, or it is asked for again. Words are compared, not meanings: whether a
description contradicts its prompt, nobody checks. Knows nothing of which benchmark it is, nor of what becomes of the descriptions.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive.files import digest_of, file_digest
from longlive.models.text import normalize_prompt
from longlive.models.writer import Lines, Write, Writer, add_writer_arguments, ask, check_choices, note, record_of, write_lines
from longlive.parallel.world import choose_device, choose_dtype, get_world
from longlive.provenance import version

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
LONG = 60  # words; a prompt that has them itself need not become longer
CHECKED_LETTERS = 4  # words of so many letters must come again
CHECKED_SHORT = frozenset("one two six ten red tan".split())  # numbers and colours with fewer  # noqa: SIM905
# Without a meaning of their own. None that says where something is: "under" and "behind" must come again.
FUNCTION_WORDS = frozenset(
    """
    also been being could does doing from have having itself should some such than that their them themselves then there these they
    this those very were what when where which while whom whose will with would
    """.split()  # noqa: SIM905
)
ENDINGS = ("s", "es", "ed", "ing", "e")  # "e" since riding has lost that of ride


def lost_words(prompt: str, text: str) -> list[str]:
    """The words of `prompt` that `text` lacks, in their order, each once.

    Words of four letters or more count, and shorter colours and numbers, but no function words. Two words are the same when they have a
    stem in common, which is the word itself or what is left of it, three letters at least, without one of `ENDINGS`.
    """
    there = {stem for word in _words(text) for stem in _stems(word)}
    checked = [word for word in _words(prompt) if len(word) >= CHECKED_LETTERS or word in CHECKED_SHORT]
    return [word for word in dict.fromkeys(checked) if word not in FUNCTION_WORDS and there.isdisjoint(_stems(word))]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", normalize_prompt(text).casefold())


def _stems(word: str) -> set[str]:
    return {word} | {stem for ending in ENDINGS if len(stem := word.removesuffix(ending)) >= 3}


def _is_too_short(prompt: str, text: str) -> bool:
    return len(text.split()) <= min(len(prompt.split()), LONG - 1)


def descriptions(prompts: Sequence[str], write: Write, *, first_line: int, seed: int, attempts: int, lenient: bool = False) -> list[str]:
    """A longer description for each prompt. What is no longer than its prompt, or lacks words of it, is asked for again with another seed.

    Raises ValueError with the line (the first prompt's is `first_line`) when `attempts` bring none; `lenient`: when all were empty, else
    the best one is taken.
    """

    def request(i: int, _: int) -> str:
        return REQUEST.format(prompt=" ".join(prompts[i].split()))

    def faults(i: int, text: str) -> int:
        worse_than_all_words = len(_words(prompts[i])) + 1  # else the prompt itself would be better than what lacks two words
        return len(lost_words(prompts[i], text)) + worse_than_all_words * _is_too_short(prompts[i], text)

    answers = ask(write, request, faults, num=len(prompts), first_line=first_line, seed=seed, attempts=attempts)
    for i, prompt in enumerate(prompts):
        if i not in answers or (answers[i].faults and not lenient):
            lost = lost_words(prompt, answers[i].text) if i in answers else []
            best = f"the best lacks {', '.join(lost)}" if lost else "the best is no longer than it" if i in answers else "all were empty"
            raise ValueError(
                f'line {first_line + i}: no description in {attempts} attempts for "{prompt[:80]}" ({best}); start again with more '
                "--attempts (what was written stays), or with --lenient or more --max-new-tokens and another --output"
            )
    return [answers[i].text for i in range(len(prompts))]


def rewrite(
    prompts: Sequence[str],
    output: Path,
    *,
    model: Path,
    batch: int,
    seed: int,
    attempts: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    device: str = "auto",
    dtype: str = "auto",
    lenient: bool = False,
) -> str:
    """Write `output`, whose line i is a longer description for prompt i, and `<output>.json`, which says how; returns a sentence about it.

    `model` is a folder that transformers' AutoModelForCausalLM reads. A run that was stopped goes on where it was and writes, on the same
    machine, what it would have written. The record has the model's name and SHA-256 of its weights, the digest of the prompts, the
    request, all settings that decide a line (`attempts` are among them only if `lenient`), and which lines lack what.

    Raises ValueError for an empty prompt, when a line finds no description (see `descriptions`), and when there are lines that were made
    with other settings; OSError when the model cannot be loaded.
    """
    check_choices(output, batch=batch, attempts=attempts)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; every line of {output} belongs to a prompt")
    where = choose_device(device, get_world())
    number_type = choose_dtype(dtype, where)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings = {"model": model.resolve().name, "weights": _hashes(model), "prompts": digest_of(prompts), "request": digest_of([REQUEST])}
    settings |= {"seed": seed, "batch": batch, **sampling, "device": where.type, "dtype": str(number_type).removeprefix("torch.")}
    settings |= {name: version(name) for name in ("torch", "transformers")} | {"lenient": lenient}
    settings |= {"attempts": attempts} if lenient else {}  # else they decide only whether there is a line, not which

    def begin() -> Lines:
        write = Writer(model, device=where, dtype=number_type, **sampling)
        return lambda part, first_line: descriptions(part, write, first_line=first_line, seed=seed, attempts=attempts, lenient=lenient)

    sentence = write_lines(prompts, output, settings, begin, batch=batch)
    found = _shortcomings(prompts, output)
    note(record_of(output), settings | {"request_text": REQUEST} | found)
    return f"{sentence}; {found['lines_lacking_words']} of them lack words of their prompts" if lenient else sentence


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in a model's folder, by name."""
    files = sorted(path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    if not files:
        raise ValueError(
            f"there are no weights (*.safetensors, *.bin) in {folder}; give a folder with config.json, weights and tokenizer files"
        )
    return {path.name: file_digest(path) for path in files}


def _shortcomings(prompts: Sequence[str], output: Path) -> dict[str, Any]:
    """What the record says of the lines themselves: those (numbered from 1) that lack words, and those that are not longer."""
    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    if len(lines) != len(prompts):
        raise ValueError(f"{output} has {len(lines)} lines for {len(prompts)} prompts; it was changed, remove it")
    pairs = list(enumerate(zip(prompts, lines), 1))
    lacking = {str(number): lost for number, (prompt, line) in pairs if (lost := lost_words(prompt, line))}
    too_short = [number for number, (prompt, line) in pairs if _is_too_short(prompt, line)]
    return {"lines": len(lines), "lines_lacking_words": len(lacking), "lacking_words": lacking, "lines_not_longer": too_short}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `run` reads; where the prompts come from is up to the caller."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--output", type=Path, required=True, help="a .txt file; what is there of it is kept")
    add_writer_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="take the best of all attempts where none has all words of the prompt")


def run(arguments: argparse.Namespace, prompts: Sequence[str]) -> str:
    """`rewrite` as the command line wants it; returns a sentence for the terminal."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    names = ("model", "batch", "seed", "attempts", "max_new_tokens", "temperature", "top_p", "device", "dtype", "lenient")
    return rewrite(prompts, arguments.output, **{name: vars(arguments)[name] for name in names})
