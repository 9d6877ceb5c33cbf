"""Measures the videos of a folder with the real `vbench`, one process per dimension; a run that was stopped can be continued.

The dimensions are computed by vbench's own code, in its own environment (`vbench_worker.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import queue
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from longlive.evaluation.prepared import Prepared, check_videos, digest_of_videos, remove_if_empty, video_path
from longlive.evaluation.suites import SAMPLES, Entry, names_of, read_full_info
from longlive.evaluation.vbench_environment import VBenchEnvironment, cache_folder, default_environment
from longlive.evaluation.vbench_score import DIMENSIONS, check_dimensions, read_result
from longlive.files import digest_of, read_json, write_json

log = logging.getLogger(__name__)

WORKER = Path(__file__).parent / "vbench_worker.py"
CLIP_SECONDS = dict.fromkeys(DIMENSIONS, 2) | {"human_action": 10, "temporal_style": 10, "overall_consistency": 10}  # VBench-Long
INTERACTIVE = ("subject_consistency", "background_consistency", "motion_smoothness", "aesthetic_quality", "imaging_quality")
OF_ANY_VIDEO = (*INTERACTIVE, "dynamic_degree", "temporal_flickering", "overall_consistency")  # they need nothing beyond the prompt
MAY_MEASURE_FEWER = {"color"}  # vbench skips videos in which it does not find the object
COMPARES_CLIPS = {"subject_consistency", "background_consistency"}
CLIP_TABLES = ("slow_fast_params.yaml", "subject_mapping_table.yaml", "background_mapping_table.yaml")


class Options(NamedTuple):
    """How to measure.

    Attributes:
        clip_lengths: of VBench-Long. "intended": two seconds, ten for human action, temporal style and overall consistency, as in its
            configuration. "released": as its program reads that, the longest of all dimensions that a prompt counts for, which gives
            aesthetic and imaging quality ten seconds (VBench issue 186).
        static_filter: for temporal flickering count only videos that RAFT finds still, the first five per prompt.
        slow_fast: folder of VBench-Long's tables (`vbench2_beta_long/configs` of its repository; they are not in the package), to compare
            clips with each other for subject and background consistency; None: within clips only, as its program does by default.
        device: "auto", "cpu", "cuda" or "cuda:0".
        environment: folder of vbench's environment; None: the default one.
        again: measure dimensions again that are already measured.
    """

    clip_lengths: Literal["intended", "released"] = "intended"
    static_filter: bool = False
    slow_fast: Path | None = None
    device: str = "auto"
    environment: Path | None = None
    again: bool = False


def dimensions_of(prepared: Prepared, wanted: Sequence[str] | None) -> list[str]:
    """The dimensions to measure: those asked for, or all that the suite has. Raises ValueError for one that its prompts do not allow."""
    own_list = prepared.benchmark.has_vbench_list
    possible = {d for entry in prepared.entries for d in entry.dimensions} if own_list else set(OF_ANY_VIDEO)
    if wanted is None:
        return [name for name in DIMENSIONS if name in possible and (own_list or name in INTERACTIVE)]
    check_dimensions(wanted)
    if impossible := [name for name in wanted if name not in possible]:
        why = "no video was prepared for it" if own_list else "its prompts are VBench's own"
        names = ", ".join(name for name in DIMENSIONS if name in possible)
        raise ValueError(f"{impossible[0]} cannot be measured on this folder: {why}; possible are {names}")
    return list(dict.fromkeys(wanted))


def entries_for(prepared: Prepared, dimension: str) -> list[Entry]:
    """The prompts that count for a dimension."""
    return [entry for entry in prepared.entries if dimension in entry.dimensions or not prepared.benchmark.has_vbench_list]


def check_options(prepared: Prepared, dimensions: Sequence[str], options: Options) -> None:
    """Raises ValueError for an option that would change nothing, and for a folder of tables that lacks one of VBench-Long's."""
    if not dimensions and (options.device != "auto" or options.environment is not None):
        raise ValueError("--device and --environment are for vbench, which measures nothing here; leave them out, or choose --dimensions")
    if options.static_filter and "temporal_flickering" not in dimensions:
        raise ValueError("the static filter is for temporal_flickering, which is not among the dimensions to measure")
    if options.clip_lengths != "intended" and prepared.benchmark.measured_by != "vbench_long":
        raise ValueError("clip lengths belong to the suite long")
    if options.slow_fast is not None:
        if not prepared.benchmark.cuts_clips or not COMPARES_CLIPS & set(dimensions):
            raise ValueError(f"--slow-fast is for {' and '.join(sorted(COMPARES_CLIPS))} of VBench-Long, which are not measured here")
        if missing := [name for name in CLIP_TABLES if not (options.slow_fast / name).is_file()]:
            raise ValueError(f"{options.slow_fast} has no {missing[0]}; give vbench2_beta_long/configs of VBench's repository")


