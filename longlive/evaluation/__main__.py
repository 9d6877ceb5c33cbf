"""Videos of a benchmark are prepared, measured and compared: `python -m longlive.evaluation COMMAND --help`.

prepare SUITE    make its videos (or adopt those of another program): prompts, seeds and names as the benchmark wants them
run FOLDER       measure them: VBench's dimensions by the real vbench, the interactive protocol, or the miniature's oracle
score FOLDER     tables and plots beside published rows
compare A B      two models on the same prompts and seeds: paired differences with intervals
measure PATH …   what needs no weights: flicker, drift, collapse, loops, motion
rewrite          longer prompts by a language model of your own
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.evaluation import commands
from longlive.evaluation.suites import SUITES
from longlive.evaluation.vbench_score import DIMENSIONS
from longlive.parallel.world import configure_logging, get_world
from longlive.programs.loading import quiet_libraries

log = logging.getLogger(__name__)

SETTING = re.compile(r"[a-z_]+=")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m longlive.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = top.add_subparsers(required=True, metavar="COMMAND")
    environment = {"type": Path, "metavar": "FOLDER", "help": "of vbench (default: $LONGLIVE_VBENCH, else .venv-vbench)"}

    one = kinds.add_parser("prepare", help="make the videos of a suite")
    one.add_argument("suite", choices=SUITES, metavar="SUITE", help="; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items()))
    one.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    one.add_argument("--config", type=Path, metavar="YAML", help="of the model, as inference.py reads them (default: the miniature)")
    _add_part(one)
    one.add_argument("--rewritten", type=Path, metavar="TXT", help="longer prompts to generate from, line i for entry i of VBench's list")
    one.add_argument("--prompts", type=Path, metavar="JSONL", help="scripts of your own for the suite interactive")
    one.add_argument("--videos", type=Path, metavar="FOLDER", help="take these videos, {prompt}-{i}.mp4, of another program")
    one.add_argument("--name", help="of the model that made them, with --videos")
    one.add_argument("--environment", **environment)
    one.epilog = "Further words key=value: any setting of inference.py that the suite does not decide."
    one.set_defaults(run=commands.prepare, settings=[])

    two = kinds.add_parser("run", help="measure prepared videos")
    two.add_argument("folder", type=Path)
    two.add_argument("--dimensions", nargs="+", metavar="NAME", choices=DIMENSIONS, help="of VBench (default: all that the suite has)")
    two.add_argument("--device", default="auto", help="of vbench: auto (all GPUs, a dimension each), cpu, cuda, cuda:1 …")
    two.add_argument("--clip-lengths", choices=("intended", "released"), default="intended", help="of VBench-Long; see docs/evaluation.md")
    two.add_argument("--static-filter", action="store_true", help="for temporal flickering count still videos only (wants RAFT)")
    two.add_argument("--slow-fast", type=Path, metavar="FOLDER", help="VBench-Long's tables: compare clips with each other too")
    two.add_argument("--clip", default=commands.CLIP, metavar="FOLDER", help="CLIP for the suite interactive (default %(default)s)")
    two.add_argument("--again", action="store_true", help="also what is measured already")
    two.add_argument("--environment", **environment)
    two.set_defaults(run=commands.run)

    three = kinds.add_parser("score", help="tables and plots of what was measured")
    three.add_argument("folder", type=Path, help="prepared and measured, or one with results of vbench (*_eval_results.json)")
    three.add_argument("--name", help="for the table")
    three.add_argument("--long", action="store_true", help="of a folder that does not say so: results of VBench-Long")
    three.set_defaults(run=commands.score)

    four = kinds.add_parser("compare", help="two folders, same prompts and seeds")
    four.add_argument("first", type=Path)
    four.add_argument("second", type=Path)
    four.add_argument("--names", nargs=2, metavar=("A", "B"))
    four.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default %(default)s)")
    four.add_argument("--output", type=Path, metavar="FOLDER", help="table, JSON and plot go there (default: SECOND/results/compared)")
    four.set_defaults(run=commands.compare)

    five = kinds.add_parser("measure", help="flicker, drift, collapse, loops and motion of videos, without weights")
    five.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="videos, or prepared folders")
    five.add_argument("--block", type=int, help="latent frames a block (default 3; a prepared folder says it itself)")
    five.add_argument("--output", type=Path, metavar="FOLDER", help="a plot over time and a contact sheet of every video go there")
    five.set_defaults(run=commands.measure)

    six = kinds.add_parser("rewrite", help="longer prompts by a causal language model of your own")
    six.add_argument("--environment", **environment)
    commands.add_rewrite(six)
    six.set_defaults(run=commands.rewrite_prompts)
    return top


def _add_part(one: argparse.ArgumentParser) -> None:
    one.add_argument("--dimensions", nargs="+", metavar="NAME", choices=DIMENSIONS, help="only prompts of these dimensions of VBench")
    one.add_argument("--limit", type=int, help="only the first so many prompts (of each dimension asked for)")
    one.add_argument("--samples", type=int, help="videos a prompt (default: the benchmark's)")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without the settings of `prepare`, and these: `key=value` wherever it stands, but after an option that takes one
    value. argparse itself would count it to an option before it that takes several.
    """
    rest, settings = [], []
    for before, word in zip(("", *words), words):
        takes_one = before.startswith("--") and "=" not in before and before != "--dimensions"
        is_setting = words[0] == "prepare" and SETTING.match(word) and not takes_one
        (settings if is_setting else rest).append(word)
    return rest, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 not all could be measured, or it broke; 2 a mistake of the user; 130 interrupted."""
    words, settings = split(list(sys.argv[1:] if argv is None else argv))
    arguments = parser().parse_args(words)
    arguments.settings = settings
    configure_logging(get_world())
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if get_world().size > 1 and arguments.run is not commands.prepare:
            raise ValueError(f"{get_world().size} processes: only `prepare` is shared among them")
        with logging_redirect_tqdm():
            return arguments.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        log.error("error: %s", error)
        return 2
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.warning("interrupted; what was made so far stays, the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
