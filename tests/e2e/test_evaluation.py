"""The commands of the evaluation as a user gives them: videos of a tiny model, and a stand-in for vbench's package behind the real border
(another interpreter, request and result as files). `-m vbench` has the real one.
"""

import json
import os
import shutil
import socket
import sys
import time

import numpy as np
import psutil
import pytest

from longlive import video
from longlive.evaluation import pixel_metrics, values
from longlive.evaluation.__main__ import main
from longlive.evaluation.prepared import digest_of_video, find_problems, load_prepared, read_record, video_path
from longlive.evaluation.suites import miniature_switches
from longlive.evaluation.vbench_environment import WEIGHTS, default_environment
from longlive.evaluation.vbench_run import devices_of, visible
from longlive.evaluation.vbench_score import DIMENSIONS
from tests.processes import rank_environments, start_program

ONLY_PROMPT = [name for name in DIMENSIONS if name not in ("object_class", "temporal_flickering", "human_action")]
LIST = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a refrigerator", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "refrigerator"}}},
    {"prompt_en": "a person is clay pottery making", "dimension": ["human_action"]},
    {"prompt_en": "a shark is swimming in the ocean.", "dimension": ONLY_PROMPT},
]
STAND_IN = '''
"""What vbench has at the border: class, list of videos as JSON, result as JSON. A video's value follows from its bytes."""
import hashlib, json, os, time
from pathlib import Path


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.output = device, Path(output_path)
        assert Path(full_info_dir).is_file()

    def evaluate(self, videos_path, name, dimension_list, local, mode, imaging_quality_preprocessing_mode):
        (dimension,) = dimension_list
        if dimension == "human_action" and (sleepy := Path(__file__).with_name("sleepy")).exists():
            sleepy.write_text(str(os.getpid()))
            time.sleep(600)
        found = []
        for entry in json.loads(Path(self.build_full_info_json(videos_path, name, dimension_list, mode=mode)).read_text()):
            assert entry["dimension"] == [dimension] and (dimension != "object_class" or entry["auxiliary_info"][dimension])
            for path in entry["video_list"]:
                value = int(hashlib.sha256(Path(path).read_bytes()).hexdigest()[:4], 16) / 2**17 + 0.25
                found.append({"video_path": path, "video_results": value})
        if dimension == "scene" and not Path(__file__).with_name("scene_works").exists():
            raise RuntimeError("scene does not work today")
        average = sum(one["video_results"] for one in found) / len(found)
        lost = dimension == "color" or (dimension == "object_class" and not Path(__file__).with_name("object_class_works").exists())
        result = {dimension: [average, found[1:] if lost else found]}
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(result))
'''


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A folder like that of a virtual environment: an interpreter that finds the stand-in."""
    folder = tmp_path_factory.mktemp("vbench")
    packages = folder / "lib" / "python3.11" / "site-packages"
    torch = "import contextlib\nno_grad, device = contextlib.nullcontext, str\nclass cuda:\n    device_count = staticmethod(lambda: 0)\n"
    for package, source in (("vbench", STAND_IN), ("clip", ""), ("torch", torch)):
        (packages / package).mkdir(parents=True)
        (packages / package / "__init__.py").write_text(source)
    (packages / "vbench" / "utils.py").write_text("import json\ndef save_json(content, path):\n    json.dump(content, open(path, 'w'))\n")
    (packages / "vbench" / "VBench_full_info.json").write_text(json.dumps(LIST))
    (packages / "clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"words")
    (packages / "vbench-0.1.5.dist-info").mkdir()
    (packages / "vbench-0.1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepare(tiny, environment, tmp_path):
    """`prepare` with the tiny model; returns status and folder."""

    def run(suite, *more, folder="videos"):
        settings = [f"model={tiny}", "device=cpu", "scale=1", *(word for word in more if "=" in word)]
        flags = [word for word in more if "=" not in word]
        command = ["prepare", suite, "--output", str(tmp_path / folder), "--environment", str(environment), *flags, *settings]
        return main(command), tmp_path / folder

    return run


def has_weights(cache, *dimensions):
    for dimension in dimensions:
        for path in (cache / weight.path for weight in WEIGHTS if dimension in weight.dimensions):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")


def stamps(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder / "videos").iterdir()}


def test_prepare_makes_each_video_once(prepare, caplog):
    status, folder = prepare("vbench", "num_latent_frames=3", "--samples", "2")
    assert status == 0
    prepared = load_prepared(folder)
    assert sorted(path.stem for path in (folder / "videos").iterdir()) == sorted(prepared.names)
    assert prepared.names[:2] == ["In a still frame, a stop sign-0", "In a still frame, a stop sign-1"] and len(prepared.names) == 8
    assert not find_problems(folder, prepared) and not (folder / "partial").exists()
    record = read_record(folder, "a refrigerator-1")
    assert record["seed"] == 10_001 and record["images"] == 9 and record["prompts"] == [{"image": 0, "prompt": "a refrigerator"}]
    assert prepared.weights and all(len(one["sha256"]) == 64 for one in prepared.weights) and prepared.made_with[0]["versions"]["torch"]
    assert prepared.model["window"] == 9 and prepared.settings["device"] == "cpu" and prepared.prompt_list["samples"] == 2
    before = stamps(folder)
    (folder / "videos" / "a refrigerator-0.mp4").unlink()
    assert prepare("vbench", "num_latent_frames=3", "--samples", "2")[0] == 0
    after = stamps(folder)
    assert after.keys() == before.keys() and [name for name in after if after[name] != before[name]] == ["a refrigerator-0.mp4"]
    assert read_record(folder, "a refrigerator-0")["sha256"] != record["sha256"]
    for more, words in (
        ("seed=3", "seed 0, this is 3"),
        ("num_latent_frames=6", "num_latent_frames 3, this is 6"),
        ("crf=20", "model.crf 18, this is 20"),
    ):
        assert prepare("vbench", "num_latent_frames=3", "--samples", "2", more)[0] == 2 and words in caplog.text
    assert stamps(folder) == after


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_killed_and_gone_on_with(prepare, tiny, environment, tmp_path, num_ranks):
    """Ranks are killed in the middle; one process goes on: nothing is made twice, nothing is lost, and all is as if uninterrupted."""
    videos = ["vbench", "num_latent_frames=3", "--samples", str(num_ranks * 2)]
    whole = prepare(*videos, folder="whole")[1]
    folder = tmp_path / "videos"
    words = ["prepare", "vbench", "--output", folder, "--environment", environment, "--samples", num_ranks * 2]
    words += [f"model={tiny}", "device=cpu", "scale=1", "num_latent_frames=3"]
    told = {"output": tmp_path / "said"}
    ranks = [start_program("longlive.evaluation", *words, **told, environment=rank) for rank in rank_environments(num_ranks)]
    wait_for(lambda: len(list(folder.glob("records/[!.]*.json"))) >= 3 or not any(rank.is_alive() for rank in ranks), 120)
    for rank in ranks:
        rank.kill()
        rank.join()
    finished = {path.stem: stamps(folder)[f"{path.stem}.mp4"] for path in folder.glob("records/[!.]*.json")}
    assert len(finished) >= 3
    assert prepare(*videos)[0] == 0
    prepared = load_prepared(folder)
    assert not find_problems(folder, prepared) and len(prepared.names) == 8 * num_ranks
    assert {name: stamps(folder)[f"{name}.mp4"] for name in finished} == finished
    for name in prepared.names:
        assert digest_of_video(folder, name) == digest_of_video(whole, name)


def test_videos_of_another_program(prepare, environment, tmp_path, caplog):
    made = prepare("vbench", "num_latent_frames=3", "--samples", "1")[1]
    command = ["prepare", "vbench", "--samples", "1", "--environment", str(environment), "--output", str(tmp_path / "adopted")]
    assert main([*command, "--videos", str(made / "videos"), "--name", "theirs"]) == 0
    prepared = load_prepared(tmp_path / "adopted")
    assert prepared.seed is None and prepared.model["model"] == "theirs" and not find_problems(tmp_path / "adopted", prepared)
    assert main([*command, "--videos", str(made / "videos"), "seed=3"]) == 2 and "--videos takes videos as they are" in caplog.text
    links = tmp_path / "links"
    links.mkdir()
    for path in (made / "videos").iterdir():
        (links / path.name).symlink_to(os.path.relpath(path, links))
    assert main([*command[:-1], str(tmp_path / "linked"), "--videos", str(links)]) == 0
    short = ["prepare", "miniature_switches", "--limit", "1", "--output", str(tmp_path / "short"), "--videos", str(tmp_path / "one")]
    (tmp_path / "one").mkdir()
    shutil.copyfile(made / "videos" / "a refrigerator-0.mp4", tmp_path / "one" / f"{miniature_switches().entries[0].name}-0.mp4")
    assert main(short) == 2 and "lies beyond the video's end" in caplog.text
    (made / "videos" / "a refrigerator-0.mp4").unlink()
    assert main([*command, "--videos", str(made / "videos")]) == 2 and "1 of 4 videos are not in" in caplog.text


@pytest.mark.parametrize(
    ("suite", "more", "words"),
    [
        ("vbench", ["prompt=a"], "prompt is given, but the suite decides"),
        ("vbench", ["num_samples=3"], "num_samples is given, but the suite decides"),
        ("vbench", ["num_latent_frames=4"], "cannot be cut into blocks of 3"),
        ("vbench", ["--prompts", "x.jsonl"], "a file of scripts belongs to interactive"),
        ("miniature", ["--dimensions", "scene"], "has no prompts for scene"),
        ("interactive", ["seconds=20"], "lies beyond the video's end"),
    ],
)
def test_mistakes_of_prepare(prepare, caplog, suite, more, words):
    status, folder = prepare(suite, *more)
    assert status == 2 and words in caplog.text and not (folder / "videos").exists()


def test_a_configuration_says_the_model_and_the_suite_the_rest(tiny, environment, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    config = tmp_path / "tiny.yaml"
    decided = "prompts: prompts.txt\nnum_latent_frames: 120\nswitch_frame_indices: [3]\n"
    config.write_text(f"model: {tiny}\n{decided}device: cpu\nscale: 1\nsink: 1\n")
    command = ["prepare", "vbench", "--output", str(tmp_path / "x"), "--environment", str(environment), "--config", str(config)]
    assert main([*command, "--limit", "1", "--samples", "1"]) == 0
    prepared = load_prepared(tmp_path / "x")
    assert prepared.num_latent_frames == 21 and prepared.model["sink"] == 1 and prepared.names == ["In a still frame, a stop sign-0"]
    assert read_record(tmp_path / "x", prepared.names[0])["prompts"] == [{"image": 0, "prompt": "In a still frame, a stop sign"}]
    assert main([*command, "prompts=x.txt"]) == 2 and "prompts is given, but the suite decides" in caplog.text


def test_only_prepare_is_shared(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["measure", str(tmp_path)]) == 2 and "2 processes: only `prepare` is split across them" in caplog.text


def test_without_an_environment(tmp_path, caplog):
    missing = ["--environment", str(tmp_path / "nowhere")]
    assert main(["prepare", "vbench", "--output", str(tmp_path / "x"), *missing]) == 2
    assert main(["run", str(tmp_path / "x"), *missing]) == 2 and "run `prepare` first" in caplog.text
    assert caplog.text.count("scripts/setup_vbench.sh") == 1


def test_a_run_goes_on_where_it_stopped(prepare, environment, cache, caplog):
    """What lacks weights or fails keeps nothing else from being measured, and is measured as soon as it can be."""
    folder = prepare("vbench", "num_latent_frames=3", "--samples", "2")[1]
    run = ["run", str(folder), "--environment", str(environment), "--device", "cpu"]
    assert main([*run, "--dimensions", "temporal_flickering,motion_smoothness"]) == 1
    assert f"motion_smoothness cannot be measured; it lacks\n  {cache / 'amt_model/amt-s.pth'}  from  https://" in caplog.text
    has_weights(cache, *DIMENSIONS)
    caplog.clear()
    assert main([*run, "--dimensions", ",".join(name for name in DIMENSIONS if name not in ("object_class", "multiple_objects"))]) == 1
    assert "temporal_flickering: measured already" in caplog.text and "motion_smoothness: 0." in caplog.text
    assert "scene: vbench stopped with status 1: RuntimeError: scene does not work today" in caplog.text
    assert "color cannot be measured; it lacks\n  the package detectron2" in caplog.text
    found, averages = values.read_vbench(folder)
    assert "scene" not in averages and found["subject_consistency"].keys() == {f"a shark is swimming in the ocean.-{i}" for i in (0, 1)}
    about = json.loads((folder / "results" / "vbench" / "human_action_run.json").read_text())
    assert about["environment"]["versions"]["vbench"] == "0.1.5" and about["device"] == "cpu" and about["videos"] == 2
    assert main(["score", str(folder)]) == 2 and "5 of 16 dimensions are missing: object_class, multiple_objects, color" in caplog.text
    assert (folder / "results" / "radar.png").is_file() and not (folder / "results" / "bars.png").exists()


def test_a_stopped_run_leaves_no_process(prepare, environment, cache):
    """Whoever stops the run, as a batch system does, stops vbench too, and nothing further is begun."""
    folder = prepare("vbench", "num_latent_frames=3", "--samples", "1")[1]
    has_weights(cache, *DIMENSIONS)
    sleepy = environment / "lib" / "python3.11" / "site-packages" / "vbench" / "sleepy"
    sleepy.write_text("")
    dimensions = ["--dimensions", "human_action,motion_smoothness", "--device", "cpu"]
    words = ["run", folder, "--environment", environment, *dimensions]
    told = {"VBENCH_CACHE_DIR": str(cache)}
    running = start_program("longlive.evaluation", *words, output=folder / "said", environment=told)
    try:
        wait_for(lambda: sleepy.read_text())
        worker = int(sleepy.read_text())
        running.terminate()
        running.join(60)
        assert running.exitcode == 130
        wait_for(lambda: not psutil.pid_exists(worker))
    finally:
        running.kill()
        sleepy.unlink()
    assert not list((folder / "results" / "vbench").glob("*_run.json"))


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_dimensions_give_a_total(prepare, environment, cache, capsys, caplog):
    folder = prepare("vbench", "num_latent_frames=3", "--samples", "2")[1]
    packages = environment / "lib" / "python3.11" / "site-packages"
    has_weights(cache, *DIMENSIONS)
    shutil.copytree(packages / "vbench-0.1.5.dist-info", packages / "detectron2-0.6.dist-info")
    (packages / "detectron2-0.6.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    works = packages / "vbench" / "scene_works"
    works.write_text("")
    try:
        run = ["run", str(folder), "--environment", str(environment), "--device", "cpu"]
        assert main(run) == 1 and "object_class: vbench measured 1 of 2 videos" in caplog.text
        assert "color: 0." in caplog.text  # of videos without the object it says nothing
        (packages / "vbench" / "object_class_works").write_text("")
        assert main(run) == 0 and main(["score", str(folder), "--name", "tiny"]) == 0
    finally:
        works.unlink()
        (packages / "vbench" / "object_class_works").unlink(missing_ok=True)
        shutil.rmtree(packages / "detectron2-0.6.dist-info")
    text = capsys.readouterr().out
    assert "| **tiny** |" in text and "only a part of the benchmark was prepared (samples 2)" in text
    score = json.loads((folder / "results" / "score.json").read_text())
    assert 0 < score["total"] < 100 and score["missing"] == [] and (folder / "results" / "bars.png").is_file()
    assert main(["compare", str(folder), str(folder)]) == 0 and "| total |" in capsys.readouterr().out
    assert (folder / "results" / "compared" / "radar.png").is_file()


def test_videos_that_are_not_as_they_were_prepared(prepare, environment, cache, caplog):
    folder = prepare("vbench", "num_latent_frames=3", "--samples", "2")[1]
    run = ["run", str(folder), "--environment", str(environment), "--dimensions", "temporal_flickering"]
    videos = folder / "videos"
    (videos / "a refrigerator-0.mp4").unlink()  # counts for another dimension
    assert main(run) == 0 and main(["score", str(folder)]) == 2 and "on other videos" not in caplog.text
    assert "temporal flickering is that of all videos" in (folder / "results" / "score.md").read_text()
    shutil.copyfile(videos / "In a still frame, a stop sign-0.mp4", videos / "saved")
    shutil.copyfile(videos / "In a still frame, a stop sign-1.mp4", videos / "In a still frame, a stop sign-0.mp4")
    assert main(["score", str(folder)]) == 2 and "temporal_flickering was measured on other videos than the present ones" in caplog.text
    os.replace(videos / "saved", videos / "In a still frame, a stop sign-0.mp4")
    (videos / "In a still frame, a stop sign-0.mp4").rename(videos / "In a still frame a stop sign-0.mp4")
    assert main(run) == 2 and "1 videos are missing: In a still frame, a stop sign-0.mp4" in caplog.text
    assert "perhaps In a still frame a stop sign-0.mp4 should be In a still frame, a stop sign-0.mp4" in caplog.text
    (videos / "In a still frame a stop sign-0.mp4").rename(videos / "In a still frame, a stop sign-0.mp4")
    (videos / "In a still frame, a stop sign-1.mp4").write_bytes(b"nothing")
    assert main(run) == 2 and "1 videos cannot be read" in caplog.text
    full_info = environment / "lib/python3.11/site-packages/vbench/VBench_full_info.json"
    full_info.write_text(json.dumps(LIST[:3]))
    try:
        assert main(run) == 2 and "the prompt list changed since the videos were prepared" in caplog.text
    finally:
        full_info.write_text(json.dumps(LIST))
    assert main([*run[:4], "--dimensions", "scene", "--device", "cuda:7"]) == 2 and "there is no device 'cuda:7'" in caplog.text


def test_longer_prompts_by_a_language_model(prepare, environment, writer, tmp_path, caplog):
    """From the list in vbench's environment to videos: the longer prompt is generated from, the original one names the file."""
    output = tmp_path / "longer.txt"
    command = ["rewrite", "--model", str(writer), "--output", str(output), "--environment", str(environment), "--device", "cpu"]
    assert main([*command, "--lenient", "--max-new-tokens", "8"]) == 0 and "4 lines" in caplog.text
    lines = output.read_text().splitlines()
    status, folder = prepare("vbench", "num_latent_frames=3", "--samples", "1", "--rewritten", str(output))
    assert status == 0 and len(lines) == 4
    record = read_record(folder, "a refrigerator-0")
    assert record["prompt"] == "a refrigerator" and record["prompts"] == [{"image": 0, "prompt": lines[1]}]
    rewritten = load_prepared(folder).rewritten
    assert rewritten["file"] == "longer.txt" and rewritten["made"]["weights"] and rewritten["made"]["lines"] == 4
    assert prepare("vbench", "num_latent_frames=3", "--samples", "1")[0] == 2 and "rewritten" in caplog.text
    short = tmp_path / "short.txt"
    short.write_text("a cat\n\na dog\n")
    command[4] = str(tmp_path / "other.txt")
    own = [*command, "--lenient", "--max-new-tokens", "8", "--prompts", str(short)]
    assert main(own) == 2 and "prompt 2 of 3 is empty" in caplog.text  # line i of the output belongs to line i
    short.write_text("a cat\na dog\n")
    assert main(own) == 0 and len((tmp_path / "other.txt").read_text().splitlines()) == 2


