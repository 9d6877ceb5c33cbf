"""The results of each stage of `scripts/miniature_recipe.sh`: `python -m experiments.recipe [--runs DIR] [--output DIR]`.

Losses and the oracle's validation over the steps, and videos of held-out prompts by the pipeline of each stage that makes videos.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from experiments import ROOT
from longlive.evaluation.charts import Line, Panel, over_time
from longlive.files import write_json, write_text
from longlive.miniature.world import ATTRIBUTES

STAGES = ("language", "autoencoder", "teacher", "causal_init", "init", "long")
LOSSES = {  # plotted metrics by stage
    "language": ("language/loss",),
    "autoencoder": ("autoencoder/loss",),
    "teacher": ("teacher/short_loss", "teacher/clip_loss"),
    "causal_init": ("causal_init/first_block_loss", "causal_init/clip_loss"),
    "init": ("generator/loss", "critic/loss"),
    "long": ("generator/loss", "critic/loss"),
}
COUNTED = ("language/shape_unseen_phrasing", *(f"oracle/{name}" for name in ATTRIBUTES))
PIPELINES = ("causal_init", "init", "long")


@dataclass(frozen=True)
class Journal:
    """A stage's metrics: `rows` with "step" in each, and wall seconds of all steps."""

    rows: list[dict[str, float]]

    @property
    def steps(self) -> int:
        return int(max(row["step"] for row in self.rows))

    @property
    def seconds(self) -> float:
        timed = [row for row in self.rows if "seconds_per_step" in row]
        return sum(row["seconds_per_step"] * (row["step"] - before) for row, before in zip(timed, [0.0, *(row["step"] for row in timed)]))

    def values(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]


def read_journal(run: Path) -> Journal | None:
    """The metrics of a run folder, None without any; of a step that was repeated after a restart the last values count."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return None
    rows: dict[tuple[float, bool], dict[str, float]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        rows[row["step"], "seconds_per_step" in row] = row
    return Journal([rows[key] for key in sorted(rows)]) if rows else None


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Moving average over a window of `share` of all points."""
    reach = round(share * len(values) / 2)
    return [sum(part) / len(part) for k in range(len(values)) if (part := values[max(0, k - reach) : k + reach + 1])]


def panels(journals: dict[str, Journal]) -> list[Panel]:
    """Losses of every stage, then the oracle's scores of its validation videos."""
    made = []
    for stage, journal in journals.items():
        lines, high = [], 0.0
        for name in LOSSES[stage]:
            steps, values = journal.values(name)
            if values:
                mean = smoothed(values)
                lines.append(Line(name.removeprefix(f"{stage}/").replace("/", " ").replace("_", " "), steps, mean, mean, mean))
                high = max(high, max(mean[len(mean) // 20 :]))
        if lines:
            made.append(Panel(f"{stage}: loss", "step", "loss", lines, (0.0, 1.05 * high)))
    for stage, journal in journals.items():
        lines = []
        for name in COUNTED:
            steps, values = journal.values(name)
            if len(values) > 1 and name.startswith("oracle/"):
                lines.append(Line(name.split("/")[-1], steps, values, values, values))
        if lines:
            made.append(Panel(f"{stage}: validation", "step", "share right", lines, (0.0, 1.04)))
    return made


def measure(runs: Path, stage: str, work: Path, num_prompts: int) -> dict[str, Any]:
    """Scores of a stage's pipeline on held-out prompts, by the scripts that users run."""
    model, output = work / stage / "pipeline", work / stage / "results"
    bundle = [sys.executable, "scripts/bundle_miniature.py", "--runs", str(runs), "--stage", stage, "--to", str(model)]
    judge = [sys.executable, "scripts/evaluate_miniature.py", "--model", str(model), "--output", str(output)]
    for command in (bundle, [*judge, "--parts", "prompts", "--num-prompts", str(num_prompts)]):
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def sheet(run: Path, to: Path, *, size: tuple[int, int] = (640, 640)) -> bool:
    """Write the top of the newest validation picture of a run folder; whether there is one."""
    pictures = sorted(path for path in run.glob("*.png"))
    if pictures:
        with Image.open(pictures[-1]) as picture:
            small = picture.convert("RGB").resize((size[0], round(picture.height * size[0] / picture.width)), Image.Resampling.LANCZOS)
            small.crop((0, 0, size[0], min(size[1], small.height))).save(to)
    return bool(pictures)


def page(stages: dict[str, dict[str, Any]], pictures: Sequence[str]) -> str:
    """A table of all stages, and the last validation picture of each."""
    lines = ["# The recipe, stage by stage", "", "![losses and validation](recipe.png)", ""]
    head = ["stage", "steps", "minutes", *ATTRIBUTES, *(f"{name}, last second" for name in ATTRIBUTES), "seconds per video"]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for stage, found in stages.items():
        cells = [stage, str(found["steps"]), f"{found['seconds'] / 60:.0f}"]
        videos = found.get("videos")
        if videos is None:
            cells += [""] * (2 * len(ATTRIBUTES) + 1)
        else:
            cells += [f"{videos[part][name][0]:.0%}" for part in ("prompts", "prompts_last_second") for name in ATTRIBUTES]
            cells.append(f"{videos['prompts']['seconds_per_video']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    measured = [found["videos"]["prompts"] for found in stages.values() if "videos" in found]
    if measured:
        lines += ["", f"Shares: {measured[0]['videos']} held-out prompts, {measured[0]['images']} images, the same noise for all stages."]
    for stage in pictures:
        lines += ["", f"## {stage}, at its last validation", "", f"![{stage}](stage_{stage}.png)"]
    lines += ["", "All numbers: [recipe.json](recipe.json). Written by `python -m experiments.recipe`.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "miniature")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "miniature")
    parser.add_argument("--num-prompts", type=int, default=100)
    arguments = parser.parse_args(argv)
    runs = arguments.runs.resolve()
    journals = {stage: journal for stage in STAGES if (journal := read_journal(runs / stage)) is not None}
    if not journals:
        sys.stderr.write(f"experiments.recipe: no stage has run in {runs}; run scripts/miniature_recipe.sh first\n")
        return 2
    stages: dict[str, dict[str, Any]] = {}
    for stage, journal in journals.items():
        stages[stage] = {"steps": journal.steps, "seconds": round(journal.seconds, 1)}
        for name in (*LOSSES[stage], *COUNTED):
            if values := journal.values(name)[1]:
                stages[stage][name] = values[-1]
        if stage in PIPELINES and (runs / stage / "export").is_dir():
            stages[stage]["videos"] = measure(runs, stage, runs / "evaluation", arguments.num_prompts)
    arguments.output.mkdir(parents=True, exist_ok=True)
    pictures = [stage for stage in journals if sheet(runs / stage, arguments.output / f"stage_{stage}.png")]
    write_json(arguments.output / "recipe.json", stages)
    write_text(arguments.output / "recipe.md", page(stages, pictures))
    over_time(panels(journals), arguments.output / "recipe.png", title="The miniature's stages", columns=3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
