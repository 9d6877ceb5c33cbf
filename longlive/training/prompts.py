"""The prompts of a training run: read from files, and drawn in an order that a resumed run continues.

Knows nothing about models, embeddings, or the frame at which a prompt switches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longlive.generation.prompt_files import read_prompt_text
from longlive.parallel.world import seed_of

Chain = tuple[str, ...]
"""The prompts that a video shows one after the other."""


def read_chains(prompts: str | Path, switch: str | Path | None = None) -> list[Chain]:
    """The chains of a file of prompts, of two line-aligned .txt files, or of a .jsonl file with one chain per line:

    `{"prompt": "…", "switch": "…"}` or `{"prompts": ["…", "…", …]}`.

    Raises ValueError with file and line for a blank or invalid line, with both counts when two files differ in length, and when not all
    chains have as many prompts (all videos of a batch, on all ranks, switch as often).
    """
    prompts = Path(prompts)
    lines = _lines(prompts)
    chains = [(line,) if prompts.suffix == ".txt" else _chain(f"{prompts}, line {number}", line) for number, line in lines]
    if switch is not None:
        switch = Path(switch)
        if switch.suffix != ".txt":
            raise ValueError(f"{switch}: switch prompts of a file of prompts must be a .txt file; a .jsonl file contains both")
        if any(len(chain) > 1 for chain in chains):
            raise ValueError(f"{prompts} already has switch prompts; leave out {switch}")
        following = _lines(switch)
        if len(following) != len(chains):
            raise ValueError(
                f"{prompts} has {len(chains)} lines and {switch} has {len(following)}; line i of one continues line i of the other"
            )
        chains = [(*chain, line) for chain, (_, line) in zip(chains, following)]
    for (number, _), chain in zip(lines, chains):
        if len(chain) != len(chains[0]):
            raise ValueError(f"{prompts}, line {number} has {len(chain)} prompts and line 1 has {len(chains[0])}; give every line as many")
    return chains


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, from 1, stripped on the right. A blank line is an error: it would shift line-aligned files."""
    lines = [line.rstrip() for line in read_prompt_text(path).removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{path}, line {lines.index('') + 1} is blank; remove it, and the same line of a file aligned with this one")
    return list(enumerate(lines, 1))


def _chain(where: str, line: str) -> Chain:
    try:
        content: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    texts: Any = None
    if isinstance(content, dict) and content.keys() == {"prompts"}:
        texts = content["prompts"]
    elif isinstance(content, dict) and "prompt" in content and content.keys() <= {"prompt", "switch"}:
        texts = [content["prompt"]] if content.get("switch") is None else [content["prompt"], content["switch"]]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f'{where}: {{"prompt": "…", "switch": "…"}} or {{"prompts": ["…", "…", …]}} expected, got {line[:80]}')
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: prompt {number} of {len(texts)} is empty or not text: {json.dumps(text)[:60]}")
    return tuple(text.rstrip() for text in texts)


class PromptSampler:
    """Batches of chains, epoch after epoch; the order of each epoch depends on `seed` and its number.

    A step takes the next `size * batch` chains of the order, of which rank r gets every `size`-th, starting at the r-th: within an epoch
    every chain is drawn at most once over all ranks, and all ranks together draw the same chains whatever their number. A remainder of
    less than `size * batch` chains is skipped. The state counts chains, so a run may resume with another number of ranks.

    Raises ValueError when the chains do not fill one batch on every rank.
    """

    def __init__(self, chains: Sequence[Chain], *, batch: int, seed: int, rank: int = 0, size: int = 1) -> None:
        if batch < 1 or not 0 <= rank < size:
            raise ValueError(f"batch {batch} on rank {rank} of {size}: at least one chain, and a rank in 0 … {size - 1}")
        if len(chains) < size * batch:
            raise ValueError(
                f"{len(chains)} prompts do not fill a batch of {batch} on each of {size} ranks; "
                f"give at least {size * batch}, or choose a smaller batch"
            )
        self._chains, self._seed, self._rank, self._size = chains, seed, rank, size
        self._whole = size * batch
        digest = hashlib.sha256()
        for chain in chains:
            digest.update(json.dumps(chain).encode())
        self._digest = digest.hexdigest()[:16]
        self._begin(epoch=0, taken=0)

    def next(self) -> list[Chain]:
        """This rank's next batch."""
        if self._taken + self._whole > len(self._chains):
            self._begin(epoch=self._epoch + 1, taken=0)
        own = self._order[self._taken + self._rank : self._taken + self._whole : self._size]
        self._taken += self._whole
        return [self._chains[i] for i in own]

    def state(self) -> dict[str, int | str]:
        """The position in the data; the same on every rank."""
        return {"epoch": self._epoch, "taken": self._taken, "seed": self._seed, "chains": self._digest}

    def load(self, state: dict[str, int | str]) -> None:
        """Continue at the position of `state`. Raises ValueError when it belongs to another seed or other prompts."""
        if "chains" not in state:
            raise ValueError("the run was begun by an earlier version, which drew its prompts in another order; start a new run")
        if state["seed"] != self._seed:
            raise ValueError(f"the run drew its prompts with seed {state['seed']} and cannot resume with {self._seed}; set it back")
        if state["chains"] != self._digest:
            raise ValueError("the prompts are not those the run started with; restore the files, or start a new run")
        self._begin(epoch=int(state["epoch"]), taken=int(state["taken"]))

    def _begin(self, *, epoch: int, taken: int) -> None:
        self._epoch, self._taken = epoch, taken
        generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
        self._order = torch.randperm(len(self._chains), generator=generator).tolist()
