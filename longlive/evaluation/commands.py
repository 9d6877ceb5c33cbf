"""What the commands of `python -m longlive.evaluation` do, given what the command line says; each returns an exit status."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longlive import config as settings
from longlive.evaluation import compare as comparison
from longlive.evaluation import folder as folders
from longlive.evaluation import oracle_report, report, rewrite, suites, values, vbench_run, weightless
from longlive.evaluation import prepare as preparation
from longlive.evaluation.clip_score import IMAGES_A_SECOND, ClipScore, stretches
from longlive.evaluation.folder import Prepared
from longlive.evaluation.suites import find_suite, names_of
from longlive.evaluation.vbench_environment import VBenchEnvironment, default_environment
from longlive.evaluation.vbench_score import PUBLISHED, PUBLISHED_LONG, read_results, table
from longlive.evaluation.vbench_score import score as score_of
from longlive.files import file_digest
from longlive.parallel.world import choose_device, get_world
from longlive.provenance import commit, hardware, versions

log = logging.getLogger(__name__)

OWN_NAME = {"temporal_flickering": "temporal_flickering_of_all"}  # vbench's own is of five videos a prompt
CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


def environment_of(arguments: argparse.Namespace) -> VBenchEnvironment:
    return default_environment() if arguments.environment is None else VBenchEnvironment(arguments.environment)


def prepare(arguments: argparse.Namespace) -> int:
    """`prepare SUITE`."""
    environment = environment_of(arguments)
    full = suites.prompts_of(
        arguments.suite, full_info=lambda: environment.full_info, prompts=arguments.prompts, rewritten=arguments.rewritten
    )
    part = {"dimensions": arguments.dimensions, "limit": arguments.limit, "samples": arguments.samples}
    prompts = suites.part_of(full, **part)
    if prompts.own and arguments.suite == "switch":
        log.info("of every script the first two prompts are shown, five seconds each, whatever %s says", arguments.prompts)
    if arguments.videos is not None:
        if get_world().size > 1:
            raise ValueError(f"{get_world().size} processes: --videos wants one")
        if arguments.settings or arguments.config or arguments.rewritten:
            raise ValueError("--videos takes videos as they are; leave out --config, --rewritten and settings")
        name = arguments.name or arguments.videos.resolve().name
        preparation.adopt(arguments.videos, arguments.suite, prompts, arguments.output, part=part, name=name)
        return 0
    if arguments.name is not None:
        raise ValueError("--name belongs to --videos")
    said = {word.partition("=")[0] for word in arguments.settings}
    preparation.check_said(said)
    config = settings.load(settings.InferenceConfig, arguments.config, arguments.settings, {"prompts": None, "switch_frame_indices": None})
    if not said & {"seconds", "num_latent_frames"}:  # the suite says how long a video is, unless the command line does
        config = dataclasses.replace(config, seconds=None, num_latent_frames=None)
    preparation.prepare(config, arguments.suite, prompts, arguments.output, part=part, rewritten=_rewritten(arguments.rewritten))
    return 0


def _rewritten(path: Path | None) -> dict[str, Any] | None:
    """What is known of a file of rewritten prompts: its digest, and what our own command left beside it."""
    if path is None:
        return None
    beside = path.with_name(f"{path.name}.json")
    made = folders.read_json(beside) if beside.is_file() else None
    return {"file": path.name, "sha256": file_digest(path), "made": made}


def run(arguments: argparse.Namespace) -> int:
    """`run FOLDER`; status 1 when something could not be measured."""
    folder: Path = arguments.folder
    prepared = folders.load(folder)
    kind = find_suite(prepared.suite).measured_by
    options = vbench_run.Options(
        clip_lengths=arguments.clip_lengths,
        static_filter=arguments.static_filter,
        slow_fast=arguments.slow_fast,
        device=arguments.device,
        again=arguments.again,
    )
    asked = [] if kind == "oracle" and arguments.dimensions is None else vbench_run.dimensions_of(prepared, arguments.dimensions)
    vbench_run.check_options(prepared, asked, options)
    if arguments.clip != CLIP and (kind != "interactive" or arguments.dimensions is not None):
        raise ValueError("--clip is for the CLIP score, which the suites interactive and switch have when no --dimensions are chosen")
    if not asked and (arguments.device != "auto" or arguments.environment is not None):
        raise ValueError("--device and --environment are for vbench, which measures nothing here; leave them out, or choose --dimensions")
    complete = True
    if kind == "oracle":
        _check(folder, prepared)
        run_oracle(folder, prepared)
        measure_folder(folder, prepared)
    if kind == "interactive" and arguments.dimensions is None:
        complete = run_clip(folder, prepared, arguments)
    if kind != "oracle" or arguments.dimensions is not None:
        outcomes = vbench_run.run(folder, environment_of(arguments), dimensions=arguments.dimensions, options=options)
        left = [dimension for dimension, average in outcomes.items() if average is None]
        if left:
            log.warning(
                "%d of %d dimensions could not be measured: %s; the same command goes on with them",
                len(left),
                len(outcomes),
                ", ".join(left),
            )
        complete = complete and not left
    return 0 if complete else 1


def _check(folder: Path, prepared: Prepared) -> None:
    if (problems := folders.check(folder, prepared)).any:
        raise ValueError(f"{folder / 'videos'}:\n{problems}")


def _made_with(folder: Path, prepared: Prepared) -> dict[str, Any]:
    videos = folders.digest_of_videos(folder, prepared.names)
    return {"videos_digest": videos, "versions": versions(), "commit": commit(), "hardware": hardware()}


def run_oracle(folder: Path, prepared: Prepared) -> None:
    """The miniature's oracle on all videos: values, and adherence over time as a plot."""
    paths = {name: folders.video_path(folder, name) for name in prepared.names}
    found, adherence = oracle_report.report(paths, prepared)
    over_time = [[[None if math.isnan(x) else round(x, 4) for x in second] for second in row] for row in adherence.tolist()]
    values.write(folder, "oracle", found, {**_made_with(folder, prepared), "adherence_over_seconds": over_time})
    report.oracle_plot(adherence, prepared, folder / "results" / "adherence.png")


