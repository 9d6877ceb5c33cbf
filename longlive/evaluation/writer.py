"""A causal language model answers requests, one line of a text file per request; a run that was stopped can be continued."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from longlive.files import digest_of, file_digest, owned, write_json
from longlive.parallel.world import choose_device, choose_dtype, get_world, seed_of
from longlive.provenance import version

QUOTES = (("“", "”"), ("„", "“"), ("«", "»"), ("‘", "’"), ('"', '"'), ("'", "'"), ("**", "**"), ("*", "*"), ("`", "`"))
LABEL = r"(?:new |next )?(?:description|prompt)\W{0,2}:"
LEAD_IN = rf"^(?:(?:sure|certainly|of course|here is|here['’]s)\b[^:\n]{{0,100}}:|\W{{0,2}}{LABEL})\W{{0,2}}\s+"
SENTENCE_END = r"[.!?][\"”’)]?(?=\s|$)|[。！？।]"

Write = Callable[[Sequence[str], int], list[tuple[str, bool]]]  # requests and a seed -> answers, and whether each was finished


class Lines(Protocol):
    """Some of the prompts, and the line number of the first one, to their lines."""

    def __call__(self, prompts: Sequence[str], write: Write, *, first_line: int) -> list[str]: ...


class Writer:
    """A causal language model that samples answers; the same requests and seed give the same answers.

    `folder`: one that transformers' AutoModelForCausalLM reads; its chat template is used if there is one. `sampling`: max_new_tokens,
    temperature and top_p. Raises ValueError without a model.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, **sampling: float) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"there is no model in {folder}; give a folder with config.json, weights and tokenizer files")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._model = model.to(device).eval()
        self._sampling = sampling
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends) if isinstance(ends, list) else {ends} - {None}

    @torch.no_grad()
    def __call__(self, requests: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        device = self._model.device
        ids = [torch.tensor(self._tokens(request)) for request in requests]
        pad = next(iter(self._ends), 0) if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        masks = pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True, padding_side="left")
        padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # transformers draws from the global generator
            torch.manual_seed(seed)
            generated = self._model.generate(
                input_ids=padded.to(device), attention_mask=masks.to(device), do_sample=True, top_k=0, pad_token_id=pad, **self._sampling
            )
        return [self._answer(row) for row in generated[:, padded.shape[1] :].tolist()]

    def _tokens(self, request: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            ids = self._tokenizer(request).input_ids
            return ids[:-1] if ids[-1] in self._ends else ids  # some tokenizers put an end after every text
        chat = [{"role": "user", "content": request}]  # no system message: not every template has one
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _answer(self, ids: list[int]) -> tuple[str, bool]:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        return self._tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None


def tidy(answer: str, *, ended: bool) -> str:
    """The description in an answer, on one line: its first paragraph, without thoughts, labels, introduction and quotation marks.

    The last, unfinished sentence of an answer that was cut off (`ended` false) is dropped. Empty when nothing is left.
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


def ask(
    prompts: Sequence[str],
    write: Write,
    request: Callable[[int, int], str],
    faults: Callable[[int, str], int],
    *,
    first_line: int,
    seed: int,
    attempts: int,
    lenient: bool = False,
) -> list[str]:
    """The best answer for each prompt: the first without faults or, with `lenient`, else the first with the fewest.

    `request(i, attempt)` is the request for prompt i, `faults(i, text)` the number of faults of an answer. Without a faultless answer the
    model is asked again, with another seed, in up to `attempts` attempts. Seeds depend on `first_line`, the line of prompt 0.

    Raises:
        ValueError: with the line and the best answer, when all are empty, or none is without faults and not `lenient`.
    """
    best: dict[int, tuple[int, str]] = {}  # faults and text
    for attempt in range(attempts):
        wanted = [i for i in range(len(prompts)) if i not in best or best[i][0]]
        if not wanted:
            break
        answers = write([request(i, attempt) for i in wanted], seed_of(seed, first_line, attempt))
        for i, (answer, ended) in zip(wanted, answers):
            text = tidy(answer, ended=ended)
            if text and (i not in best or faults(i, text) < best[i][0]):
                best[i] = faults(i, text), text
    for i, prompt in enumerate(prompts):
        if i not in best or (best[i][0] and not lenient):
            answer = f'the best was "{best[i][1][:200]}"' if i in best else "all were empty"
            raise ValueError(
                f'line {first_line + i}: no acceptable answer in {attempts} attempts for "{prompt[:80]}" ({answer}); start again with '
                "more --attempts (finished lines stay), or with other settings (--max-new-tokens for example) and another --output"
            )
    return [best[i][1] for i in range(len(prompts))]


def write_lines(
    arguments: argparse.Namespace,
    prompts: Sequence[str],
    lines: Lines,
    *,
    request: object,
    review: Callable[[Sequence[str]], dict[str, Any]] = lambda lines: {},
    **settings: Any,
) -> str:
    """Write a line for each prompt to `arguments.output`, `arguments.batch` at a time; returns a sentence for the terminal.

    Until all lines are written they are in `<output>.partial`. `<output>.json` records the model's name and the SHA-256 of its weights,
    digests of prompts and request, sampling, device, versions, `settings`, and in the end `review(lines)`. A run that was stopped
    continues with the batch it was in and writes, on the same machine, what it would have written. The model is loaded only when lines
    are missing.

    Raises:
        ValueError: for other arguments than `add_writer_arguments` describes, when lines exist that were written with other settings, and
            when another process is writing them.
        OSError: when the model cannot be loaded.
    """
    output, batch = arguments.output, arguments.batch
    if output.suffix != ".txt" or batch < 1 or arguments.attempts < 1:
        raise ValueError(f"--output {output} --batch {batch} --attempts {arguments.attempts}: want a .txt file and at least 1")
    device = choose_device(arguments.device, get_world())
    dtype = choose_dtype(arguments.dtype, device)
    sampling = {name: vars(arguments)[name] for name in ("max_new_tokens", "temperature", "top_p")}
    settings = {
        "model": arguments.model.resolve().name,
        "weights": _digests(arguments.model),
        "prompts": digest_of(prompts),
        "request": digest_of(request),
        "seed": arguments.seed,
        "batch": batch,
        **sampling,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: version(name) for name in ("torch", "transformers")},
        **settings,
    }
    with owned(output):
        if output.exists():
            _check_same(output, output, settings)
            if (count := len(_whole_lines(output))) != len(prompts):
                raise ValueError(f"{output} has {count} lines for {len(prompts)} prompts; it was changed, remove it")
            return f"{output} is complete: {count} lines"
        partial = output.with_name(f"{output.name}.partial")
        done = _resume(partial, output, settings, batch=batch)
        write = Writer(arguments.model, device=device, dtype=dtype, **sampling)
        with partial.open("ab") as file, tqdm(total=len(prompts), initial=done, unit=" prompts", mininterval=5) as progress:
            for start in range(done, len(prompts), batch):
                part = prompts[start : start + batch]
                file.write("".join(f"{line}\n" for line in lines(part, write, first_line=start + 1)).encode())
                file.flush()
                progress.update(len(part))
        write_json(record_of(output), settings | review(_whole_lines(partial)))
        os.replace(partial, output)
        return f"wrote {output}: {len(prompts)} lines"


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; what follows the last line break is half a line."""
    return path.read_bytes().decode(errors="ignore").split("\n")[:-1]


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in a model's folder, by name."""
    files = sorted(path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    if not files:
        raise ValueError(
            f"there are no weights (*.safetensors, *.bin) in {folder}; give a folder with config.json, weights and tokenizer files"
        )
    return {path.name: file_digest(path) for path in files}


def record_of(output: Path) -> Path:
    """The file that records how `output` was written."""
    return output.with_name(f"{output.name}.json")


def _resume(partial: Path, output: Path, settings: Mapping[str, Any], *, batch: int) -> int:
    """The number of finished lines, in whole batches; what follows them is cut off. Records the settings of a new run."""
    if not partial.exists():
        write_json(record_of(output), settings)
        return 0
    _check_same(partial, output, settings)
    lines = _whole_lines(partial)
    done = len(lines) // batch * batch
    os.truncate(partial, sum(len(line.encode()) + 1 for line in lines[:done]))
    return done


def _check_same(lines: Path, output: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError unless `lines` were written with these settings."""
    record = record_of(output)
    if not record.is_file():
        raise ValueError(f"{lines} exists, but not its record {record}; remove it or choose another --output")
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{record} is not JSON ({error}); remove it and {lines}, or choose another --output") from error
    different = [name for name in settings if before.get(name) != settings[name]]
    if different:
        what = ", ".join(f"{name} {before.get(name)!r} (this run: {settings[name]!r})" for name in different)
        raise ValueError(f"{lines} was written with {what}; use the same, or choose another --output")


def add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command in which a language model writes lines."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--output", type=Path, required=True, help="a .txt file; finished lines are kept")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=5, help="per prompt (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="per answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
