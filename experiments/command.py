"""The command line that all experiments share."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments import ROOT
from experiments.arms import Trained
from experiments.report import Report, write
from experiments.scale import FULL, QUICK
from experiments.summary import summarize

Experiment = Callable[[Trained], Report]


def main(experiments: dict[str, Experiment], argv: list[str] | None = None) -> int:
    """Run the experiments one after another, training networks that are missing; each writes its results when it is done."""
    parser = argparse.ArgumentParser(description="Measures claims of the paper in the state world; trains networks that are missing.")
    parser.add_argument("--quick", action="store_true", help="seconds instead of an hour: shows that it runs; the numbers mean nothing")
    parser.add_argument("--runs", type=Path, help="folder of trained networks (runs/experiments, or runs/experiments_quick)")
    parser.add_argument("--output", type=Path, help="folder of results (docs/experiments, or the folder of networks with --quick)")
    arguments = parser.parse_args(argv)
    runs = arguments.runs or ROOT / "runs" / ("experiments_quick" if arguments.quick else "experiments")
    output = arguments.output or (runs / "results" if arguments.quick else ROOT / "docs" / "experiments")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    trained = Trained(runs, QUICK if arguments.quick else FULL)
    try:
        for name, experiment in experiments.items():
            clock = time.perf_counter()
            report = experiment(trained)
            write(report, output)
            summarize(output)
            verdicts = "; ".join(f"{claim.statement}: {claim.verdict}" for claim in report.claims)
            logging.info("%s in %.0f s -> %s\n  %s", name, time.perf_counter() - clock, output / f"{name}.md", verdicts)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"experiments: {error}\n")
        return 2
    return 0
