"""The commands of `python -m longlive.evaluation`: their keyword arguments are its options; each returns an exit status."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive.evaluation import compare as comparison
from longlive.evaluation import folder as folders
from longlive.evaluation import oracle_report, pixel_report, report, rewrite, suites, values, vbench_run
from longlive.evaluation import prepare as preparation
from longlive.evaluation.clip_score import IMAGES_PER_SECOND, ClipScore, stretches
from longlive.evaluation.folder import PlannedVideo, Prepared
from longlive.evaluation.vbench_environment import default_environment
from longlive.evaluation.vbench_score import PUBLISHED, read_results, table
from longlive.evaluation.vbench_score import score as score_of
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
        log.info("of every script the first two prompts are shown, five seconds each, whatever %s says", prompts)
    if videos is not None:
        if get_world().size > 1:
            raise ValueError(f"{get_world().size} processes: --videos wants one")
        if settings or config or rewritten:
            raise ValueError("--videos takes videos as they are; leave out --config, --rewritten and settings")
        preparation.adopt(videos, suite, listed, output, name=name or videos.resolve().name)
        return 0
    if name is not None:
        raise ValueError("--name belongs to --videos")
    preparation.prepare(preparation.read_settings(config, settings), suite, listed, output)
    return 0


def run(folder: Path, *, dimensions: Sequence[str] | None, clip: str, environment: Path | None, device: str, **how_to_measure: Any) -> int:
    """`run FOLDER`; status 1 when something could not be measured."""
    prepared = folders.load(folder)
    judge = prepared.benchmark.measured_by
    options = vbench_run.Options(device=device, **how_to_measure)
    asked = [] if judge == "oracle" and dimensions is None else vbench_run.dimensions_of(prepared, dimensions)
    vbench_run.check_options(prepared, asked, options)
    if clip != CLIP and (judge != "interactive" or dimensions is not None):
        raise ValueError("--clip is for the CLIP score, which the suites interactive and switch have when no --dimensions are chosen")
    if not asked and (device != "auto" or environment is not None):
        raise ValueError("--device and --environment are for vbench, which measures nothing here; leave them out, or choose --dimensions")
    complete = True
    if judge == "oracle":
        folders.check_or_raise(folder, prepared)
        oracle_report.run(folder, prepared)
        measure_folder(folder, prepared)
    if judge == "interactive" and dimensions is None:
        complete = run_clip(folder, prepared, clip, device=device)
    if asked:
        outcomes = vbench_run.run(folder, prepared, asked, default_environment(environment), options)
        if left := [dimension for dimension, average in outcomes.items() if average is None]:
            text = "%d of %d dimensions could not be measured: %s; the same command tries them again"
            log.warning(text, len(left), len(outcomes), ", ".join(left))
        complete = complete and not left
    return 0 if complete else 1


def run_clip(folder: Path, prepared: Prepared, name: str, *, device: str) -> bool:
    """CLIP scores of all stretches of all videos; returns whether they could be measured."""
    folders.check_or_raise(folder, prepared)
    place = choose_device(device, get_world())
    try:
        clip = ClipScore(name, device=place)
    except ValueError as error:
        log.warning("the CLIP score cannot be measured: %s", error)
        return False
    parts = {entry.name: stretches(entry.script.prompts, entry.script.durations or ()) for entry in prepared.entries}

    def measure(planned: PlannedVideo) -> dict[str, float]:
        of_it = parts[planned.entry.name]
        scores = clip.of_video(folders.video_path(folder, planned.name), of_it)
        return {f"clip_{part.begin:g}_{part.end:g}": value for part, value in zip(of_it, scores)}

    about = {"clip": name, "clip_weights": clip.digest, "images_per_second": IMAGES_PER_SECOND, **values.measured_on(folder, prepared)}
    cut_off = sum(clip.num_tokens(part.prompt) > clip.max_tokens for of_it in parts.values() for part in of_it)
    if cut_off:
        log.info("CLIP reads %d tokens; it did not see the end of %d prompts", clip.max_tokens, cut_off)
    values.write(folder, "clip_score", values.collect(prepared, measure), {**about, "prompts_cut_off": cut_off, "device": str(place)})
    return True


def score(folder: Path, *, name: str | None, long: bool) -> int:
    """`score FOLDER`: of a prepared one, or of one with results of vbench; status 2 when there is no Total."""
    if (folder / "prepared.json").exists():
        if long:
            raise ValueError(f"{folder} says itself which benchmark it belongs to; leave out --long")
        text, problems = report.write(folder, name=name)
        sys.stdout.write(text)
        for problem in problems:
            log.error("error: %s", problem)
        return 2 if problems else 0
    results = read_results(folder)
    sys.stdout.write(table(results, name=name or "this run", published=PUBLISHED["vbench_long" if long else "vbench"]))
    totals = {name: round(value, 2) for name, value in score_of(results)._asdict().items()}
    sys.stdout.write(json.dumps(totals | {"dimensions": results}) + "\n")
    return 0


def compare(first: Path, second: Path, *, names: Sequence[str] | None, resamples: int, output: Path | None) -> int:
    """`compare A B`."""
    rows, about = comparison.compare_folders(first, second, resamples=resamples)
    names = names or [report.name_of(folders.load(folder)) for folder in (first, second)]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    comparison.write(rows, names, output or second / "results" / "compared", about)
    sys.stdout.write(comparison.table(rows, names))
    if alone := about["measured_on_one_only"]:
        log.warning("measured on one folder only, and left out: %s", ", ".join(alone))
    return 0


def measure(paths: Sequence[Path], *, block: int | None, output: Path | None) -> int:
    """`measure PATH…`: a line of JSON per video; for a prepared folder `results/measured.json` and a table."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    if output is not None and (twice := [name for name in names if names.count(name) > 1]):
        raise ValueError(f"{twice[0]} is the name of several, whose pictures would replace each other; measure them one by one")
    if block is not None and block < 1:
        raise ValueError(f"--block {block}: at least one latent frame")
    for path, name in zip(paths, names):
        if path.is_dir():
            prepared = folders.load(path)
            folders.check_or_raise(path, prepared)
            if block is not None:
                raise ValueError(f"{path} says itself how its videos were made; leave out --block")
            measure_folder(path, prepared, pictures=None if output is None else output / name)
        else:
            found = pixel_report.measure_file(path, pixel_report.prompts_beside(path), block=block or 3, pictures=output)
            line = {"video": str(path)} | {name: None if math.isnan(value) else round(value, 5) for name, value in found._asdict().items()}
            sys.stdout.write(json.dumps(line) + "\n")
    return 0


def measure_folder(folder: Path, prepared: Prepared, *, pictures: Path | None = None) -> None:
    """Pixel metrics of all videos of a prepared folder."""

    def measure(planned: PlannedVideo) -> dict[str, float]:
        path, prompts = folders.video_path(folder, planned.name), prepared.prompt_starts(planned.entry)
        found = pixel_report.measure_file(path, prompts, block=prepared.block, pictures=pictures)._asdict()
        del found["images"]
        return {"temporal_flickering_of_all": found.pop("temporal_flickering"), **found}  # VBench's own is of five videos per prompt

    found = values.collect(prepared, measure)
    found = {metric: of for metric, of in found.items() if not all(math.isnan(value) for value in of.values())}
    values.write(folder, "measured", found, {**values.measured_on(folder, prepared), "block": prepared.block})
    sys.stdout.write(report.values_report(folder, "measured")[0])


def rewrite_prompts(*, prompts: Path | None, environment: Path | None, **writing: Any) -> int:
    """`rewrite`; `writing`: what `rewrite.run` reads."""
    if prompts is not None:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        lines = [one["prompt_en"] for one in suites.read_full_info(default_environment(environment).full_info)]
    log.info(rewrite.run(argparse.Namespace(**writing), lines))
    return 0
