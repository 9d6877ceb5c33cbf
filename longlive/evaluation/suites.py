"""What a benchmark wants to see: prompts, how many videos of each, how long, and under which names.

Knows nothing of models, nor of how videos are measured.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longlive.evaluation.vbench_score import DIMENSIONS
from longlive.files import digest_of
from longlive.generation.prompt_files import Script, read_scripts
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, Captioned, held_out

SAMPLES = 5  # videos a prompt (VBench)
STATIC_SAMPLES = 25  # of prompts for temporal flickering, since those that move are taken out
SEEDS_APART = 10_000  # of two prompts
INTERACTIVE_PROMPTS = Path(__file__).parent / "interactive_prompts.jsonl"
ADDRESS = re.compile(r"[/\\\0\n]")  # what no name of a file may hold


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt of a benchmark.

    Attributes:
        index: its place in the whole list, whatever part of that is taken: seeds follow from it.
        name: of its videos, before `-{i}.mp4`; VBench wants the original prompt.
        script: what is generated.
        samples: videos of it.
        dimensions: of VBench that it counts for.
        auxiliary: what VBench must know beyond the prompt, by dimension.
    """

    index: int
    name: str
    script: Script
    samples: int
    dimensions: tuple[str, ...] = ()
    auxiliary: Mapping[str, Any] = field(default_factory=dict)


class PromptList(NamedTuple):
    """Entries, where they come from, the digest by which a changed list is noticed, and whether a user wrote them: then they say how long
    a video is."""

    entries: tuple[Entry, ...]
    source: str
    digest: str
    own: bool = False


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark: how long its videos are, and who measures them.

    Attributes:
        num_latent_frames: latent frames a video; None: as the scripts say.
        measured_by: "vbench", "vbench_long", "interactive" or "oracle".
    """

    title: str
    num_latent_frames: int | None
    measured_by: str


SUITES = {
    "vbench": Suite(title="VBench, videos of 5 seconds", num_latent_frames=21, measured_by="vbench"),
    "long": Suite(title="VBench-Long, videos of 30 seconds", num_latent_frames=120, measured_by="vbench_long"),
    "interactive": Suite(title="interactive protocol, six prompts of 10 seconds", num_latent_frames=240, measured_by="interactive"),
    "switch": Suite(title="one switch of the prompt after five of ten seconds", num_latent_frames=None, measured_by="interactive"),
    "miniature": Suite(title="held-out prompts of the miniature world", num_latent_frames=42, measured_by="oracle"),
    "miniature_switches": Suite(
        title="prompts of the miniature world that follow each other", num_latent_frames=None, measured_by="oracle"
    ),
}


def find_suite(name: str) -> Suite:
    """Raises ValueError for a name that is none."""
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; choose from {', '.join(SUITES)}")
    return SUITES[name]


def read_full_info(path: Path) -> list[dict[str, Any]]:
    """The entries of `VBench_full_info.json`. Raises ValueError when it is not there or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no prompt list {path}; `bash scripts/setup_vbench.sh` installs it with vbench") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as VBench_full_info.json: {error}") from error
    if not isinstance(content, list) or not all(isinstance(one, dict) and {"prompt_en", "dimension"} <= one.keys() for one in content):
        raise ValueError(f"{path} is not VBench_full_info.json: a list of objects with prompt_en and dimension is wanted")
    return content