def test_every_dimension_has_a_gpu_of_its_own(monkeypatch):
    assert devices_of("auto", []) == ["cpu"] and devices_of("cpu", ["a"]) == ["cpu"] and devices_of("cuda:1", ["a", "b"]) == ["cuda:1"]
    for wrong in ("cuda:2", "cuda:x", "gpu"):
        with pytest.raises(ValueError, match="choose auto, cpu, cuda or"):
            devices_of(wrong, ["a", "b"])
    assert devices_of("auto", ["a", "b"]) == devices_of("cuda", ["a", "b"]) == ["cuda:0", "cuda:1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible("cpu") == {} and visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "6"}


def test_comparisons_that_say_nothing_are_refused(prepare, environment, cache, caplog):
    """Of videos that are no longer there, or measured in another way; what only one folder has is named."""
    has_weights(cache, *DIMENSIONS)
    both = [prepare("vbench", "num_latent_frames=3", "--samples", "1", f"crf={crf}", folder=str(crf))[1] for crf in (18, 20)]
    for folder in both:
        run = ["run", str(folder), "--environment", str(environment), "--device", "cpu", "--dimensions"]
        assert main([*run, "temporal_flickering,human_action" if folder is both[0] else "temporal_flickering"]) == 0
    compare = ["compare", *map(str, both), "--names", "recache=none", "recache=clear"]
    assert main(compare) == 0 and "measured on one folder only, and left out: human_action" in caplog.text
    about = both[1] / "results" / "vbench" / "temporal_flickering_run.json"
    before = about.read_text()
    about.write_text(before.replace('"static_filter": false', '"static_filter": true'))
    assert main(compare) == 2 and "temporal_flickering was not measured alike (static_filter False and True)" in caplog.text
    about.write_text("{")
    assert main(compare) == 2 and f"{about} is not JSON" in caplog.text
    about.write_text(before)
    shutil.copyfile(video_path(both[1], "a refrigerator-0"), video_path(both[1], "In a still frame, a stop sign-0"))
    assert main(compare) == 2 and "temporal_flickering was measured on other videos" in caplog.text


def test_the_same_model_from_another_place(prepare, tiny, tmp_path, monkeypatch):
    """A copy of the weights, a relative path, scripts in another folder: the same videos, gone on with and comparable."""
    shutil.copytree(tiny, tmp_path / "copy")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jsonl").write_text('{"prompts": [{"text": "a red circle", "seconds": 1}]}\n')
    first = prepare("interactive", "--prompts", str(tmp_path / "here" / "own.jsonl"), "--samples", "1", folder="a")
    before = stamps(first[1])
    monkeypatch.chdir(tmp_path / "there")
    again = prepare("interactive", "--prompts", "own.jsonl", "--samples", "1", f"model={tmp_path / 'copy'}", folder="a")
    assert first[0] == again[0] == 0 and stamps(again[1]) == before


def test_two_at_once_do_not_disturb_each_other(prepare, tmp_path):
    """Each writes its own half-done file; what a dead process left is removed, what a living one writes is not."""
    half_done = tmp_path / "videos" / "partial"
    half_done.mkdir(parents=True)
    host = socket.gethostname()
    (half_done / f"{host}-999999999.mp4").write_bytes(b"")
    (half_done / f"{host}-{os.getppid()}.mp4").write_bytes(b"")
    assert prepare("vbench", "num_latent_frames=3", "--samples", "1")[0] == 0
    assert [path.name for path in half_done.iterdir()] == [f"{host}-{os.getppid()}.mp4"]


@pytest.mark.parametrize(
    ("suite", "more", "words"),
    [
        ("vbench", ["--dimensions", "scene", "--static-filter"], "the static filter is for temporal_flickering"),
        ("vbench", ["--clip-lengths", "released"], "clip lengths belong to the suite long"),
        ("vbench", ["--slow-fast", "x"], "--slow-fast is for background_consistency and subject_consistency of VBench-Long"),
        ("long", ["--slow-fast", "x"], "x has no slow_fast_params.yaml"),
        ("long", ["--clip", "x"], "--clip is for the CLIP score"),
    ],
)
def test_options_that_would_change_nothing_are_refused(prepare, environment, cache, caplog, suite, more, words):
    folder = prepare(suite, "num_latent_frames=12", "--samples", "1", "--dimensions", "scene", "--limit", "1")[1]
    if "background" in words or suite == "long":
        folder = prepare(suite, "num_latent_frames=12", "--samples", "1", folder="all")[1]
    assert main(["run", str(folder), "--environment", str(environment), *more]) == 2 and words in caplog.text


def test_interactive_scripts(prepare, environment, cache, clip_folder, tmp_path, caplog):
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompts": [{"text": "a red circle", "seconds": 1}, {"text": "a blue circle", "seconds": 1}]}\n')
    assert prepare("interactive", "--prompts", str(own), "--samples", "1", folder="as long as it says")[0] == 0
    assert read_record(tmp_path / "as long as it says", "000-a-red-circle-0")["images"] == 33
    status, folder = prepare("interactive", "--prompts", str(own), "--samples", "1", "seconds=2")
    assert status == 0
    run = ["run", str(folder), "--environment", str(environment), "--clip", str(tmp_path / "nowhere")]
    assert main(run) == 1
    for words in ("the CLIP score cannot be measured", "5 of 5 dimensions could not be measured", "hf download laion"):
        assert words in caplog.text
    assert main(["run", str(folder), "--environment", str(environment), "--dimensions", "scene"]) == 2
    assert "scene cannot be measured on this folder: its prompts are VBench's own" in caplog.text
    found = {
        "clip_0_1": {name: 20.0 for name in load_prepared(folder).names},
        "clip_1_2": {name: 22.0 for name in load_prepared(folder).names},
    }
    values.write(folder, "clip_score", found, {})
    assert main(["score", str(folder)]) == 2 and "not measured: subject_consistency" in caplog.text
    assert "| **tiny** | missing | 20.00 | 22.00 |" in (folder / "results" / "score.md").read_text()
    assert load_prepared(folder).num_latent_frames == 9  # as long as was asked for
    status, other = prepare("switch", "--prompts", str(own), "--samples", "1", "recache=none", folder="switch")
    assert status == 0 and load_prepared(other).num_latent_frames is None and not find_problems(other, load_prepared(other))
    status, short = prepare("long", "num_latent_frames=3", "--samples", "1", folder="short")
    assert status == 0 and main(["run", str(short), "--environment", str(environment)]) == 2
    assert "videos of 0.6 s are one clip; VBench-Long compares clips of 2 s: prepare longer ones" in caplog.text
    assert status == 0 and load_prepared(other).entries[0].script.durations == (5.0, 5.0)
    has_weights(cache, "background_consistency", "subject_consistency")
    two = ["--dimensions", "background_consistency,temporal_flickering"]
    assert main(["run", str(other), "--environment", str(environment), *two]) == 1
    assert main(["score", str(other)]) == 2 and not values.read_vbench(other)[0]
    text = (other / "results" / "score.md").read_text()
    assert "| **tiny, recache=none** |" in text and "| missing | missing | missing |" in text
    assert "| cache cleared (published) | 92.75 | 89.59 |  | 28.95 |" in text
    assert main(["measure", str(folder)]) == 0 and "switch_flicker" in values.read(folder, "measured")[0]


def test_the_miniature_is_measured_by_its_oracle(tmp_path, capsys, caplog):
    command = ["prepare", "miniature", "--limit", "2", "seconds=2", "device=cpu"]
    for name, more in (("A", []), ("B", ["denoising_steps=[1000,500]"])):
        assert main([*command, "--output", str(tmp_path / name), *more]) == 0 and main(["run", str(tmp_path / name)]) == 0
    found = values.read(tmp_path / "A", "oracle")[0]
    assert (
        found["background_right"] == dict.fromkeys(load_prepared(tmp_path / "A").names, 1.0)
        and (tmp_path / "A/results/adherence.png").is_file()
    )
    capsys.readouterr()
    assert main(["score", str(tmp_path / "A")]) == 0 and "| shape_right |" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--names", "four", "two"]) == 0
    assert "| metric | four | two | difference, 95 % interval | two is |" in capsys.readouterr().out
    names = load_prepared(tmp_path / "B").names
    video_path(tmp_path / "B", names[1]).unlink()  # to make room: what was measured stays true
    assert main(["score", str(tmp_path / "B")]) == 0
    shutil.copyfile(video_path(tmp_path / "B", names[0]), video_path(tmp_path / "A", names[0]))
    assert main(["score", str(tmp_path / "A")]) == 2 and "oracle was measured on other videos than the present ones" in caplog.text
    assert main(["run", str(tmp_path / "A"), "--static-filter"]) == 2 and "the static filter is for" in caplog.text
    assert main(["run", str(tmp_path / "A"), "--device", "cpu"]) == 2 and "measures nothing here" in caplog.text
    twice = ["measure", str(tmp_path / "A"), str(tmp_path / "A"), "--output", str(tmp_path / "p")]
    assert main(twice) == 2 and "several are named A" in caplog.text
    assert main(["measure", str(tmp_path / "A"), "--block", "0"]) == 2 and "at least one latent frame" in caplog.text
    assert main(["measure", str(tmp_path / "A"), "--block", "5"]) == 2 and "leave out --block" in caplog.text
    next((tmp_path / "A" / "videos").iterdir()).unlink()
    assert main(["run", str(tmp_path / "A")]) == 2 and "1 videos are missing" in caplog.text


@pytest.mark.vbench
@pytest.mark.parametrize("suite", ["vbench", "long"])
def test_the_real_vbench(suite, tmp_path, cache, caplog):
    """Its temporal flickering of the miniature's videos is ours to 1e-5; every other dimension says what it lacks."""
    folder = tmp_path / suite
    part = ["--dimensions", ",".join(DIMENSIONS), "--limit", "1", "--samples", "2"]
    assert main(["prepare", suite, "--output", str(folder), "device=cpu", "num_latent_frames=15", *part]) == 0
    assert main(["run", str(folder), "--device", "cpu"]) == 1
    (found,) = values.read_vbench(folder)[0].values()
    for name, value in found.items():
        path = video_path(folder, name)
        if suite == "vbench":
            images = video.images_of(path, as_opencv=True)
            assert value == pytest.approx(pixel_metrics.temporal_flickering(pixel_metrics.reduce_video(images)), abs=1e-5)
        else:  # of clips of two seconds that VBench-Long writes anew: 57 images are one of 32 and the last 32
            images = list(video.images_of(path, as_opencv=True))
            parts = [pixel_metrics.temporal_flickering(pixel_metrics.reduce_video(part)) for part in (images[:32], images[-32:])]
            assert value == pytest.approx(np.mean(parts), abs=2e-3)
    for dimension in DIMENSIONS:
        lacks = f"{dimension} cannot be measured; it lacks"
        assert (lacks in caplog.text) == (dimension != "temporal_flickering")
    assert all(str(cache / weight.path) in caplog.text for weight in WEIGHTS if weight.dimensions)
    assert default_environment().describe()["versions"]["vbench"] == "0.1.5"
