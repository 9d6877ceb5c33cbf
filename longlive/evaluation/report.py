"""What was measured on a folder as tables and plots, beside what is published: `results/score.md`, `score.json` and PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive.evaluation import charts, values, vbench_run
from longlive.evaluation import folder as folders
from longlive.evaluation.folder import Prepared
from longlive.evaluation.suites import find_suite
from longlive.evaluation.vbench_score import (
    DIMENSIONS,
    PUBLISHED,
    PUBLISHED_INTERACTIVE,
    PUBLISHED_LONG,
    PUBLISHED_SWITCH,
    Row,
    normalised,
    score,
    table,
)
from longlive.evaluation.weightless import begun
from longlive.miniature.world import ATTRIBUTES

ROOM = 112.0  # percent: words of marks stand above the curves


def name_of(prepared: Prepared) -> str:
    """The model, shortly, and what a switch does with the past when that is not LongLive's way."""
    recache = prepared.model.get("recache", "joint")
    place = Path(str(prepared.model["model"]))
    short = "/".join(place.parts[-2:]) if place.name in ("pipeline", "export") else place.name
    return short + (f", recache={recache}" if recache != "joint" else "")


def remarks(folder: Path, prepared: Prepared) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    part, said = prepared.prompt_list, []
    if part.get("limit") or part.get("dimensions") or part.get("samples"):
        words = {key: ", ".join(part[key]) if key == "dimensions" else part[key] for key in part if part[key]}
        taken = [f"{key} {words[key]}" for key in ("dimensions", "limit", "samples") if key in words]
        said.append(f"only a part of the benchmark was prepared ({'; '.join(taken)}): these numbers do not compare with published ones")
    if prepared.rewritten is not None:
        said.append(f"videos were generated from rewritten prompts ({prepared.rewritten.get('file')}); the original ones name the files")
    if prepared.seed is None:
        said.append("the videos were made by another program; their seeds are not known")
    usual = find_suite(prepared.suite).num_latent_frames
    if usual is not None and prepared.seed is not None and prepared.num_latent_frames not in (None, usual):
        said.append(f"videos have {prepared.num_latent_frames} latent frames; this benchmark is for {usual}")
    runs = {dimension: found for dimension in DIMENSIONS if (found := vbench_run.read_run(folder, dimension))}
    lengths = {dimension: found["clip_seconds"] for dimension, found in runs.items() if found["clip_seconds"]}
    for seconds in sorted({tuple(of) for of in lengths.values()}):
        of_it = ", ".join(dimension for dimension, of in lengths.items() if tuple(of) == seconds)
        said.append(f"clips of {' and '.join(f'{one:g}' for one in seconds)} s: {of_it}")
    if "temporal_flickering" in runs and not runs["temporal_flickering"]["static_filter"]:
        said.append("temporal flickering is that of all videos, without VBench's filter of still ones")
    return said


def stale(folder: Path, prepared: Prepared) -> list[str]:
    """What was measured on other videos than are there now."""
    found = [name for name in values.of_vbench(folder)[1] if vbench_run.is_stale(folder, prepared, name)]
    for kind in values.KINDS:
        mine = values.read(folder, kind)
        known = None if mine is None else mine[1].get("videos_digest")
        try:
            fresh = known is None or known == folders.digest_of_videos(folder, prepared.names)
        except ValueError:
            fresh = False
        if not fresh:
            found.append(kind)
    return [f"{name} was measured on other videos than are there now; measure again" for name in found]


def vbench_report(folder: Path, prepared: Prepared, name: str) -> tuple[str, dict[str, Any], list[str]]:
    """Markdown, content for JSON, and what keeps it from being whole."""
    averages = values.of_vbench(folder)[1]
    if not averages:
        raise ValueError(f"no dimension of VBench was measured on {folder}; `run` it first")
    long = find_suite(prepared.suite).measured_by == "vbench_long"
    published = PUBLISHED_LONG if long else PUBLISHED
    return vbench_pictures(averages, folder / "results", name, published, title=find_suite(prepared.suite).title)