def vbench_prompts(path: Path, *, rewritten: Path | None = None, static_samples: int = STATIC_SAMPLES) -> PromptList:
    """VBench's own list, from the file that comes with the package.

    A prompt that stands in the list twice, for different dimensions, becomes one entry: its videos have the same names.

    Args:
        rewritten: longer prompts to generate from, a text file whose line i belongs to entry i of the list; names stay.
        static_samples: videos of each prompt for temporal flickering.
    """
    content = read_full_info(path)
    longer = read_rewritten(rewritten, len(content)) if rewritten is not None else None
    entries: dict[str, Entry] = {}
    for index, one in enumerate(content):
        name, dimensions = one["prompt_en"], tuple(one["dimension"])
        if unknown := set(dimensions) - set(DIMENSIONS):
            raise ValueError(f"{path}, entry {index}: {sorted(unknown)[0]} is no dimension of VBench")
        if name in entries:
            first = entries[name]
            dimensions = first.dimensions + tuple(dimension for dimension in dimensions if dimension not in first.dimensions)
            auxiliary, text, index = {**first.auxiliary, **one.get("auxiliary_info", {})}, first.script.prompts[0], first.index
        else:
            auxiliary, text = one.get("auxiliary_info", {}), name if longer is None else longer[index]
        entries[name] = Entry(
            index=index,
            name=name,
            script=Script(f"{path.name}, entry {index}", (text,)),
            samples=static_samples if "temporal_flickering" in dimensions else SAMPLES,
            dimensions=dimensions,
            auxiliary=auxiliary,
        )
    return _checked(PromptList(tuple(entries.values()), f"{path.name}, {len(content)} entries", digest_of(content)))


def read_rewritten(path: Path, count: int) -> list[str]:
    """The lines of a file of longer prompts. Raises ValueError when they are not `count`, or one is empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the rewritten prompts {path} cannot be read: {error}") from error
    if len(lines) != count:
        raise ValueError(f"{path} has {len(lines)} lines for {count} prompts; line i must belong to entry i of the list")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}, line {number} is empty")
    return [line.strip() for line in lines]


def interactive_prompts(path: Path | None = None, *, samples: int = 8, only: tuple[int, float] | None = None) -> PromptList:
    """Scripts of prompts that follow each other: the 20 that come with the package (160 videos), or those of a `.jsonl` file.

    `only`: the first so many prompts of each, and how many seconds each lasts.
    """
    own, path = path is not None, path or INTERACTIVE_PROMPTS
    scripts = read_scripts(path)
    entries = []
    for index, script in enumerate(scripts):
        if script.durations is None:
            raise ValueError(f'{script.where}: say how long each prompt lasts: {{"prompts": [{{"text": "…", "seconds": 10}}, …]}}')
        script = dataclasses.replace(script, where=script.where.replace(str(path), path.name))  # the same wherever the file lies
        if only is not None:
            if len(script.prompts) < only[0]:
                raise ValueError(f"{script.where}: {len(script.prompts)} prompt; {only[0]} that follow each other are wanted")
            script = dataclasses.replace(script, prompts=script.prompts[: only[0]], durations=(only[1],) * only[0])
        words = re.sub(r"[^a-z0-9]+", "-", script.prompts[0].lower()).strip("-")[:48].rstrip("-")
        entries.append(Entry(index=index, name=f"{index:03d}-{words}", script=script, samples=samples))
    content = [[entry.script.prompts, entry.script.durations] for entry in entries]
    return _checked(PromptList(tuple(entries), f"{path.name}, {len(scripts)} scripts", digest_of(content), own))


def miniature_prompts(count: int = 100) -> PromptList:
    """The plainest sentences for combinations that the miniature's training never shows."""
    sentences = [canonical(one) for one in held_out(count)]
    entries = [Entry(index=i, name=text, script=Script(f"held-out prompt {i}", (text,)), samples=1) for i, text in enumerate(sentences)]
    return PromptList(tuple(entries), f"{count} held-out prompts of the miniature world", digest_of(sentences))


def miniature_switches(count: int = 50, *, num_prompts: int = 4, seconds: float = 4.0) -> PromptList:
    """Chains of sentences, each with one attribute other than the one before; a chain begins with a held-out combination."""
    generator = torch.Generator().manual_seed(count)
    entries, content = [], []
    for index, one in enumerate(held_out(count)):
        chain = [one]
        while len(chain) < num_prompts:
            chain.append(_one_change(chain[-1], generator))
        texts = tuple(canonical(meaning) for meaning in chain)
        script = Script(f"chain {index}", texts, durations=(seconds,) * num_prompts)
        entries.append(Entry(index=index, name=f"{index:03d}-{texts[0].replace(' ', '-')}", script=script, samples=1))
        content.append([texts, seconds])
    return PromptList(tuple(entries), f"{count} chains of {num_prompts} prompts of the miniature world", digest_of(content))


