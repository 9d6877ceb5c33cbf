"""What an experiment found, as JSON, as a page with tables and as a picture; and its verdict on each claim, computed from the numbers."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.metrics import Estimate
from longlive.evaluation.charts import Panel, over_time

Expected = Literal["less", "more", "equal"]
Verdict = Literal["shows", "does not show", "reversed"]


@dataclass(frozen=True)
class Claim:
    """What is expected of a paired difference, first arm minus second.

    Attributes:
        margin: differences up to this count as none; what is "equal" must have its whole interval within.
    """

    says: str
    expected: Expected
    difference: Estimate
    margin: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """ "shows" when the whole interval is on the expected side, "reversed" when it is on the other, otherwise "does not show"."""
        low, high = self.difference.low, self.difference.high
        if self.expected == "equal":
            return "shows" if -self.margin <= low and high <= self.margin else "does not show"
        if self.expected == "less":
            low, high = -high, -low
        return "shows" if low > self.margin else "reversed" if high < -self.margin else "does not show"


@dataclass(frozen=True)
class Table:
    """Of each arm a value for each metric: estimates or numbers. A page shows an arm as a column."""

    title: str
    metrics: Sequence[str]
    arms: Mapping[str, Sequence[Estimate | float]]


@dataclass(frozen=True)
class Report:
    """All that one experiment leaves behind; `name` is that of its files."""

    name: str
    title: str
    question: str
    setting: Mapping[str, Any]
    tables: Sequence[Table]
    claims: Sequence[Claim]
    panels: Sequence[Panel]
    seconds: float
    training_seconds: Mapping[str, float] = field(default_factory=dict)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(report: Report, folder: Path) -> None:
    """`name.json`, `name.md` and `name.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{report.name}.json").write_text(json.dumps(_data(report), indent=1) + "\n", encoding="utf-8")
    (folder / f"{report.name}.md").write_text(_page(report), encoding="utf-8")
    over_time(report.panels, folder / f"{report.name}.png", title=report.title)


def _plain(cell: Estimate | float) -> Any:
    return cell._asdict() if isinstance(cell, Estimate) else cell


def _data(report: Report) -> dict[str, Any]:
    tables = [
        {"title": t.title, "arms": {arm: dict(zip(t.metrics, map(_plain, row))) for arm, row in t.arms.items()}} for t in report.tables
    ]
    claims = [
        {"claim": c.says, "expected": c.expected, "difference": _plain(c.difference), "margin": c.margin, "verdict": c.verdict}
        for c in report.claims
    ]
    curves = {
        p.title: {
            line.label: {"x": list(line.x), "mean": list(line.y), "low": list(line.low), "high": list(line.high)}
            for line in p.lines
            if line.low is not None and line.high is not None
        }
        for p in report.panels
    }
    return {
        "experiment": report.name,
        "title": report.title,
        "question": report.question,
        "setting": dict(report.setting),
        "machine": machine(),
        "seconds": round(report.seconds, 1),
        "training_seconds": {name: round(s, 1) for name, s in report.training_seconds.items()},
        "claims": claims,
        "tables": tables,
        "curves": curves,
    }


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _page(report: Report) -> str:
    world = machine()
    lines = [f"# {report.title}", "", report.question, "", f"![{report.title}]({report.name}.png)", "", "## Verdict", ""]
    lines += [_row(["claim", "expected", "difference, 95 % interval", "counts as none", "verdict"]), _row(["---"] * 5)]
    lines += [_row([c.says, c.expected, c.difference, f"±{c.margin:g}" if c.margin else "–", f"**{c.verdict}**"]) for c in report.claims]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", _row(["", *table.arms]), _row(["---"] * (1 + len(table.arms)))]
        lines += [_row([metric, *values]) for metric, *values in zip(table.metrics, *table.arms.values())]
    training = sum(report.training_seconds.values())
    setting = [f"{name}: {value}" for name, value in report.setting.items()]
    setting.append(f"wall time: {report.seconds:.0f} s for the evaluation, {training:.0f} s for training all arms made so far")
    setting.append(f"machine: {world['processor']}, {world['threads']} of {world['cores']} cores used, torch {world['torch']}")
    wrapped = partial(textwrap.fill, width=120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "## Setting", "", *map(wrapped, setting)]
    lines += ["", f"All numbers, curves included: [{report.name}.json]({report.name}.json).", ""]
    return "\n".join(lines)
