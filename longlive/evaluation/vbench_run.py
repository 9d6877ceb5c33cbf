"""Has the real `vbench` measure the videos of a folder, a process a dimension, and goes on where a run was stopped.

Knows nothing of how a dimension is computed: that is vbench's own code, in its own environment (`vbench_worker.py`).
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import queue
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longlive.evaluation import folder as folders
from longlive.evaluation.folder import Prepared
from longlive.evaluation.suites import Entry, find_suite, names_of, read_full_info
from longlive.evaluation.vbench_environment import VBenchEnvironment, cache_folder, lacking
from longlive.evaluation.vbench_score import DIMENSIONS
from longlive.files import digest_of

log = logging.getLogger(__name__)

WORKER = Path(__file__).parent / "vbench_worker.py"
CLIP_SECONDS = dict.fromkeys(DIMENSIONS, 2) | {"human_action": 10, "temporal_style": 10, "overall_consistency": 10}  # VBench-Long
INTERACTIVE = ("subject_consistency", "background_consistency", "motion_smoothness", "aesthetic_quality", "imaging_quality")
OF_ANY_VIDEO = (*INTERACTIVE, "dynamic_degree", "temporal_flickering", "overall_consistency")  # nothing beyond the prompt is wanted

MAY_MEASURE_FEWER = {"color"}  # vbench leaves out videos in which it does not find the object
COMPARES_CLIPS = {"subject_consistency", "background_consistency"}

ClipLengths = Literal["intended", "released"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How it is measured.

    Attributes:
        clip_lengths: of VBench-Long. "intended": two seconds, ten for human action, temporal style and overall consistency, as its
            configuration says. "released": what its program makes of that, the longest of all dimensions that a prompt counts for, which
            gives aesthetic and imaging quality ten seconds (VBench issue 186).
        static_filter: for temporal flickering count only videos that RAFT finds still, the first five of a prompt.
        slow_fast: folder of VBench-Long's tables (`vbench2_beta_long/configs` of its repository; they are not in the package) for a part of
            subject and background consistency that compares clips with each other; None: within clips only, as its program does by default.
        device: "auto", "cpu", "cuda" or "cuda:0".
        again: also dimensions that are measured already.
    """

    clip_lengths: ClipLengths = "intended"
    static_filter: bool = False
    slow_fast: Path | None = None
    device: str = "auto"
    again: bool = False


def dimensions_of(prepared: Prepared, wanted: Sequence[str] | None) -> list[str]:
    """The dimensions to be measured: those asked for, or all that the suite has. Raises ValueError for what its prompts cannot tell."""
    suite = find_suite(prepared.suite)
    by_vbench = suite.measured_by.startswith("vbench")
    possible = [name for name in DIMENSIONS if name in ({d for e in prepared.entries for d in e.dimensions} if by_vbench else OF_ANY_VIDEO)]
    if wanted is None:
        return possible if by_vbench else [name for name in possible if name in INTERACTIVE]
    for name in wanted:
        if name not in DIMENSIONS:
            raise ValueError(f"{name} is no dimension of VBench; known are {', '.join(DIMENSIONS)}")
        if name not in possible:
            why = "no video was prepared for it" if by_vbench else "its prompts are VBench's own"
            raise ValueError(f"{name} cannot be measured on this folder: {why}; possible are {', '.join(possible)}")
    return list(dict.fromkeys(wanted))


def entries_for(prepared: Prepared, dimension: str) -> list[Entry]:
    """The prompts that count for a dimension."""
    if find_suite(prepared.suite).measured_by.startswith("vbench"):
        return [entry for entry in prepared.entries if dimension in entry.dimensions]
    return list(prepared.entries)