def check_folder(folder: Path, prepared: Prepared, dimensions: Sequence[str], environment: VBenchEnvironment) -> None:
    """Raises ValueError when videos of these dimensions are missing or broken, or VBench's list is not the one they were prepared for."""
    if prepared.benchmark.has_vbench_list:
        now = digest_of(read_full_info(environment.full_info))
        if now != prepared.prompt_list["digest"]:
            raise ValueError(
                f"the prompt list changed since the videos were prepared: {environment.full_info} has the digest {now}, the videos were "
                f"prepared for {prepared.prompt_list['digest']}; install the vbench of that time, or prepare the videos again"
            )
    if prepared.benchmark.cuts_clips and COMPARES_CLIPS & set(dimensions):
        shortest = min(planned.num_frames for planned in prepared.videos) / prepared.fps
        if shortest <= 2:
            raise ValueError(f"videos of {shortest:.1f} s are one clip; VBench-Long compares clips of 2 s: prepare longer ones")
    counted = {name for dimension in dimensions for name in names_of(entries_for(prepared, dimension))}
    check_videos(folder, prepared, counted=counted)


def request_for(folder: Path, prepared: Prepared, dimension: str, options: Options) -> dict[str, Any]:
    """The worker's request for a dimension."""
    clips, filtered = prepared.benchmark.cuts_clips, options.static_filter and dimension == "temporal_flickering"
    entries = []
    for entry in entries_for(prepared, dimension):
        videos = [str(video_path(folder, name).absolute()) for name in names_of([entry])]
        if not clips and not filtered:
            videos = videos[:SAMPLES]  # as vbench does: the others are there to be filtered
        request: dict[str, Any] = {"prompt_en": entry.name, "dimension": [dimension], "video_list": videos}
        if entry.auxiliary:
            request["auxiliary_info"] = dict(entry.auxiliary)
        if clips and options.clip_lengths == "released" and entry.dimensions:
            request["clip_seconds"] = max(CLIP_SECONDS[name] for name in entry.dimensions)
        elif clips:
            request["clip_seconds"] = CLIP_SECONDS[dimension] if prepared.benchmark.has_vbench_list else 2
        entries.append(request)
    slow_fast = None if options.slow_fast is None or not clips else str(options.slow_fast.absolute())
    return {"dimension": dimension, "clips": clips, "static_filter": filtered, "slow_fast": slow_fast, "entries": entries}


