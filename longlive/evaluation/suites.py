"""The benchmarks: which prompts, how many videos per prompt, how long, and the names of the files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from longlive.evaluation.vbench_score import check_dimensions
from longlive.files import digest_of, file_digest, read_json
from longlive.generation.prompt_files import Script, read_prompt_text, read_scripts
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, Captioned, held_out
from longlive.programs.recording import first_words

SAMPLES = 5  # videos per prompt (VBench)
STATIC_SAMPLES = 25  # per prompt for temporal flickering, since VBench's filter removes those that move
SEED_STEP = 10_000  # between the seeds of two prompts
INTERACTIVE_PROMPTS = Path(__file__).parent / "interactive_prompts.jsonl"
NOT_IN_A_NAME = re.compile(r"[/\\\0\n]")
MAX_NAME_BYTES = 220  # leaves room for "-{i}.json" and the suffix of a file that is being written


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt of a benchmark.

    Attributes:
        index: its place in the whole list, whichever part of that is taken; the seeds follow from it.
        name: of its videos, before `-{i}.mp4`; VBench wants the original prompt.
        script: the prompts to generate from.
        samples: number of videos.
        dimensions: VBench's dimensions that it counts for.
        auxiliary: VBench's further facts about the prompt, by dimension.
    """

    index: int
    name: str
    script: Script
    samples: int
    dimensions: tuple[str, ...] = ()
    auxiliary: Mapping[str, Any] = field(default_factory=dict)


class PromptList(NamedTuple):
    """Entries, their source, and a digest that reveals a changed list. `own`: the user wrote them, and the scripts give the length of a
    video. `part`: the arguments of `part_of`. `rewritten`: the source of the longer prompts that are used instead of the list's."""

    entries: tuple[Entry, ...]
    source: str
    digest: str
    own: bool = False
    part: Mapping[str, Any] = MappingProxyType({})
    rewritten: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Facts to record beside the entries."""
        return {"source": self.source, "digest": self.digest, **self.part}


class Suite(NamedTuple):
    """A benchmark. `num_latent_frames` per video (None: the scripts decide); `measured_by`: "vbench", "vbench_long", "interactive" or
    "oracle"."""

    title: str
    num_latent_frames: int | None
    measured_by: str

    @property
    def has_vbench_list(self) -> bool:
        """Whether the prompts are VBench's own, each of which counts for some dimensions."""
        return self.measured_by.startswith("vbench")

    @property
    def cuts_clips(self) -> bool:
        """Whether VBench-Long measures, on clips cut from the videos."""
        return self.measured_by in ("vbench_long", "interactive")


SUITES = {
    "vbench": Suite("VBench, videos of 5 seconds", 21, "vbench"),
    "long": Suite("VBench-Long, videos of 30 seconds", 120, "vbench_long"),
    "interactive": Suite("interactive protocol, six prompts of 10 seconds", 240, "interactive"),
    "switch": Suite("one switch of the prompt after five of ten seconds", None, "interactive"),
    "miniature": Suite("held-out prompts of the miniature world", 42, "oracle"),
    "miniature_switches": Suite("consecutive prompts of the miniature world", None, "oracle"),
}


def find_suite(name: str) -> Suite:
    """Raises ValueError for an unknown name."""
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; choose from {', '.join(SUITES)}")
    return SUITES[name]