def check_folder(folder: Path, prepared: Prepared, dimensions: Sequence[str], environment: VBenchEnvironment) -> None:
    """Raises ValueError when videos of these dimensions are missing or broken, or VBench's list is not the one they were prepared for."""
    if find_suite(prepared.suite).measured_by.startswith("vbench"):
        now = digest_of(read_full_info(environment.full_info))
        if now != prepared.prompt_list["digest"]:
            raise ValueError(
                f"the prompt list changed since the videos were prepared: {environment.full_info} has the digest {now}, "
                f"the videos were made for {prepared.prompt_list['digest']}; install the vbench of then, or prepare anew"
            )
    if find_suite(prepared.suite).measured_by in ("vbench_long", "interactive"):
        shortest = min(prepared.timing.num_frames(prepared.frames_of(entry)) for entry in prepared.entries) / prepared.fps
        if shortest <= 2 and COMPARES_CLIPS & set(dimensions):
            raise ValueError(f"videos of {shortest:.1f} s are one clip; VBench-Long compares clips of 2 s: prepare longer ones")
    problems = folders.check(folder, prepared)
    counted = {f"{name}.mp4" for dimension in dimensions for name in names_of(entries_for(prepared, dimension))}
    problems = problems._replace(
        missing=[name for name in problems.missing if name in counted],
        unreadable=[name for name in problems.unreadable if name in counted],
    )
    if problems.any:
        raise ValueError(f"{folder / 'videos'}:\n{problems}\n`prepare` makes what is missing or broken; other files belong elsewhere")


def clip_seconds(prepared: Prepared, entry: Entry, dimension: str, lengths: ClipLengths) -> int:
    """Of the clips that VBench-Long cuts a video of this entry into."""
    if lengths == "released" and entry.dimensions:
        return max(CLIP_SECONDS[name] for name in entry.dimensions)
    return CLIP_SECONDS[dimension] if find_suite(prepared.suite).measured_by == "vbench_long" else CLIP_SECONDS["subject_consistency"]


def request_for(folder: Path, prepared: Prepared, dimension: str, options: Options) -> dict[str, Any]:
    """What the worker is asked."""
    clips = find_suite(prepared.suite).measured_by in ("vbench_long", "interactive")
    entries = []
    for entry in entries_for(prepared, dimension):
        videos = [str(folders.video_path(folder, name).absolute()) for name in names_of([entry])]
        filtered = dimension == "temporal_flickering" and options.static_filter
        if not clips and not filtered:
            videos = videos[:5]  # as vbench does: the further ones are there to be filtered
        one: dict[str, Any] = {"prompt_en": entry.name, "dimension": [dimension], "video_list": videos}
        if entry.auxiliary:
            one["auxiliary_info"] = dict(entry.auxiliary)
        if clips:
            one["clip_seconds"] = clip_seconds(prepared, entry, dimension, options.clip_lengths)
        entries.append(one)
    return {
        "dimension": dimension,
        "clips": clips,
        "static_filter": options.static_filter and dimension == "temporal_flickering",
        "slow_fast": None if options.slow_fast is None or not clips else str(options.slow_fast.absolute()),
        "entries": entries,
    }