def _one_change(before: Captioned, generator: torch.Generator) -> Captioned:
    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    attribute = list(ATTRIBUTES)[below(len(ATTRIBUTES))]
    others = [value for value in ATTRIBUTES[attribute] if value != vars(before)[attribute]]
    return before.with_one_change(attribute, others[below(len(others))])


def prompts_of(suite: str, *, full_info: Callable[[], Path], prompts: Path | None = None, rewritten: Path | None = None) -> PromptList:
    """The prompts of a suite.

    Args:
        full_info: where VBench's list is; asked only where it is wanted.
        prompts: scripts instead of our own, for `interactive` and `switch`.

    Raises:
        ValueError: when they cannot be read, or a file is given that this suite does not read.
    """
    measured_by = find_suite(suite).measured_by
    by_vbench = measured_by.startswith("vbench")
    if rewritten is not None and not by_vbench:
        raise ValueError(f"the suite {suite} has no rewritten prompts; they belong to vbench and long")
    if prompts is not None and measured_by != "interactive":
        raise ValueError(f"the suite {suite} has its own prompts; a file of scripts belongs to interactive and switch")
    if by_vbench:  # of long videos the clips are filtered, and there are enough of them
        return vbench_prompts(full_info(), rewritten=rewritten, static_samples=STATIC_SAMPLES if suite == "vbench" else SAMPLES)
    if measured_by == "interactive":
        return interactive_prompts(prompts, only=(2, 5.0) if suite == "switch" else None)
    return miniature_prompts() if suite == "miniature" else miniature_switches()


def part_of(
    found: PromptList, *, dimensions: Collection[str] | None = None, limit: int | None = None, samples: int | None = None
) -> PromptList:
    """A part of a list: entries of some dimensions, the first `limit` of each, `samples` videos of each prompt. Seeds do not change.

    Raises:
        ValueError: for unknown dimensions, or when nothing is left.
    """
    if (limit is not None and limit < 1) or (samples is not None and not 1 <= samples <= SEEDS_APART):
        raise ValueError(f"limit {limit}, samples {samples}: at least one of each, and at most {SEEDS_APART} samples")
    if dimensions is not None and (unknown := [name for name in dimensions if name not in DIMENSIONS]):
        raise ValueError(f"{unknown[0]} is no dimension of VBench; known are {', '.join(DIMENSIONS)}")
    taken: dict[int, Entry] = {}
    for dimension in [None] if dimensions is None else dimensions:
        of_it = [one for one in found.entries if dimension is None or dimension in one.dimensions]
        taken |= {one.index: one for one in of_it[:limit]}
    if not taken:
        raise ValueError(f"{found.source} has no prompts for {', '.join(dimensions or ())}")
    entries = [taken[index] for index in sorted(taken)]
    return found._replace(entries=tuple(one if samples is None else _with_samples(one, samples) for one in entries))


def _with_samples(entry: Entry, samples: int) -> Entry:
    return Entry(**{**vars(entry), "samples": samples})


def _checked(found: PromptList) -> PromptList:
    for entry in found.entries:
        if ADDRESS.search(entry.name) or len(entry.name.encode()) > 230:
            raise ValueError(f"{entry.script.where}: no file can have the name {entry.name!r}")
        if "_" in entry.name:  # VBench-Long takes what stands before it for the video
            raise ValueError(f"{entry.script.where}: the name {entry.name!r} has an underscore")
    return found


def names_of(entries: Sequence[Entry]) -> list[str]:
    """The videos of the entries: `{name}-{i}`, without ending."""
    return [f"{entry.name}-{sample}" for entry in entries for sample in range(entry.samples)]
