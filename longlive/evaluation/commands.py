"""The commands of `python -m longlive.evaluation`: their keyword arguments are its options; each returns an exit status."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive.evaluation import compare as comparison
from longlive.evaluation import oracle_report, pixel_report, report, rewrite, suites, values, vbench_run, vbench_score
from longlive.evaluation import prepare as preparation
from longlive.evaluation.clip_score import FRAMES_PER_SECOND, ClipScore, prompt_intervals
from longlive.evaluation.prepared import PlannedVideo, Prepared, check_videos, load_prepared, video_path
from longlive.evaluation.vbench_environment import default_environment
from longlive.generation.dimensions import Timing
from longlive.generation.prompt_files import read_prompt_text
from longlive.parallel.world import choose_device, get_world

log = logging.getLogger(__name__)

CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


def prepare(
    suite: str,
    *,
    output: Path,
    config: Path | None,
    dimensions: Sequence[str] | None,
    limit: int | None,
    samples: int | None,
    rewritten: Path | None,
    prompts: Path | None,
    videos: Path | None,
    name: str | None,
    environment: Path | None,
    settings: Sequence[str],
) -> int:
    """`prepare SUITE`; `settings`: words `key=value`."""
    listed = suites.prompts_of(suite, full_info=lambda: default_environment(environment).full_info, prompts=prompts, rewritten=rewritten)
    listed = suites.part_of(listed, dimensions=dimensions, limit=limit, samples=samples)
    if listed.own and suite == "switch":
        log.info("of every script in %s only the first two prompts are used, for five seconds each", prompts)
    if videos is not None:
        if get_world().size > 1:
            raise ValueError(f"{get_world().size} processes: --videos needs only one")
        if settings or config or rewritten:
            raise ValueError("--videos takes videos as they are; leave out --config, --rewritten and settings")
        preparation.adopt(videos, suite, listed, output, name=name or videos.resolve().name)
        return 0
    if name is not None:
        raise ValueError("--name belongs to --videos")
    preparation.prepare(preparation.read_settings(config, settings), suite, listed, output)
    return 0


def run(folder: Path, *, dimensions: Sequence[str] | None, clip: str, **how_to_measure: Any) -> int:
    """`run FOLDER`; `how_to_measure`: the fields of `vbench_run.Options`. Status 1 when something could not be measured."""
    prepared = load_prepared(folder)
    measured_by = prepared.benchmark.measured_by
    options = vbench_run.Options(**how_to_measure)
    asked = [] if measured_by == "oracle" and dimensions is None else vbench_run.dimensions_of(prepared, dimensions)
    vbench_run.check_options(prepared, asked, options)
    if clip != CLIP and (measured_by != "interactive" or dimensions is not None):
        raise ValueError("--clip is for the CLIP score, which the suites interactive and switch have when no --dimensions are chosen")
    complete = True
    if measured_by == "oracle":
        check_videos(folder, prepared)
        oracle_report.run(folder, prepared)
        measure_folder(folder, prepared)
    if measured_by == "interactive" and dimensions is None:
        complete = run_clip(folder, prepared, clip, device=options.device)
    if asked:
        outcomes = vbench_run.run(folder, prepared, asked, options)
        if left := [dimension for dimension, average in outcomes.items() if average is None]:
            text = "%d of %d dimensions could not be measured: %s; the same command tries them again"
            log.warning(text, len(left), len(outcomes), ", ".join(left))
        complete = complete and not left
    return 0 if complete else 1


def run_clip(folder: Path, prepared: Prepared, name: str, *, device: str) -> bool:
    """CLIP scores of all prompts of all videos; returns whether they could be measured."""
    check_videos(folder, prepared)
    place = choose_device(device, get_world())
    try:
        clip = ClipScore(name, device=place)
    except ValueError as error:
        log.warning("the CLIP score cannot be measured: %s", error)
        return False
    intervals = {entry.name: prompt_intervals(entry.script.prompts, entry.script.durations or ()) for entry in prepared.entries}

    def measure(planned: PlannedVideo) -> dict[str, float]:
        of_entry = intervals[planned.entry.name]
        scores = clip.score_video(video_path(folder, planned.name), of_entry)
        return {f"clip_{interval.begin:g}_{interval.end:g}": score for interval, score in zip(of_entry, scores)}

    about = {"clip": name, "clip_weights": clip.digest, "images_per_second": FRAMES_PER_SECOND, **values.measured_on(folder, prepared)}
    cut_off = sum(clip.num_tokens(interval.prompt) > clip.max_tokens for of_entry in intervals.values() for interval in of_entry)
    if cut_off:
        log.info("CLIP reads %d tokens; it did not see the end of %d prompts", clip.max_tokens, cut_off)
    values.write(folder, "clip_score", values.collect(prepared, measure), {**about, "prompts_cut_off": cut_off, "device": str(place)})
    return True


def score(folder: Path, *, name: str | None, long: bool) -> int:
    """`score FOLDER`: of a prepared one, or of one with results of vbench; status 2 when there is no Total."""
    if (folder / "prepared.json").exists():
        if long:
            raise ValueError(f"{folder} is a prepared folder, whose suite is known; leave out --long")
        text, problems = report.write(folder, name=name)
        sys.stdout.write(text)
        for problem in problems:
            log.error("error: %s", problem)
        return 2 if problems else 0
    results = vbench_score.read_results(folder)
    published = vbench_score.PUBLISHED["vbench_long" if long else "vbench"]
    totals = vbench_score.total_table(results, name=name or "this run", published=published)
    sys.stdout.write(f"{vbench_score.dimension_table(results)}\n{totals}")
    rounded = {name: round(value, 2) for name, value in vbench_score.score(results).items()}
    sys.stdout.write(json.dumps(rounded | {"dimensions": results}) + "\n")
    return 0


def compare(first: Path, second: Path, *, names: Sequence[str] | None, resamples: int, output: Path | None) -> int:
    """`compare A B`."""
    rows, about = comparison.compare_folders(first, second, resamples=resamples)
    names = names or [report.name_of(load_prepared(folder)) for folder in (first, second)]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    comparison.write(rows, names, output or second / "results" / "compared", about)
    sys.stdout.write(comparison.table(rows, names))
    if omitted := about["measured_on_one_only"]:
        log.warning("measured on one folder only, and left out: %s", ", ".join(omitted))
    return 0


def measure(paths: Sequence[Path], *, block: int | None, output: Path | None) -> int:
    """`measure PATH…`: a line of JSON per video; for a prepared folder `results/measured.json` and a table."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    if output is not None and (twice := [name for name in names if names.count(name) > 1]):
        raise ValueError(f"several are named {twice[0]}, and their charts would replace each other; measure them one by one")
    if block is not None and block < 1:
        raise ValueError(f"--block {block}: at least one latent frame")
    for path, name in zip(paths, names):
        if path.is_dir():
            prepared = load_prepared(path)
            check_videos(path, prepared)
            if block is not None:
                raise ValueError(f"{path} is a prepared folder, whose block is known; leave out --block")
            measure_folder(path, prepared, charts_folder=None if output is None else output / name)
        else:
            timing = Timing(block=block or 3)
            metrics = pixel_report.measure_file(path, pixel_report.prompts_beside(path), timing, charts_folder=output)._asdict()
            line = {"video": str(path)} | {metric: values.none_if_nan(round(value, 5)) for metric, value in metrics.items()}
            sys.stdout.write(json.dumps(line) + "\n")
    return 0


