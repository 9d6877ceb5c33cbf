"""Prepare, measure and compare the videos of a benchmark: `python -m longlive.evaluation COMMAND --help`.

prepare SUITE    make its videos (or adopt those of another program): prompts, seeds and names as the benchmark wants them
run FOLDER       measure them: VBench's dimensions by the real vbench, the interactive protocol, or the miniature's oracle
score FOLDER     tables and charts beside published rows
compare A B      two models on the same prompts and seeds: paired differences with intervals
measure PATH …   metrics of pixels alone, which need no weights: flicker, drift, collapse, loops, motion
rewrite          longer prompts by a language model of your own
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longlive.evaluation import commands, rewrite
from longlive.evaluation.suites import SUITES
from longlive.evaluation.vbench_score import DIMENSIONS
from longlive.parallel.world import get_world
from longlive.programs.status import exit_status

SETTING = re.compile(r"[a-z_]+=")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("python -m longlive.evaluation", description=__doc__, formatter_class=raw, allow_abbrev=False)
    kinds = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do: Callable[..., int], text: str) -> Callable[..., argparse.Action]:
        added = kinds.add_parser(name, help=text)
        added.set_defaults(command=do)
        return added.add_argument

    environment: Any = {"type": Path, "metavar": "FOLDER", "help": "of vbench (default: $LONGLIVE_VBENCH, else .venv-vbench)"}

    add = command("prepare", commands.prepare, "make the videos of a suite")
    add("suite", choices=SUITES, metavar="SUITE", help="; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items()))
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--config", type=Path, metavar="YAML", help="of the model, as for inference.py (default: the miniature)")
    add("--dimensions", nargs="+", metavar="NAME", choices=DIMENSIONS, help="only prompts of these dimensions of VBench")
    add("--limit", type=int, help="only the first so many prompts (of each dimension asked for)")
    add("--samples", type=int, help="videos per prompt (default: the benchmark's)")
    add("--rewritten", type=Path, metavar="TXT", help="longer prompts to generate from, line i for entry i of VBench's list")
    add("--prompts", type=Path, metavar="JSONL", help="your own scripts for the suites interactive and switch")
    add("--videos", type=Path, metavar="FOLDER", help="take these videos, {prompt}-{i}.mp4, of another program")
    add("--name", help="of the model that made them, with --videos")
    add("--environment", **environment)
    kinds.choices["prepare"].epilog = "Further words key=value: any setting of inference.py that the suite does not decide."

    add = command("run", commands.run, "measure prepared videos")
    add("folder", type=Path)
    add("--dimensions", nargs="+", metavar="NAME", choices=DIMENSIONS, help="of VBench (default: all that the suite has)")
    add("--device", default="auto", help="of vbench: auto (all GPUs, one dimension each), cpu, cuda, cuda:1 …")
    add("--clip-lengths", choices=("intended", "released"), default="intended", help="of VBench-Long; see docs/evaluation.md")
    add("--static-filter", action="store_true", help="for temporal flickering count still videos only (needs RAFT)")
    add("--slow-fast", type=Path, metavar="FOLDER", help="VBench-Long's tables: compare clips with each other, too")
    add("--clip", default=commands.CLIP, metavar="FOLDER", help="CLIP for the suites interactive and switch (default %(default)s)")
    add("--again", action="store_true", help="measure again what is measured already")
    add("--environment", **environment)

    add = command("score", commands.score, "tables and charts of what was measured")
    add("folder", type=Path, help="prepared and measured, or one with results of vbench (*_eval_results.json)")
    add("--name", help="for the table")
    add("--long", action="store_true", help="the results are of VBench-Long, for a folder that does not say so itself")

    add = command("compare", commands.compare, "two folders, same prompts and seeds")
    for name in ("first", "second"):
        add(name, type=Path)
    add("--names", nargs=2, metavar=("A", "B"))
    add("--resamples", type=int, default=10_000, help="of the bootstrap (default %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="for table, JSON and charts (default: SECOND/results/compared)")

    add = command("measure", commands.measure, "flicker, drift, collapse, loops and motion of videos, without weights")
    add("paths", nargs="+", type=Path, metavar="PATH", help="videos, or prepared folders")
    add("--block", type=int, help="latent frames per block (default 3; a prepared folder says it itself)")
    add("--output", type=Path, metavar="FOLDER", help="for a chart over time and a contact sheet of every video")

    add = command("rewrite", commands.rewrite_prompts, "longer prompts by a causal language model of your own")
    add("--prompts", type=Path, metavar="TXT", help="short prompts, one per line (default: VBench's list)")
    add("--environment", **environment)
    rewrite.add_arguments(kinds.choices["rewrite"])
    return top


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without the settings of `prepare`, and these: words `key=value` that are not the value of an option.

    argparse would take them for values of an option before them that takes several.
    """
    rest, settings = [], []
    for before, word in zip(("", *words), words):
        takes_one = before.startswith("--") and "=" not in before and before != "--dimensions"
        is_setting = words[0] == "prepare" and SETTING.match(word) and not takes_one
        (settings if is_setting else rest).append(word)
    return rest, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 not everything could be measured, or a failure; 2 a mistake of the user; 130 interrupted."""
    words, settings = split(list(sys.argv[1:] if argv is None else argv))
    options = vars(parser().parse_args(words))
    do = options.pop("command")
    if do is commands.prepare:
        options["settings"] = settings

    def command() -> int:
        if get_world().size > 1 and do is not commands.prepare:
            raise ValueError(f"{get_world().size} processes: only `prepare` is shared among them")
        return do(**options)

    return exit_status(command, interrupted="interrupted; what was made so far stays, and the same command continues")


if __name__ == "__main__":
    sys.exit(main())
