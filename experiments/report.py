"""The results of an experiment as JSON, as a page with tables and as a plot; and the verdict on each claim, computed from the numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.metrics import Estimate
from longlive.evaluation.charts import Panel, over_time
from longlive.files import write_json, write_text
from longlive.provenance import commit, hardware, processor, version, versions

Expected = Literal["less", "more", "equal"]
Verdict = Literal["shows", "does not show", "reversed"]


@dataclass(frozen=True)
class Claim:
    """An expectation about a paired difference, first arm minus second.

    Attributes:
        margin: differences up to this count as none; for "equal" the whole interval must lie within it.
    """

    statement: str
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
    """A value of each metric for each arm: estimates or numbers. A page shows an arm as a column."""

    title: str
    metrics: Sequence[str]
    arms: Mapping[str, Sequence[Estimate | float]]


@dataclass(frozen=True)
class Report:
    """The results of one experiment; `name` is that of its files."""

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
    """Hardware, versions and commit of the numbers."""
    return {**hardware(), "versions": versions(), "commit": commit()}


def write(report: Report, folder: Path) -> None:
    """Write `name.json`, `name.md` and `name.png` to `folder`."""
    write_json(folder / f"{report.name}.json", _data(report))
    write_text(folder / f"{report.name}.md", _page(report))
    over_time(report.panels, folder / f"{report.name}.png", title=report.title)


def _plain(cell: Estimate | float) -> Any:
    return cell._asdict() if isinstance(cell, Estimate) else cell


def _data(report: Report) -> dict[str, Any]:
    tables = [
        {"title": t.title, "arms": {arm: dict(zip(t.metrics, map(_plain, row))) for arm, row in t.arms.items()}} for t in report.tables
    ]
    claims = [
        {"claim": c.statement, "expected": c.expected, "difference": _plain(c.difference), "margin": c.margin, "verdict": c.verdict}
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
    lines = [f"# {report.title}", "", report.question, "", f"![{report.title}]({report.name}.png)", "", "## Verdict", ""]
    lines += [_row(["claim", "expected", "difference, 95 % interval", "counts as none", "verdict"]), _row(["---"] * 5)]
    lines += [
        _row([c.statement, c.expected, c.difference, f"±{c.margin:g}" if c.margin else "–", f"**{c.verdict}**"]) for c in report.claims
    ]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", _row(["", *table.arms]), _row(["---"] * (1 + len(table.arms)))]
        lines += [_row([metric, *values]) for metric, *values in zip(table.metrics, *table.arms.values())]
    training = sum(report.training_seconds.values())
    setting = [f"{name}: {value}" for name, value in report.setting.items()]
    setting.append(f"wall time: {report.seconds:.0f} s for the evaluation, {training:.0f} s for training all arms made so far")
    setting.append(f"machine: {processor()}, torch {version('torch')}")
    wrapped = partial(textwrap.fill, width=120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "## Setting", "", *map(wrapped, setting)]
    lines += ["", f"All numbers, curves included: [{report.name}.json]({report.name}.json).", ""]
    return "\n".join(lines)