def asked(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the answer: a dimension measured with the same is not measured again."""
    paths = [Path(path) for entry in request["entries"] for path in entry["video_list"]]
    seconds = sorted({entry["clip_seconds"] for entry in request["entries"]}) if request["clips"] else None
    return {
        "dimension": request["dimension"],
        "videos": len(paths),
        "videos_digest": folders.digest_of_videos(folder, [path.stem for path in paths]),
        "clip_seconds": seconds,
        "static_filter": request["static_filter"],
        "slow_fast": request["slow_fast"],
    }


def read_result(path: Path, dimension: str) -> tuple[float, dict[str, float]]:
    """Average of a result of vbench, and the value of every video by its name; of VBench-Long the mean over its clips, which it lists one
    by one.

    Raises:
        ValueError: when it is no such result, or not a number.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[dimension]
        average, listed = float(found[0]), found[-1]
        values: dict[str, list[float]] = {}
        for one in listed:
            values.setdefault(Path(one["video_path"]).stem, []).append(float(one["video_results"]))
    except (OSError, json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of vbench for {dimension}: {error!r}") from error
    if not math.isfinite(average) or not values:
        raise ValueError(f"{path}: {dimension} is {average} of {len(values)} videos; vbench could not measure them")
    return average, {name: sum(of) / len(of) for name, of in values.items()}


def results_folder(folder: Path) -> Path:
    return folder / "results" / "vbench"


def read_run(folder: Path, dimension: str) -> dict[str, Any]:
    """How a dimension was measured; empty when it was not measured by us."""
    path = results_folder(folder) / f"{dimension}_run.json"
    return folders.read_json(path) if path.exists() else {}


def is_stale(folder: Path, prepared: Prepared, dimension: str) -> bool:
    """Whether a dimension was measured on other videos than are there now."""
    before = read_run(folder, dimension)
    request = request_for(folder, prepared, dimension, Options(static_filter=bool(before.get("static_filter"))))
    try:
        return bool(before) and asked(folder, request)["videos_digest"] != before["videos_digest"]
    except ValueError:
        return True


def measured_already(folder: Path, question: Mapping[str, Any]) -> float | None:
    """The average that stands in the folder for the same question; None."""
    dimension = question["dimension"]
    results = results_folder(folder)
    try:
        before = read_run(folder, dimension)
        if any(before.get(name) != value for name, value in question.items()):
            return None
        return read_result(results / f"{dimension}_eval_results.json", dimension)[0]
    except (FileNotFoundError, json.JSONDecodeError, ValueError):
        return None


def run(
    folder: Path, environment: VBenchEnvironment, *, dimensions: Sequence[str] | None = None, options: Options | None = None
) -> dict[str, float | None]:
    """Measure; averages by dimension. One that lacks weights, or fails, is None, the log says why, and the others are measured.

    Raises:
        ValueError: when videos or the environment are not as they must be.
    """
    options = options or Options()
    prepared = folders.load(folder)
    wanted = dimensions_of(prepared, dimensions)
    check_options(prepared, wanted, options)
    about = environment.describe()
    check_folder(folder, prepared, wanted, environment)
    devices = devices_of(options.device, about["gpus"])
    free: queue.Queue[str] = queue.Queue()
    for device in devices:
        free.put(device)
    running: set[subprocess.Popen[bytes]] = set()

    def one(dimension: str) -> float | None:
        request = request_for(folder, prepared, dimension, options)
        question = asked(folder, request)
        if not options.again and (known := measured_already(folder, question)) is not None:
            log.info("%s: measured already, %.4f", dimension, known)
            return known
        lacks = lacking(
            dimension,
            about["versions"],
            slow_fast=bool(request["slow_fast"]),
            static_filter=request["static_filter"],
        )
        if lacks:
            lines = "\n".join(f"  {line.format(python=environment.python)}" for line in lacks)
            log.warning("%s cannot be measured; it lacks\n%s", dimension, lines)
            return None
        device = free.get()
        try:
            return _measure(folder, environment, request, question, about, device, running)
        finally:
            free.put(device)

    with ThreadPoolExecutor(max_workers=len(devices)) as workers:
        try:
            return dict(zip(wanted, workers.map(one, wanted)))
        except BaseException:  # an interruption reaches this thread only, and the pool would wait for hours
            for process in set(running):
                process.terminate()
            raise


def check_options(prepared: Prepared, dimensions: Sequence[str], options: Options) -> None:
    """Raises ValueError for an option that would change nothing, and when VBench-Long's tables are not where they are said to be."""
    measured_by = find_suite(prepared.suite).measured_by
    if options.static_filter and "temporal_flickering" not in dimensions:
        raise ValueError("the static filter is for temporal_flickering, which is not among what is measured")
    if options.clip_lengths != "intended" and measured_by != "vbench_long":
        raise ValueError("clip lengths belong to the suite long")
    if options.slow_fast is None:
        return
    if measured_by not in ("vbench_long", "interactive") or not COMPARES_CLIPS & set(dimensions):
        raise ValueError(f"--slow-fast is for {' and '.join(sorted(COMPARES_CLIPS))} of VBench-Long, which are not measured here")
    for name in ("slow_fast_params.yaml", "subject_mapping_table.yaml", "background_mapping_table.yaml"):
        if not (options.slow_fast / name).is_file():
            raise ValueError(f"{options.slow_fast} has no {name}; give vbench2_beta_long/configs of VBench's repository")


def devices_of(name: str, gpus: Sequence[str]) -> list[str]:
    """One for every process at a time: all GPUs that vbench's torch sees, or the CPU."""
    if name == "auto":
        return [f"cuda:{index}" for index in range(len(gpus))] or ["cpu"]
    if name == "cpu":
        return ["cpu"]
    every = [f"cuda:{index}" for index in range(len(gpus))]
    if (name != "cuda" and name not in every) or not every:
        there = f"vbench's torch sees {len(gpus)} GPUs" + ("" if gpus else "; choose cpu, or another VBENCH_TORCH")
        raise ValueError(f"device {name!r} is not there: choose auto, cpu, cuda or cuda:0, cuda:1 …; {there}")
    return every if name == "cuda" else [name]


def _measure(
    folder: Path,
    environment: VBenchEnvironment,
    request: dict[str, Any],
    question: dict[str, Any],
    about: dict[str, Any],
    device: str,
    running: set[subprocess.Popen[bytes]],
) -> float | None:
    """Have a process measure one dimension; it is in `running` as long as it lives."""
    dimension = request["dimension"]
    results, work = results_folder(folder), folder / "work" / dimension
    results.mkdir(parents=True, exist_ok=True)
    (work / "out").mkdir(parents=True, exist_ok=True)
    request = request | {
        "device": device.split(":")[0],  # it sees one GPU only
        "full_info": str(environment.full_info.absolute()),
        "work": str((work / "clips").absolute()),
        "output": str((work / "out").absolute()),
        "name": dimension,
    }
    folders.write_json(work / "request.json", request)
    logged = results / f"{dimension}.log"
    log.info("%s: %d videos on %s, %s", dimension, question["videos"], device, logged)
    began = time.perf_counter()
    with logged.open("w", encoding="utf-8") as output:
        command = [str(environment.python), str(WORKER), str(work / "request.json")]
        surroundings = {**os.environ, **visible(device), "VBENCH_CACHE_DIR": str(cache_folder())}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings) as process:
            running.add(process)
            status = process.wait()
            running.discard(process)
    made = work / "out" / f"{dimension}_eval_results.json"
    try:
        if status:
            raise ValueError(f"vbench stopped with status {status}: {_last_line(logged)}")
        average, videos = read_result(made, dimension)
        fewer = question["static_filter"] or dimension in MAY_MEASURE_FEWER
        if len(videos) > question["videos"] or (len(videos) < question["videos"] and not fewer):
            raise ValueError(f"vbench measured {len(videos)} of {question['videos']} videos; {logged} says why")
    except ValueError as error:
        log.error("%s: %s", dimension, error)
        return None
    said = {"environment": about, "device": device, "seconds": round(time.perf_counter() - began, 1)}
    said |= {"measured": len(videos), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    os.replace(made, results / made.name)
    folders.write_json(results / f"{dimension}_run.json", question | said)
    shutil.rmtree(work)
    folders.remove_if_empty(work.parent)
    log.info("%s: %.4f", dimension, average)
    return average


def visible(device: str) -> dict[str, str]:
    """What a process is told in its environment, so that it sees this GPU only, of those that we see."""
    if ":" not in device:
        return {}
    index, seen = int(device.partition(":")[2]), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[index].strip() if seen else str(index)}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'it said nothing'} ({path})"