def vbench_pictures(
    averages: Mapping[str, float], target: Path, name: str, published: Mapping[str, Row], *, title: str
) -> tuple[str, dict[str, Any], list[str]]:
    """Table and plots of averages by dimension; no totals, and what is missing, when it is not all."""
    content: dict[str, Any] = {"dimensions": dict(averages), "normalised": normalised(averages)}
    missing = [dimension for dimension in DIMENSIONS if dimension not in averages]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(DIMENSIONS)} dimensions are missing: {', '.join(missing)}; there is no Total without them")
    else:
        own = score(averages)
        content |= own._asdict()
        rows = {name: own} | {f"{model}, published": row for model, row in published.items()}
        shown = {model: {"Total": row.total, "Quality": row.quality, "Semantic": row.semantic} for model, row in rows.items()}
        charts.bars(shown, target / "bars.png", title=title, own=(name,))
    if len(averages) >= charts.FEWEST_AXES:
        charts.radar({name: content["normalised"]}, target / "radar.png", title=f"{title}: dimensions, normalised")
    return table(averages, name=name, published=published), content, problems


def interactive_report(folder: Path, name: str) -> tuple[str, dict[str, Any], list[str]]:
    """CLIP score by stretch and Quality beside published rows."""
    averages = values.of_vbench(folder)[1]
    clip = values.read(folder, "clip_score")
    problems, content = [], {"dimensions": averages}
    stretches: dict[str, float] = {} if clip is None else {metric: values.mean(of) for metric, of in clip[0].items()}
    if clip is None:
        problems.append("the CLIP score was not measured; `run` says what it lacks")
    missing = [dimension for dimension in vbench_run.INTERACTIVE if dimension not in averages]
    quality = None
    if missing:
        problems.append(f"Quality lacks {', '.join(missing)}")
    else:
        quality = float(np.mean([normalised(averages)[dimension] for dimension in vbench_run.INTERACTIVE]))
    content |= {"quality": quality, "clip": stretches}
    names = [metric.removeprefix("clip_").replace("_", "–") + " s" for metric in stretches] or [f"part {n + 1}" for n in range(6)]
    lines = [f"| model | Quality | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    own = [f"{value:.2f}" for value in stretches.values()] or ["missing"] * len(names)
    lines.append(f"| **{name}** | {'missing' if quality is None else f'{quality:.2f}'} | {' | '.join(own)} |")
    for model, row in PUBLISHED_INTERACTIVE.items():
        lines.append(f"| {model} (published) | {row.quality:.2f} | " + " | ".join(f"{value:.2f}" for value in row.clip) + " |")
    if stretches:
        middle = [5.0 + 10 * number for number in range(6)]
        places = [sum(map(float, metric.removeprefix("clip_").split("_"))) / 2 for metric in stretches]
        curves = [charts.Line(name, places, list(stretches.values()))]
        curves += [charts.Line(f"{model}, published", middle, row.clip) for model, row in PUBLISHED_INTERACTIVE.items()]
        panel = charts.Panel("CLIP score of each stretch against its prompt", "seconds", "cosine × 100", curves)
        charts.over_time([panel], folder / "results" / "clip_score.png", title="Six prompts that follow each other", columns=1)
    return "\n".join(lines) + "\n", content, problems


def switch_report(folder: Path, name: str) -> tuple[str, dict[str, Any], list[str]]:
    """Consistency and CLIP score around one switch beside the published ablation, which does not say of which stretch its score is."""
    averages = values.of_vbench(folder)[1]
    clip = values.read(folder, "clip_score")
    scores = {} if clip is None else {metric: values.mean(of) for metric, of in clip[0].items()}
    wanted = ("background_consistency", "subject_consistency")
    problems = [f"{dimension} was not measured" for dimension in wanted if dimension not in averages]
    if not scores:
        problems.append("the CLIP score was not measured; `run` says what it lacks")
    stretches = [metric.removeprefix("clip_").replace("_", "–") + " s" for metric in scores] or ["first", "second"]
    lines = [f"| what a switch does | background | subject | {' | '.join(f'CLIP, {one}' for one in stretches)} |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(stretches))
    own = [f"{100 * averages[one]:.2f}" if one in averages else "missing" for one in wanted]
    own += [f"{value:.2f}" for value in scores.values()] or ["missing"] * len(stretches)
    lines.append(f"| **{name}** | " + " | ".join(own) + " |")
    for model, row in PUBLISHED_SWITCH.items():
        empty = " |" * (len(stretches) - 1)
        lines.append(f"| {model} (published) | {row.background:.2f} | {row.subject:.2f} |{empty} {row.clip:.2f} |")
    return "\n".join(lines) + "\n", {"dimensions": averages, "clip": scores}, problems


def oracle_plot(adherence: np.ndarray, prepared: Prepared, path: Path) -> None:
    """Share of videos' images that show each attribute, second by second `[videos, seconds, 4]`, with 95 % intervals over videos."""
    seconds = np.arange(adherence.shape[1]) + 0.5
    lines = []
    for number, name in enumerate(ATTRIBUTES):
        shown = 100 * adherence[:, :, number]
        mean, count = np.nanmean(shown, axis=0), np.maximum((~np.isnan(shown)).sum(axis=0), 1)
        around = 1.96 * np.nanstd(shown, axis=0) / np.sqrt(count)
        low, high = np.clip(mean - around, 0, 100), np.clip(mean + around, 0, 100)
        lines.append(charts.Line(name, seconds.tolist(), mean.tolist(), low.tolist(), high.tolist()))
    prompts = begun(prepared.schedule_of(prepared.entries[0]).cues)
    marks = {one.image / prepared.fps: "next prompt" for one in prompts[1:]}
    panel = charts.Panel(
        "Images that show what the prompt in force says", "seconds", "percent", lines, (0.0, 112.0), marks
    )  # room for the words of the marks
    charts.over_time([panel], path, title=f"{name_of(prepared)}, {len(adherence)} videos", columns=1)


def values_report(folder: Path, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Means of what we measure ourselves."""
    lines, content = ["| metric | mean | lowest | highest | videos |", "| --- | --- | --- | --- | --- |"], {}
    for kind in kinds:
        found = values.read(folder, kind)
        for metric, of in (found[0] if found else {}).items():
            known = [value for value in of.values() if value == value]
            if known:
                content[metric] = values.mean(of)
                lines.append(f"| {metric} | {content[metric]:.4f} | {min(known):.4f} | {max(known):.4f} | {len(known)} |")
    return ("\n".join(lines) + "\n", content) if content else ("", {})


def write(folder: Path, *, name: str | None = None) -> tuple[str, list[str]]:
    """Tables and plots of a prepared folder into its `results/`; returns the text and what is missing in it.

    Raises:
        ValueError: when nothing was measured.
    """
    prepared = folders.load(folder)
    name = name or name_of(prepared)
    suite = find_suite(prepared.suite)
    said = remarks(folder, prepared)
    problems: list[str] = []
    parts, content = [], {"suite": prepared.suite, "name": name, "remarks": said, "model": prepared.model, "weights": prepared.weights}
    measured_by_vbench = bool(values.of_vbench(folder)[1])
    if suite.measured_by == "interactive":
        make = switch_report if prepared.suite == "switch" else interactive_report
        text, more, problems = make(folder, name)
        parts.append(text)
        content |= more
    elif measured_by_vbench or suite.measured_by != "oracle":
        text, more, problems = vbench_report(folder, prepared, name)
        if suite.measured_by == "oracle":
            text, problems = text.split("\n\n")[0] + "\n", []
        parts.append(text)
        content |= more
    problems = problems + stale(folder, prepared)
    text, more = values_report(folder, ("oracle", "measured"))
    if text:
        parts.append(text)
        content["measures"] = more
    if not parts:
        raise ValueError(f"nothing was measured on {folder}; `run` or `measure` it first")
    head = [f"# {suite.title}: {name}", *(f"**Note:** {line}." for line in said), *(f"**Missing:** {line}." for line in problems)]
    whole = "\n\n".join([*head, *parts])
    folders.write_json(folder / "results" / "score.json", content | {"missing": problems})
    (folder / "results" / "score.md").write_text(whole, encoding="utf-8")
    return whole, problems