def measure_folder(folder: Path, prepared: Prepared, *, charts_folder: Path | None = None) -> None:
    """Pixel metrics of all videos of a prepared folder."""

    def measure(planned: PlannedVideo) -> dict[str, float]:
        path, prompts = video_path(folder, planned.name), prepared.prompt_starts(planned.entry)
        metrics = pixel_report.measure_file(path, prompts, prepared.timing, charts_folder=charts_folder)._asdict()
        del metrics["images"]
        return {"temporal_flickering_of_all": metrics.pop("temporal_flickering"), **metrics}  # VBench's own is of five videos per prompt

    measured = values.collect(prepared, measure)
    measured = {metric: by_video for metric, by_video in measured.items() if not np.isnan(list(by_video.values())).all()}
    values.write(folder, "measured", measured, {**values.measured_on(folder, prepared), "block": prepared.block})
    sys.stdout.write(report.values_report(folder, "measured")[0])


def rewrite_prompts(*, prompts: Path | None, environment: Path | None, **writing: Any) -> int:
    """`rewrite`; `writing`: the arguments of `rewrite.run`. Line i of its output belongs to line i of the prompts, so none is dropped."""
    if prompts is not None:
        lines = [line.strip() for line in read_prompt_text(prompts).rstrip("\n").split("\n")]
    else:
        lines = [item["prompt_en"] for item in suites.read_full_info(default_environment(environment).full_info)]
    log.info(rewrite.run(argparse.Namespace(**writing), lines))
    return 0