def inputs_of(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result: with the same inputs a dimension is measured once. Raises ValueError when a video is missing."""
    names = [Path(path).stem for entry in request["entries"] for path in entry["video_list"]]
    return {
        "dimension": request["dimension"],
        "videos": len(names),
        "videos_digest": digest_of_videos(folder, names),
        "clip_seconds": sorted({entry["clip_seconds"] for entry in request["entries"]}) if request["clips"] else None,
        "static_filter": request["static_filter"],
        "slow_fast": request["slow_fast"],
    }


def results_folder(folder: Path) -> Path:
    return folder / "results" / "vbench"


def result_path(folder: Path, dimension: str) -> Path:
    return results_folder(folder) / f"{dimension}_eval_results.json"


def read_run(folder: Path, dimension: str) -> dict[str, Any]:
    """How a dimension was measured; empty when we did not measure it."""
    path = results_folder(folder) / f"{dimension}_run.json"
    return read_json(path) if path.exists() else {}


def is_stale(folder: Path, prepared: Prepared, dimension: str) -> bool:
    """Whether a dimension was measured on other videos than the present ones."""
    before = read_run(folder, dimension)
    request = request_for(folder, prepared, dimension, Options(static_filter=bool(before.get("static_filter"))))
    try:
        return bool(before) and inputs_of(folder, request)["videos_digest"] != before["videos_digest"]
    except ValueError:
        return True


def measured_already(folder: Path, inputs: Mapping[str, Any]) -> float | None:
    """The average in the folder when it was measured with the same inputs, else None."""
    dimension = inputs["dimension"]
    try:
        before = read_run(folder, dimension)
        same = all(before.get(name) == value for name, value in inputs.items())
        return read_result(result_path(folder, dimension))[dimension].average if same else None
    except (ValueError, KeyError):
        return None


def run(folder: Path, prepared: Prepared, dimensions: Sequence[str], options: Options) -> dict[str, float | None]:
    """Measure; returns averages by dimension. One that lacks weights, or fails, is None: the log says why, and the others are measured.

    `dimensions` and `options` as `dimensions_of` and `check_options` allow them. Raises ValueError when videos are missing or broken, or
    the environment is.
    """
    environment = default_environment(options.environment)
    about = environment.describe()
    check_folder(folder, prepared, dimensions, environment)
    devices = devices_of(options.device, about["gpus"])
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def measure(dimension: str) -> float | None:
        request = request_for(folder, prepared, dimension, options)
        inputs = inputs_of(folder, request)
        if not options.again and (known := measured_already(folder, inputs)) is not None:
            log.info("%s: measured already, %.4f", dimension, known)
            return known
        filters = {"slow_fast": bool(request["slow_fast"]), "static_filter": request["static_filter"]}
        if missing := environment.lacking(dimension, about["versions"], **filters):
            log.warning("%s cannot be measured; it lacks\n  %s", dimension, "\n  ".join(missing))
            return None
        device = free.get()
        try:
            return _measure(folder, environment, request, inputs, about, device)
        except ValueError as error:
            log.error("%s: %s", dimension, error)
            return None
        finally:
            free.put(device)

    with ThreadPoolExecutor(max_workers=len(devices)) as workers:
        try:
            return dict(zip(dimensions, workers.map(measure, dimensions)))
        except BaseException:  # an interruption reaches this thread only, and the pool would wait for hours
            for process in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    if str(WORKER) in process.cmdline():
                        process.terminate()
            raise


def devices_of(name: str, gpus: Sequence[str]) -> list[str]:
    """The devices that measure at the same time: all GPUs that vbench's torch sees, or the CPU. Raises ValueError for unknown ones."""
    every = [f"cuda:{index}" for index in range(len(gpus))]
    choices = {"cpu": ["cpu"], "auto": every or ["cpu"], **{gpu: [gpu] for gpu in every}} | ({"cuda": every} if every else {})
    if name in choices:
        return choices[name]
    advice = "" if gpus else "; choose cpu, or another VBENCH_TORCH"
    raise ValueError(
        f"there is no device {name!r}: choose auto, cpu, cuda or cuda:0, cuda:1 …; vbench's torch sees {len(gpus)} GPUs{advice}"
    )


def _measure(
    folder: Path, environment: VBenchEnvironment, request: dict[str, Any], inputs: dict[str, Any], about: dict[str, Any], device: str
) -> float:
    """Measure one dimension in another process; returns the average. Raises ValueError when it fails or measures too few videos."""
    dimension = request["dimension"]
    work, logged = folder / "work" / dimension, results_folder(folder) / f"{dimension}.log"
    logged.parent.mkdir(parents=True, exist_ok=True)
    (work / "out").mkdir(parents=True, exist_ok=True)
    request = request | {
        "device": device.split(":")[0],  # the process sees only one GPU
        "full_info": str(environment.full_info.absolute()),
        "work": str((work / "clips").absolute()),
        "output": str((work / "out").absolute()),
    }
    write_json(work / "request.json", request)
    log.info("%s: %d videos on %s, %s", dimension, inputs["videos"], device, logged)
    start = time.perf_counter()
    with logged.open("w", encoding="utf-8") as output:
        command = [str(environment.python), str(WORKER), str(work / "request.json")]
        variables = {**os.environ, **visible(device), "VBENCH_CACHE_DIR": str(cache_folder())}
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False).returncode
    if status:
        raise ValueError(f"vbench stopped with status {status}: {_last_line(logged)}")
    result = work / "out" / f"{dimension}_eval_results.json"
    average, videos = read_result(result)[dimension]
    fewer = inputs["static_filter"] or dimension in MAY_MEASURE_FEWER
    if len(videos) > inputs["videos"] or (len(videos) < inputs["videos"] and not fewer):
        raise ValueError(f"vbench measured {len(videos)} of {inputs['videos']} videos; {logged} says why")
    details = {"environment": about, "device": device, "seconds": round(time.perf_counter() - start, 1), "measured": len(videos)}
    details["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    os.replace(result, result_path(folder, dimension))
    write_json(results_folder(folder) / f"{dimension}_run.json", inputs | details)
    shutil.rmtree(work)
    remove_if_empty(work.parent)
    log.info("%s: %.4f", dimension, average)
    return average


def visible(device: str) -> dict[str, str]:
    """Environment variables by which a process sees only this GPU, of those that we see."""
    if ":" not in device:
        return {}
    index, seen = int(device.partition(":")[2]), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[index].strip() if seen else str(index)}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'no output'} ({path})"
