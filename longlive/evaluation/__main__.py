"""Prepare, measure and compare the videos of a benchmark: `python -m longlive.evaluation COMMAND --help`.

prepare SUITE    generate its videos, or adopt those of another program
run FOLDER       measure them: VBench's dimensions by the real vbench, the interactive protocol, or the miniature's oracle
score FOLDER     write tables and charts beside published rows
compare A B      compare two models on the same prompts and seeds: paired differences with intervals
measure PATH …   compute metrics of pixels alone, which need no weights: flicker, drift, collapse, loops, motion
rewrite          write longer prompts with a language model of your own
"""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentParser, Namespace
from argparse import RawDescriptionHelpFormatter as AS_WRITTEN
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longlive.evaluation import commands, rewrite
from longlive.evaluation.suites import SUITES
from longlive.parallel.world import get_world
from longlive.programs.status import exit_status


def parser(prog: str | None = None) -> ArgumentParser:
    """The command line."""
    top = ArgumentParser(prog or "python -m longlive.evaluation", description=__doc__, formatter_class=AS_WRITTEN, allow_abbrev=False)
    kinds = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do: Callable[..., int], text: str) -> Callable[..., Action]:
        added = kinds.add_parser(name, help=text)
        added.set_defaults(command=do)
        return added.add_argument

    environment: Any = {"type": Path, "metavar": "FOLDER", "help": "of vbench (default: $LONGLIVE_VBENCH, else .venv-vbench)"}
    dimensions: Any = {"type": lambda names: [name.strip() for name in names.split(",")], "metavar": "NAME,NAME"}

    add = command("prepare", commands.prepare, "generate the videos of a suite")
    add("suite", choices=SUITES, metavar="SUITE", help="; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items()))
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--config", type=Path, metavar="YAML", help="of the model, as for inference.py (default: the miniature)")
    add("--dimensions", **dimensions, help="only prompts of these dimensions of VBench")
    add("--limit", type=int, metavar="N", help="only the first N prompts (of each dimension that is asked for)")
    add("--samples", type=int, metavar="N", help="videos per prompt (default: the benchmark's)")
    add("--rewritten", type=Path, metavar="TXT", help="longer prompts to generate from, line i for entry i of VBench's list")
    add("--prompts", type=Path, metavar="JSONL", help="your own scripts for the suites interactive and switch")
    add("--videos", type=Path, metavar="FOLDER", help="adopt the videos {prompt}-{i}.mp4 of another program")
    add("--name", help="of the model that generated them, with --videos")
    add("--environment", **environment)
    kinds.choices["prepare"].epilog = "Further arguments key=value: any setting of inference.py that the suite does not decide."

    add = command("run", commands.run, "measure prepared videos")
    add("folder", type=Path)
    add("--dimensions", **dimensions, help="of VBench (default: all that the suite has)")
    add("--device", default="auto", help="of vbench: auto (all GPUs, one dimension each), cpu, cuda, cuda:1 …")
    add("--clip-lengths", choices=("intended", "released"), default="intended", help="of VBench-Long; see docs/evaluation.md")
    add("--static-filter", action="store_true", help="for temporal flickering count still videos only (needs RAFT)")
    add("--slow-fast", type=Path, metavar="FOLDER", help="VBench-Long's tables, to compare clips with each other, too")
    add("--clip", default=commands.CLIP, metavar="FOLDER", help="CLIP for the suites interactive and switch (default %(default)s)")
    add("--again", action="store_true", help="measure again what is already measured")
    add("--environment", **environment)

    add = command("score", commands.score, "write tables and charts of the measurements")
    add("folder", type=Path, help="prepared and measured, or one with results of vbench (*_eval_results.json)")
    add("--name", help="for the table")
    add("--long", action="store_true", help="the results are of VBench-Long, for a folder without prepared.json")

    add = command("compare", commands.compare, "compare two folders with the same prompts and seeds")
    add("first", type=Path)
    add("second", type=Path)
    add("--names", nargs=2, metavar=("A", "B"))
    add("--resamples", type=int, default=10_000, help="of the bootstrap (default %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="for table, JSON and charts (default: SECOND/results/compared)")

    add = command("measure", commands.measure, "measure flicker, drift, collapse, loops and motion of videos, without weights")
    add("paths", nargs="+", type=Path, metavar="PATH", help="videos, or prepared folders")
    add("--block", type=int, help="latent frames per block of videos (default 3)")
    add("--output", type=Path, metavar="FOLDER", help="for a chart over time and a contact sheet of every video")

    add = command("rewrite", commands.rewrite_prompts, "write longer prompts with a causal language model of your own")
    add("--prompts", type=Path, metavar="TXT", help="short prompts, one per line (default: VBench's list)")
    add("--environment", **environment)
    rewrite.add_arguments(kinds.choices["rewrite"])
    return top


def parse(argv: Sequence[str] | None, *, prog: str | None = None) -> Namespace:
    """The options; for `prepare` with `settings`, all further arguments `key=value`, which stand after the suite."""
    top = parser(prog)
    options, rest = top.parse_known_args(argv)
    if options.command is commands.prepare:
        options.settings = [word for word in rest if re.match(r"[a-z_]+=", word)]
        rest = [word for word in rest if word not in options.settings]
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Exit status: 0 done; 1 not everything could be measured, or a failure; 2 a mistake of the user; 130 interrupted."""
    options = vars(parse(argv, prog=prog))
    command = options.pop("command")

    def run() -> int:
        if get_world().size > 1 and command is not commands.prepare:
            raise ValueError(f"{get_world().size} processes: only `prepare` is split across them")
        return command(**options)

    return exit_status(run, interrupted="interrupted; finished files are kept, and the same command continues")


if __name__ == "__main__":
    sys.exit(main())
