"""Write what follows each prompt of a file: the same subject and setting with one thing changed, by a causal language model of your own.

    python scripts/make_switch_prompts.py --model models/some-instruct-model --prompts prompts.txt --output switch_prompts.txt

The model is a folder that transformers' AutoModelForCausalLM reads; its chat template is used if it has one. Line i of the output goes on
with line i of the prompts (.txt or .jsonl). Until all lines are there they are in `<output>.partial`, and a run that was stopped goes on
where it was: the same batches with the same seeds, so that it writes what it would have written. `<output>.json` says how it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from longlive.models.text import clean
from longlive.parallel.world import choose_device, choose_dtype, world
from longlive.training.prompts import read_pairs, seed_of

REQUEST = """\
A video is playing, and its description is below. Write the description of how the same shot goes on.

- Name the subject and the setting again, with the details by which they are known: who reads only your text must picture the same video.
- Change exactly one thing: {change}. Leave everything else as it is.
- Write one paragraph, about as long as the description and in its language and tone, in the present tense, of what can be seen.
- Write nothing else: no title, no quotation marks, no list, no comment. Do not point back to what was before: no "now", "then", "instead".

Description: {prompt}

New description:"""
CHANGES = {  # how often each is asked for, relative to the others: mostly somebody does something else
    "what the subject does, an action that can follow from the one described": 5,
    "one person, animal or object that was not there comes into the picture": 3,
    "the subject's mood, as face and posture show it": 1,
    "one thing that the subject holds, wears or uses": 1,
    "the weather, or indoors the light that falls in": 1,
    "the time of day, and with it the light": 1,
    "the visual style, such as the medium, the film look or the palette": 1,
}
QUOTES = (("“", "”"), ("„", "“"), ("«", "»"), ("‘", "’"), ('"', '"'), ("'", "'"), ("**", "**"), ("*", "*"), ("`", "`"))
LABEL = r"(?:new |next )?(?:description|prompt)\W{0,2}:"
LEAD_IN = rf"^(?:(?:sure|certainly|of course|here is|here['’]s)\b[^:\n]{{0,100}}:|\W{{0,2}}{LABEL})\W{{0,2}}\s+"
SENTENCE_END = r"[.!?][\"”’)]?(?=\s|$)|[。！？।]"

Write = Callable[[Sequence[str], int], list[tuple[str, bool]]]  # requests and a seed -> answers, and whether each came to its end


class Writer:
    """A causal language model that answers requests, sampled; the same requests and seed give the same answers."""

    def __init__(
        self, folder: Path, *, device: torch.device, dtype: torch.dtype, max_new_tokens: int, temperature: float, top_p: float
    ) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"there is no model in {folder}; give a folder with config.json, weights and tokenizer files")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()
        self._sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends) if isinstance(ends, list) else {ends} - {None}

    @torch.no_grad()
    def __call__(self, requests: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        device = self._model.device
        ids = [torch.tensor(self._tokens(request)) for request in requests]
        pad = next(iter(self._ends), 0) if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        masks = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left")
        padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # transformers draws from the global generator
            torch.manual_seed(seed)
            made = self._model.generate(
                input_ids=padded.to(device), attention_mask=masks.to(device), do_sample=True, top_k=0, pad_token_id=pad, **self._sampling
            )
        return [self._answer(row) for row in made[:, padded.shape[1] :].tolist()]

    def _tokens(self, request: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            ids = self._tokenizer(request).input_ids
            return ids[:-1] if ids[-1] in self._ends else ids  # some tokenizers end every text, and nothing follows an end
        chat = [{"role": "user", "content": request}]  # no system message: not every template has one
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _answer(self, ids: list[int]) -> tuple[str, bool]:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        return self._tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None


def tidy(answer: str, *, ended: bool) -> str:
    """The description within an answer, on one line: its first paragraph, without thoughts, labels, lead-in and quotation marks.

    An answer that was cut off (`ended` false) loses its last, unfinished sentence. Empty when nothing is left.
    """
    answer = answer.rpartition("</think>")[2].replace("\r\n", "\n").strip()
    if answer.startswith("<think>"):
        return ""
    paragraphs = [part.strip() for part in re.split(rf"\n\s*\n|\n(?=\W*{LABEL})", answer, flags=re.I)]
    paragraphs = [part for part in (re.sub(LEAD_IN, "", f"{part} ", flags=re.I).strip() for part in paragraphs) if part]
    if not paragraphs:
        return ""
    text = " ".join(paragraphs[0].split())
    if not ended and len(paragraphs) == 1:
        ends = [match.end() for match in re.finditer(SENTENCE_END, text)]
        text = text[: ends[-1]] if ends else ""
    for opening, closing in QUOTES:
        within = text.removeprefix(opening).removesuffix(closing)
        if text.startswith(opening) and opening not in within and closing not in within:
            text = within.strip()
    return text


def continuations(prompts: Sequence[str], write: Write, *, first_line: int, seed: int, attempts: int) -> list[str]:
    """What follows each prompt. What is empty, or the prompt itself, is asked for again with another seed.

    Raises ValueError with the line (the first prompt's is `first_line`) when `attempts` bring nothing.
    """
    found: dict[int, str] = {}
    for attempt in range(attempts):
        missing = [i for i in range(len(prompts)) if i not in found]
        if not missing:
            break
        requests = [REQUEST.format(change=_change(seed, first_line + i, attempt), prompt=" ".join(prompts[i].split())) for i in missing]
        answers = write(requests, seed_of(seed, first_line, attempt))
        for i, (answer, ended) in zip(missing, answers):
            text = tidy(answer, ended=ended)
            if text and clean(text).casefold() != clean(prompts[i]).casefold():
                found[i] = text
    for i, prompt in enumerate(prompts):
        if i not in found:
            raise ValueError(
                f'line {first_line + i}: no continuation in {attempts} attempts for "{prompt[:80]}"; '
                "start again with more --attempts (what was written stays), or with more --max-new-tokens and another --output"
            )
    return [found[i] for i in range(len(prompts))]


def _change(seed: int, line: int, attempt: int) -> str:
    generator = torch.Generator().manual_seed(seed_of("change", seed, line, attempt))
    return list(CHANGES)[int(torch.multinomial(torch.tensor([float(weight) for weight in CHANGES.values()]), 1, generator=generator))]


def resume(partial: Path, record: Path, settings: dict[str, Any], *, batch: int) -> int:
    """How many lines are there already, in whole batches; what was written beyond them is cut off. Notes the settings of a new run.

    Raises ValueError when the lines were made with other settings.
    """
    if not partial.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.with_name(f"{record.name}.partial").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(record.with_name(f"{record.name}.partial"), record)
        return 0
    compare(partial, record, settings)
    with partial.open("rb+") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last line break is half a line
        done = len(lines) // batch * batch
        file.truncate(sum(len(line) + 1 for line in lines[:done]))
    return done


def compare(lines: Path, record: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError unless `lines` were made with these settings."""
    if not record.is_file():
        raise ValueError(f"{lines} is there, but not {record}, which says how it was made; remove it or choose another --output")
    before = json.loads(record.read_text(encoding="utf-8"))
    different = [name for name in settings if before.get(name) != settings[name]]
    if different:
        what = ", ".join(f"{name} {before.get(name)!r} (this run: {settings[name]!r})" for name in different)
        raise ValueError(f"{lines} was made with {what}; use the same, or choose another --output")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", type=Path, required=True, help=".txt, one a line, or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="a .txt file")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=5, help="for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="an answer has at most")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Write what is missing; returns a sentence for the terminal. Raises ValueError or OSError for what cannot be done."""
    if args.output.suffix != ".txt" or args.batch < 1 or args.attempts < 1:
        raise ValueError(f"--output {args.output} --batch {args.batch} --attempts {args.attempts}: a .txt file and at least 1 are wanted")
    prompts = [pair.prompt for pair in read_pairs(args.prompts)]
    names = ("seed", "batch", "max_new_tokens", "temperature", "top_p")
    settings = {"model": args.model.resolve().name, "prompts": _digest(prompts), "request": _digest([REQUEST, json.dumps(CHANGES)])}
    settings |= {name: vars(args)[name] for name in names}
    partial, record = (args.output.with_name(args.output.name + ending) for ending in (".partial", ".json"))
    if args.output.exists():
        compare(args.output, record, settings)
        return f"{args.output} is complete: {len(prompts)} lines"
    done = resume(partial, record, settings, batch=args.batch)
    device = choose_device(args.device, world())
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    write = Writer(args.model, device=device, dtype=choose_dtype(args.dtype, device), **sampling)
    with partial.open("ab") as file, tqdm(total=len(prompts), initial=done, unit=" prompts", mininterval=5) as progress:
        for start in range(done, len(prompts), args.batch):
            part = prompts[start : start + args.batch]
            lines = continuations(part, write, first_line=start + 1, seed=args.seed, attempts=args.attempts)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            progress.update(len(part))
    os.replace(partial, args.output)
    return f"wrote {args.output}: {len(prompts)} lines"


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


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
