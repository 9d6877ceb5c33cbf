"""The verdicts of all experiments on one page: `python -m experiments.summary [--output DIR]`; every experiment updates it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from experiments import ROOT
from longlive.files import write_text

INTRODUCTION = """# The paper's claims, measured in miniature

`bash scripts/experiments.sh` trains what is missing and measures; `python -m experiments.pixels` repeats the main
experiments with the miniature's own stages and saves pictures. The state world (`experiments/state_world.py`) has no
pixels: its videos show a subject with four attributes that captions describe and four that they do not, and its teacher
is exact, so that every error is the student's. Verdicts are computed: a claim "shows" when the whole 95 % interval of
the paired difference is on the expected side (for "equal": within the margin that counts as none), and is "reversed"
when it is on the other side.
"""


def page(reports: list[dict[str, Any]]) -> str:
    """A table of claims and the number of each verdict, per experiment."""
    lines = [INTRODUCTION]
    for report in reports:
        name, counts = report["experiment"], Counter(claim["verdict"] for claim in report["claims"])
        counted = ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
        lines += [f"## [{report['title']}]({name}.md)", "", report["question"], "", f"![{report['title']}]({name}.png)", ""]
        lines += [f"{counted}:", "", "| claim | difference, 95 % interval | verdict |", "| --- | --- | --- |"]
        for claim in report["claims"]:
            found = claim["difference"]
            lines.append(f"| {claim['claim']} | {found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] | {claim['verdict']} |")
        lines.append("")
    return "\n".join(lines)


def summarize(folder: Path) -> None:
    """Write `README.md` from the JSON files of `folder`; `account.md` in it, if any, is a discussion to put first."""
    files = sorted(folder.glob("*.json"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    account = folder / "account.md"
    text = page(reports)
    if account.exists():
        head, _, tables = text.partition("\n## ")
        text = f"{head}\n{account.read_text(encoding='utf-8').strip()}\n\n## {tables}"
    write_text(folder / "README.md", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "experiments")
    arguments = parser.parse_args(argv)
    if not list(arguments.output.glob("*.json")):
        sys.stderr.write(f"experiments.summary: {arguments.output} has no results; run scripts/experiments.sh first\n")
        return 2
    summarize(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