def run_clip(folder: Path, prepared: Prepared, arguments: argparse.Namespace) -> bool:
    """CLIP scores of all stretches of all videos; whether they could be measured."""
    _check(folder, prepared)
    device = choose_device(arguments.device, get_world())
    try:
        clip = ClipScore(arguments.clip, device=device)
    except ValueError as error:
        log.warning("the CLIP score cannot be measured: %s", error)
        return False
    about = {"clip": arguments.clip, "clip_weights": clip.digest, "images_a_second": IMAGES_A_SECOND, **_made_with(folder, prepared)}
    before = values.read(folder, "clip_score")
    if before is not None and not arguments.again and all(before[1].get(key) == about[key] for key in ("clip_weights", "videos_digest")):
        log.info("CLIP score: measured already")
        return True
    found: dict[str, dict[str, float]] = {}
    cut_off = 0
    for entry in tqdm(prepared.entries, unit="script", mininterval=1):
        parts = stretches(entry.script.prompts, entry.script.durations or ())
        cut_off += sum(clip.num_tokens(part.prompt) > clip.max_tokens for part in parts)
        for name in names_of([entry]):
            for part, value in zip(parts, clip.of_video(folders.video_path(folder, name), parts)):
                found.setdefault(f"clip_{part.begin:g}_{part.end:g}", {})[name] = value
    if cut_off:
        log.info("CLIP reads %d tokens: of %d prompts it did not see the end", clip.max_tokens, cut_off)
    values.write(folder, "clip_score", found, {**about, "prompts_cut_off": cut_off, "device": str(device)})
    return True


