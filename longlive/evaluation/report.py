"""What was measured on a folder as tables and charts, beside published numbers: `results/score.md`, `score.json` and PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longlive.evaluation import charts, values, vbench_run
from longlive.evaluation import folder as folders
from longlive.evaluation.folder import Prepared
from longlive.evaluation.vbench_score import (
    DIMENSIONS,
    PUBLISHED,
    markdown_table,
    missing_dimensions,
    normalised,
    score,
    table,
)
from longlive.files import write_json, write_text

Report = tuple[str, dict[str, Any], list[str]]
"""Markdown, the same as JSON content, and what is missing in it."""


def name_of(prepared: Prepared) -> str:
    """A short name of the model, with what it does at a switch when that is not LongLive's way."""
    recache = prepared.model.get("recache", "joint")
    place = Path(str(prepared.model["model"]))
    short = "/".join(place.parts[-2:]) if place.name in ("pipeline", "export") else place.name
    return short + (f", recache={recache}" if recache != "joint" else "")


def remarks(folder: Path, prepared: Prepared) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    part, said = prepared.prompt_list, []
    taken = {key: part[key] for key in ("dimensions", "limit", "samples") if part.get(key)}
    if taken:
        words = "; ".join(f"{key} {', '.join(value) if key == 'dimensions' else value}" for key, value in taken.items())
        said.append(f"only a part of the benchmark was prepared ({words}): these numbers do not compare with published ones")
    if prepared.rewritten is not None:
        said.append(f"videos were generated from rewritten prompts ({prepared.rewritten.get('file')}); the original ones name the files")
    if prepared.seed is None:
        said.append("the videos were made by another program; their seeds are not known")
    usual = prepared.benchmark.num_latent_frames
    if usual is not None and prepared.seed is not None and prepared.num_latent_frames not in (None, usual):
        said.append(f"videos have {prepared.num_latent_frames} latent frames; this benchmark is for {usual}")
    runs = {dimension: found for dimension in DIMENSIONS if (found := vbench_run.read_run(folder, dimension))}
    lengths = {dimension: tuple(found["clip_seconds"]) for dimension, found in runs.items() if found["clip_seconds"]}
    for seconds in sorted(set(lengths.values())):
        dimensions = ", ".join(dimension for dimension, of in lengths.items() if of == seconds)
        said.append(f"clips of {' and '.join(f'{one:g}' for one in seconds)} s: {dimensions}")
    if "temporal_flickering" in runs and not runs["temporal_flickering"]["static_filter"]:
        said.append("temporal flickering is that of all videos, without VBench's filter of still ones")
    return said


def stale(folder: Path, prepared: Prepared) -> list[str]:
    """What was measured on other videos than are there now, one sentence each."""
    found = [name for name in values.of_vbench(folder)[1] if vbench_run.is_stale(folder, prepared, name)]
    for kind in values.KINDS:
        about = values.read(folder, kind)[1]
        try:
            if about.get("videos_digest") and about["videos_digest"] != folders.digest_of_videos(folder, prepared.names):
                found.append(kind)
        except ValueError:
            found.append(kind)
    return [f"{name} was measured on other videos than are there now; measure again" for name in found]


def vbench_report(folder: Path, prepared: Prepared, name: str) -> Report:
    """Dimensions, and totals beside published ones unless a dimension is missing."""
    averages = values.of_vbench(folder)[1]
    if not averages:
        raise ValueError(f"no dimension of VBench was measured on {folder}; `run` it first")
    published = PUBLISHED["vbench_long" if prepared.benchmark.cuts_clips else "vbench"]
    content: dict[str, Any] = {"dimensions": averages, "normalised": normalised(averages)}
    results, title = folder / "results", prepared.benchmark.title
    if not (problem := missing_dimensions(averages)):
        content |= score(averages)._asdict()
        rows = {name: score(averages), **{f"{model}, published": row for model, row in published.items()}}
        shown: dict[str, dict[str, float]] = {m: dict(zip(("Total", "Quality", "Semantic"), row)) for m, row in rows.items()}
        charts.bars(shown, results / "bars.png", title=title, own=(name,))
    if len(averages) >= charts.MIN_RADAR_AXES:
        charts.radar({name: content["normalised"]}, results / "radar.png", title=f"{title}: dimensions, normalised")
    return table(averages, name=name, published=published), content, [problem] if problem else []