def read_full_info(path: Path) -> list[dict[str, Any]]:
    """The entries of `VBench_full_info.json`. Raises ValueError when it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no prompt list {path}; `bash scripts/setup_vbench.sh` installs it with vbench") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as VBench_full_info.json: {error}") from error
    if not isinstance(content, list) or not all(isinstance(item, dict) and {"prompt_en", "dimension"} <= item.keys() for item in content):
        raise ValueError(f"{path} is not VBench_full_info.json, which is a list of objects with prompt_en and dimension")
    return content


def vbench_prompts(path: Path, *, rewritten: Path | None = None, static_samples: int = STATIC_SAMPLES) -> PromptList:
    """VBench's own list, from the file that comes with the package.

    A prompt that occurs twice in the list, for different dimensions, becomes one entry: its videos have the same names.

    Args:
        rewritten: longer prompts to generate from, a text file whose line i belongs to entry i of the list; the names stay.
        static_samples: videos per prompt for temporal flickering.

    Raises:
        ValueError: when a file cannot be read, the two do not match, or a prompt cannot name a file.
    """
    content = read_full_info(path)
    longer = None if rewritten is None else read_rewritten(rewritten, len(content))
    entries: dict[str, Entry] = {}
    for index, item in enumerate(content):
        name, dimensions, auxiliary = item["prompt_en"], item["dimension"], item.get("auxiliary_info", {})
        check_dimensions(dimensions, where=f"{path}, entry {index}: ")
        script = Script(f"{path.name}, entry {index}", (name if longer is None else longer[index],))
        if name in entries:
            first = entries[name]
            index, script = first.index, first.script
            dimensions, auxiliary = [*first.dimensions, *dimensions], {**first.auxiliary, **auxiliary}
        samples = static_samples if "temporal_flickering" in dimensions else SAMPLES
        dimensions = tuple(dict.fromkeys(dimensions))
        entries[name] = Entry(index=index, name=name, script=script, samples=samples, dimensions=dimensions, auxiliary=auxiliary)
    prompts = _prompt_list(entries.values(), f"{path.name}, {len(content)} entries", content)
    if rewritten is None:
        return prompts
    record = rewritten.with_name(f"{rewritten.name}.json")  # our own `rewrite` writes it
    made = read_json(record) if record.is_file() else None
    return prompts._replace(rewritten={"file": rewritten.name, "sha256": file_digest(rewritten), "made": made})


def read_rewritten(path: Path, count: int) -> list[str]:
    """The lines of a file of longer prompts. Raises ValueError unless there are `count`, none empty."""
    lines = read_prompt_text(path).rstrip("\n").split("\n")
    if len(lines) != count:
        raise ValueError(f"{path} has {len(lines)} lines for {count} prompts; line i must belong to entry i of the list")
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise ValueError(f"{path}, line {empty[0]} is empty")
    return [line.strip() for line in lines]


def interactive_prompts(path: Path | None = None, *, samples: int = 8, only: tuple[int, float] | None = None) -> PromptList:
    """Scripts of consecutive prompts: the 20 that come with the package (160 videos), or those of a `.jsonl` file.

    `only`: number of prompts taken from each script, and their duration in seconds. Raises ValueError for scripts without durations, or
    with fewer prompts.
    """
    own, path = path is not None, path or INTERACTIVE_PROMPTS
    scripts = read_scripts(path)
    entries = []
    for index, script in enumerate(scripts):
        if script.durations is None:
            raise ValueError(f'{script.where}: give the duration of each prompt: {{"prompts": [{{"text": "…", "seconds": 10}}, …]}}')
        script = dataclasses.replace(script, where=script.where.replace(str(path), path.name))  # the same wherever the file lies
        if only is not None:
            if len(script.prompts) < only[0]:
                raise ValueError(f"{script.where}: {len(script.prompts)} prompt; this suite needs {only[0]} consecutive ones")
            script = dataclasses.replace(script, prompts=script.prompts[: only[0]], durations=(only[1],) * only[0])
        entries.append(Entry(index=index, name=f"{index:03d}-{first_words(script.prompts[0])}", script=script, samples=samples))
    content = [[entry.script.prompts, entry.script.durations] for entry in entries]
    return _prompt_list(entries, f"{path.name}, {len(scripts)} scripts", content, own=own)


def miniature_prompts(count: int = 100) -> PromptList:
    """The plainest sentences for combinations that the miniature never sees in training."""
    sentences = [canonical(caption) for caption in held_out(count)]
    entries = [Entry(index=i, name=text, script=Script(f"held-out prompt {i}", (text,)), samples=1) for i, text in enumerate(sentences)]
    return _prompt_list(entries, f"{count} held-out prompts of the miniature world", sentences)


def miniature_switches(count: int = 50, *, num_prompts: int = 4, seconds: float = 4.0) -> PromptList:
    """Chains of sentences, each of which changes one attribute of the one before; a chain starts with a held-out combination."""
    generator = torch.Generator().manual_seed(count)
    entries = []
    for index, first in enumerate(held_out(count)):
        chain = [first]
        while len(chain) < num_prompts:
            chain.append(_one_change(chain[-1], generator))
        texts = tuple(map(canonical, chain))
        script = Script(f"chain {index}", texts, durations=(seconds,) * num_prompts)
        entries.append(Entry(index=index, name=f"{index:03d}-{texts[0].replace(' ', '-')}", script=script, samples=1))
    content = [[entry.script.prompts, seconds] for entry in entries]
    return _prompt_list(entries, f"{count} chains of {num_prompts} prompts of the miniature world", content)


def _one_change(before: Captioned, generator: torch.Generator) -> Captioned:
    def draw(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    attribute = draw(list(ATTRIBUTES))
    return before.with_one_change(attribute, draw([value for value in ATTRIBUTES[attribute] if value != vars(before)[attribute]]))


def prompts_of(suite: str, *, full_info: Callable[[], Path], prompts: Path | None = None, rewritten: Path | None = None) -> PromptList:
    """The prompts of a suite.

    Args:
        full_info: returns the path of VBench's list; called only for the suites that use it.
        prompts: scripts to use instead of our own, for `interactive` and `switch`.
        rewritten: see `vbench_prompts`.

    Raises:
        ValueError: when they cannot be read, or a file is given that this suite does not use.
    """
    kind = find_suite(suite)
    if rewritten is not None and not kind.has_vbench_list:
        raise ValueError(f"the suite {suite} has no rewritten prompts; they belong to vbench and long")
    if prompts is not None and kind.measured_by != "interactive":
        raise ValueError(f"the suite {suite} has its own prompts; a file of scripts belongs to interactive and switch")
    if kind.has_vbench_list:  # VBench-Long filters the clips of a video, and there are enough of them
        return vbench_prompts(full_info(), rewritten=rewritten, static_samples=SAMPLES if kind.cuts_clips else STATIC_SAMPLES)
    if kind.measured_by == "interactive":
        return interactive_prompts(prompts, only=(2, 5.0) if suite == "switch" else None)
    return miniature_prompts() if suite == "miniature" else miniature_switches()


def part_of(
    prompts: PromptList, *, dimensions: Collection[str] | None = None, limit: int | None = None, samples: int | None = None
) -> PromptList:
    """A part of a list: entries of some dimensions, the first `limit` of each, `samples` videos per prompt. Seeds do not change.

    Raises:
        ValueError: for unknown dimensions, for numbers below 1, or when nothing is left.
    """
    if (limit is not None and limit < 1) or (samples is not None and not 1 <= samples <= SEED_STEP):
        raise ValueError(f"limit {limit}, samples {samples}: at least one of each, and at most {SEED_STEP} samples")
    check_dimensions(dimensions or ())
    taken: dict[int, Entry] = {}
    for dimension in [None] if dimensions is None else dimensions:
        matching = [entry for entry in prompts.entries if dimension is None or dimension in entry.dimensions]
        taken |= {entry.index: entry for entry in matching[:limit]}
    if not taken:
        raise ValueError(f"{prompts.source} has no prompts for {', '.join(dimensions or ())}")
    entries = tuple(dataclasses.replace(taken[index], samples=samples or taken[index].samples) for index in sorted(taken))
    return prompts._replace(entries=entries, part={"dimensions": dimensions, "limit": limit, "samples": samples})


def _prompt_list(entries: Collection[Entry], source: str, content: object, *, own: bool = False) -> PromptList:
    """Raises ValueError when an entry cannot name a file."""
    for entry in entries:
        if NOT_IN_A_NAME.search(entry.name) or len(entry.name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"{entry.script.where}: {entry.name!r} cannot be the name of a file")
        if "_" in entry.name:  # VBench-Long takes what comes before it for the video
            raise ValueError(f"{entry.script.where}: the name {entry.name!r} contains an underscore")
    return PromptList(tuple(entries), source, digest_of(content), own)


def names_of(entries: Sequence[Entry]) -> list[str]:
    """File names of the entries' videos without extension: `{name}-{i}`."""
    return [f"{entry.name}-{sample}" for entry in entries for sample in range(entry.samples)]