def score(arguments: argparse.Namespace) -> int:
    """`score FOLDER`: of a prepared one, or of one with results of vbench; status 2 when there is no Total."""
    if (arguments.folder / "prepared.json").exists():
        if arguments.long:
            raise ValueError(f"{arguments.folder} says itself which benchmark it belongs to; leave out --long")
        text, problems = report.write(arguments.folder, name=arguments.name)
        sys.stdout.write(text)
        for problem in problems:
            log.error("error: %s", problem)
        return 2 if problems else 0
    results = read_results(arguments.folder)
    published = PUBLISHED_LONG if arguments.long else PUBLISHED
    sys.stdout.write(table(results, name=arguments.name or "this run", published=published))
    totals = {name: round(value, 2) for name, value in score_of(results)._asdict().items()}
    sys.stdout.write(json.dumps(totals | {"dimensions": results}) + "\n")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """`compare A B`."""
    first, second = arguments.first, arguments.second
    rows, about = comparison.compare_folders(first, second, resamples=arguments.resamples)
    names = arguments.names or [report.name_of(folders.load(folder)) for folder in (first, second)]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    comparison.write(rows, names, arguments.output or second / "results" / "compared", about)
    sys.stdout.write(comparison.table(rows, names))
    if alone := about["measured_on_one_only"]:
        log.warning("measured on one folder only, and left out: %s", ", ".join(alone))
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """`measure PATH…`: a line of JSON a video; of a prepared folder `results/measured.json` too."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in arguments.paths]
    if arguments.output is not None and (twice := [name for name in names if names.count(name) > 1]):
        raise ValueError(f"{twice[0]} is the name of several, and their pictures would lie over each other; measure them one by one")
    if arguments.block is not None and arguments.block < 1:
        raise ValueError(f"--block {arguments.block}: at least one latent frame")
    for path, name in zip(arguments.paths, names):
        if path.is_dir():
            prepared = folders.load(path)
            _check(path, prepared)
            if arguments.block is not None:
                raise ValueError(f"{path} says itself how its videos were made; leave out --block")
            measure_folder(path, prepared, pictures=None if arguments.output is None else arguments.output / name)
        else:
            block = 3 if arguments.block is None else arguments.block
            found = weightless.measure_file(path, weightless.prompts_beside(path), block=block, pictures=arguments.output)
            line = {"video": str(path)} | {name: None if math.isnan(value) else round(value, 5) for name, value in found._asdict().items()}
            sys.stdout.write(json.dumps(line) + "\n")
    return 0


def measure_folder(folder: Path, prepared: Prepared, *, pictures: Path | None = None) -> None:
    """Measures without weights of all videos of a prepared folder."""
    found: dict[str, dict[str, float]] = {}
    for entry in tqdm(prepared.entries, unit="prompt", mininterval=1):
        prompts = weightless.begun(prepared.schedule_of(entry).cues)
        for name in names_of([entry]):
            measured = weightless.measure_file(folders.video_path(folder, name), prompts, block=prepared.block, pictures=pictures)
            for metric, value in measured._asdict().items():
                if metric != "images":
                    found.setdefault(OWN_NAME.get(metric, metric), {})[name] = value
    found = {metric: of for metric, of in found.items() if not all(math.isnan(value) for value in of.values())}
    values.write(folder, "measured", found, {**_made_with(folder, prepared), "block": prepared.block})
    text, _ = report.values_report(folder, ("measured",))
    sys.stdout.write(text)


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rewrite`."""
    parser.add_argument("--prompts", type=Path, metavar="TXT", help="short prompts, one a line (default: VBench's list)")
    rewrite.add_arguments(parser)


def rewrite_prompts(arguments: argparse.Namespace) -> int:
    """`rewrite`."""
    if arguments.prompts is not None:
        prompts = [line.strip() for line in arguments.prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        prompts = [one["prompt_en"] for one in suites.read_full_info(environment_of(arguments).full_info)]
    log.info(rewrite.run(arguments, prompts))
    return 0