def interactive_report(folder: Path, prepared: Prepared, name: str) -> Report:
    """CLIP score by stretch beside published rows; with Quality for the interactive protocol, with two consistencies around one switch.

    The published ablation of the switch does not say of which stretch its CLIP score is.
    """
    switch = prepared.suite == "switch"
    averages = values.of_vbench(folder)[1]
    clip = {metric.removeprefix("clip_"): values.mean(of) for metric, of in values.read(folder, "clip_score")[0].items()}
    wanted = ("background_consistency", "subject_consistency") if switch else vbench_run.INTERACTIVE
    problems = [] if clip else ["the CLIP score was not measured; `run` says what it lacks"]
    if missing := ", ".join(dimension for dimension in wanted if dimension not in averages):
        problems.append(f"{missing} were not measured" if switch else f"Quality lacks {missing}")
    stretches = [f"{stretch.replace('_', '–')} s" for stretch in clip] or [f"part {n + 1}" for n in range(2 if switch else 6)]
    scores = list(clip.values()) or [None] * len(stretches)
    content: dict[str, Any] = {"dimensions": averages, "clip": clip}
    if switch:
        head = ["what a switch does", "background", "subject", *(f"CLIP, {one}" for one in stretches)]
        own = [100 * averages[one] if one in averages else None for one in wanted]
        published = {m: [*row[:2], *[None] * (len(stretches) - 1), row[2]] for m, row in PUBLISHED["switch"].items()}
    else:
        head = ["model", "Quality", *stretches]
        content["quality"] = None if missing else float(np.mean([normalised(averages)[dimension] for dimension in wanted]))
        own, published = [content["quality"]], PUBLISHED["interactive"]
        if clip:
            _clip_chart(clip, name, folder / "results" / "clip_score.png")
    rows = [[f"**{name}**", *("missing" if value is None else f"{value:.2f}" for value in (*own, *scores))]]
    rows += [[f"{m} (published)", *("" if value is None else f"{value:.2f}" for value in row)] for m, row in published.items()]
    return markdown_table(head, rows), content, problems


def _clip_chart(clip: dict[str, float], name: str, path: Path) -> None:
    """CLIP score over time, each stretch at its middle, beside published ones of six stretches of ten seconds."""
    middles = [sum(map(float, stretch.split("_"))) / 2 for stretch in clip]
    curves = [charts.Line(name, middles, list(clip.values()))]
    curves += [charts.Line(f"{m}, published", [5, 15, 25, 35, 45, 55], row[1:]) for m, row in PUBLISHED["interactive"].items()]
    panel = charts.Panel("CLIP score of each stretch against its prompt", "seconds", "cosine × 100", curves)
    charts.over_time([panel], path, title="Six consecutive prompts", columns=1)


def values_report(folder: Path, *kinds: str) -> tuple[str, dict[str, float]]:
    """Means of what we measure ourselves, as Markdown and by metric."""
    rows, content = [], {}
    for kind in kinds:
        for metric, of in values.read(folder, kind)[0].items():
            if known := [value for value in of.values() if value == value]:
                content[metric] = values.mean(of)
                rows.append([metric, *(f"{value:.4f}" for value in (content[metric], min(known), max(known))), str(len(known))])
    return markdown_table(["metric", "mean", "lowest", "highest", "videos"], rows) if rows else "", content


def write(folder: Path, *, name: str | None = None) -> tuple[str, list[str]]:
    """Tables and charts of a prepared folder into its `results/`; returns the text and what is missing in it.

    Raises:
        ValueError: when nothing was measured.
    """
    prepared = folders.load(folder)
    name, judge = name or name_of(prepared), prepared.benchmark.measured_by
    said = remarks(folder, prepared)
    parts, problems = [], []
    content: dict[str, Any] = {"suite": prepared.suite, "name": name, "remarks": said, "model": prepared.model, "weights": prepared.weights}
    if judge != "oracle" or values.of_vbench(folder)[1]:
        make = interactive_report if judge == "interactive" else vbench_report
        text, more, problems = make(folder, prepared, name)
        if judge == "oracle":  # a few dimensions of VBench beside it: no totals, and none are missed
            text, problems = text.split("\n\n")[0] + "\n", []
        parts.append(text)
        content |= more
    problems = problems + stale(folder, prepared)
    text, measures = values_report(folder, "oracle", "measured")
    if text:
        parts.append(text)
        content["measures"] = measures
    if not parts:
        raise ValueError(f"nothing was measured on {folder}; `run` or `measure` it first")
    head = [f"# {prepared.benchmark.title}: {name}", *(f"**Note:** {one}." for one in said), *(f"**Missing:** {one}." for one in problems)]
    whole = "\n\n".join([*head, *parts])
    write_json(folder / "results" / "score.json", content | {"missing": problems})
    write_text(folder / "results" / "score.md", whole)
    return whole, problems
