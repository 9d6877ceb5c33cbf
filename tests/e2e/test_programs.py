"""The two programs from command line to files, around a stand-in for the pipeline that costs nothing; and the bad-input list."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from longlive import video
from longlive.config import InferenceConfig
from longlive.generation.cues import Cue
from longlive.generation.dimensions import Timing
from longlive.generation.pipeline import PipelineInfo
from longlive.generation.stream import BlockSeconds
from longlive.generation.timeline import Timeline
from longlive.miniature.language import build_tokenizer
from longlive.programs import inference as programs
from longlive.programs import loading, weights
from longlive.settings import load

ROOT = Path(__file__).parents[2]


class StandIn:
    """What the programs see of a pipeline. Images are a colour that the generator draws, one chunk a block of 3 frames."""

    tokenizer = build_tokenizer()
    info = PipelineInfo(32, 32, 16, 3, 4, 16, 12, 3, (1000,), 5.0, False, True, "joint")
    config: ClassVar = {"context_timestep": 0.0, "fresh_noise": True, "guidance_scale": 1.0, "guided_blocks": None}
    counted_parts = ()
    transformer = SimpleNamespace(config=SimpleNamespace(dim=1536, num_heads=12, rope_theta=10000.0))
    pause = 0.0  # seconds a block takes
    breaks_at: ClassVar[dict[int, BaseException]] = {}  # number of the block -> what happens instead

    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        return cls()

    def to(self, device):
        return self

    def register_to_config(self, *, relative_rope):
        self.info = self.info._replace(relative_rope=relative_rope)

    timing = Timing()

    def place_text_encoder(self, mode):
        assert mode == "resident"

    def accelerate(self, **settings):
        assert settings.pop("decoder", "full") == "full" and not any(settings.values())

    def memory_needed(self, num_latent_frames, height, width, batch=1):
        return 1000 * height * width

    def session(self, prompts, *, height, width, seed, ahead, num_latent_frames=None, num_frames=None):
        num_latent_frames = num_latent_frames or self.timing.resolve(None, None, num_frames)
        timeline = Timeline(seed, {**self.info._asdict(), "height": height, "width": width, "context_timestep": 0.0})
        return StandInSession(timeline, self.blocks(prompts, num_latent_frames, height, width, timeline))

    def blocks(self, prompts, num_latent_frames, height, width, timeline):
        colour = torch.randint(256, (3,), generator=torch.Generator().manual_seed(timeline.seed), dtype=torch.uint8)
        number = 0
        while num_latent_frames is None or 3 * number < num_latent_frames:
            if number in self.breaks_at:
                raise self.breaks_at[number]
            if cue := prompts.due(3 * (number - 1) if number else -1, 3 * number):
                prompt = cue.prompt
                timeline.cues.append(dataclasses.replace(cue, latent_frame=3 * number))
            timeline.num_latent_frames = 3 * number + 3
            time.sleep(self.pause)
            images = colour.expand(1, 12 - 3 * (number == 0), height, width, 3)
            yield SimpleNamespace(
                images=images,
                latent_frames=range(3 * number, 3 * number + 3),
                prompt=prompt,
                seconds=BlockSeconds(denoise=0.01, decode=0.02),
            )
            number += 1


class StandInSession(contextlib.nullcontext):
    """What the programs see of a session."""

    def __init__(self, timeline, blocks):
        super().__init__(self)
        self.timeline, self.blocks = timeline, blocks

    def __iter__(self):
        return self.blocks


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Another class for every test, so that a test may change it."""
    pipeline = type("Changed", (StandIn,), {})
    monkeypatch.setattr(loading, "LongLivePipeline", pipeline)
    return pipeline


@pytest.fixture
def program(tmp_path, monkeypatch, caplog):
    """Runs a program in an empty folder; returns its exit status and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, interactive=False):
        caplog.clear()
        name = "interactive_inference.yaml" if interactive else "inference.yaml"
        default = ROOT / "configs" / "miniature" / name
        status = programs.main(list(argv), description="a test", default_config=default, interactive=interactive)
        return status, caplog.text

    return run


def the_video(pattern="*"):
    (path,) = Path("outputs").glob(f"{pattern}.mp4")
    return path


def the_json(pattern="*"):
    (path,) = Path("outputs").glob(f"{pattern}.json")
    return json.loads(path.read_text())


def test_a_video_with_all_that_belongs_to_it(program):
    status, said = program("--prompt", "A red circle: ${moves}", "--seconds", "2", "--seed", "7", "device=cpu")
    assert status == 0
    assert "2.1 s = 9 latent frames in 3 blocks = 33 pixel frames, 32x32" in said
    assert "GiB needed" in said and "frames/s transformer only" in said and "first frames after" in said and "peak memory" in said
    stem = str(the_video().with_suffix(""))
    assert re.fullmatch("outputs/a-red-circle-moves-seed7-[0-9a-f]{8}", stem)
    assert sorted(map(str, Path("outputs").iterdir())) == [f"{stem}{suffix}" for suffix in (".json", ".mp4", ".png")]
    assert video.probe(f"{stem}.mp4") == (33, 256, 256, 16)
    written = the_json()
    assert written["complete"] is True and written["seed"] == 7 and written["images"] == 33
    assert written["prompts"] == [{"image": 0, "seconds": 0.0, "prompt": "A red circle: ${moves}"}]
    assert written["settings"]["seconds"] == 2.0 and written["versions"]["torch"] == torch.__version__
    assert written["timings"]["denoise"] == pytest.approx(0.03) and written["timings"]["images_per_second_dit"] == pytest.approx(1100)
    assert written["peak_memory_bytes"] > 0


def test_a_length_in_pixel_frames(program):
    assert program("--prompt", "a", "num_frames=33", "device=cpu")[0] == 0
    assert the_json()["images"] == 33 and the_json()["request"]["num_latent_frames"] == 9


def test_finished_videos_are_skipped_and_made_again_when_asked(program):
    arguments = ("--prompt", "a", "--seconds", "1")
    program(*arguments)
    path = the_video()
    path.write_bytes(b"kept")
    assert "is finished already" in program(*arguments)[1] and path.read_bytes() == b"kept"
    program(*arguments, "overwrite=true")
    assert video.probe(path).images == 21


@pytest.mark.parametrize(
    "requests",
    [
        [("一只红狐狸", ()), ("一只蓝狐狸", ())],
        [("a" * 60 + " red", ()), ("a" * 60 + " blue", ())],
        [("a", ("num_latent_frames=3",)), ("a", ("num_latent_frames=6",))],
        [("a", ()), ("a", ("height=64",))],
    ],
    ids=["another script", "a long beginning", "length", "size"],
)
def test_no_request_takes_the_place_of_another(program, requests):
    for prompt, settings in requests:
        status, said = program("--prompt", prompt, "--seconds" if not settings else "--seed", "0.1" if not settings else "0", *settings)
        assert status == 0 and "finished already" not in said, said
    assert sorted(json.loads(path.read_text())["prompts"][0]["prompt"] for path in Path("outputs").glob("*.json")) == sorted(
        prompt for prompt, _ in requests
    )


@pytest.mark.parametrize("setting", ["context_timestep", "fresh_noise", "guidance_scale", "guided_blocks"])
def test_settings_of_the_model_alone_are_part_of_a_request(program, stand_in, setting):
    arguments = ("--prompt", "a", "--seconds", "1")
    assert program(*arguments)[0] == 0
    stand_in.config = stand_in.config | {setting: 3}
    assert "finished already" not in program(*arguments)[1] and len(list(Path("outputs").glob("*.mp4"))) == 2


def test_other_weights_are_another_request_and_the_same_elsewhere_are_not(program):
    for folder, content in (("one", b"1"), ("two", b"2"), ("three", b"1")):
        Path(folder).mkdir()
        Path(folder, "weights.safetensors").write_bytes(content)
    said = [program("--prompt", "a", "--seconds", "1", "--model", folder)[1] for folder in ("one", "two", "three")]
    assert ["finished already" in text for text in said] == [False, False, True]
    Path("one", "weights.safetensors").write_bytes(b"3")
    assert "finished already" not in program("--prompt", "a", "--seconds", "1", "--model", "one")[1]


def test_the_digest_of_a_large_file_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, read = tmp_path / "model", []
    model.mkdir()
    (model / "a.safetensors").write_bytes(bytes(weights.REMEMBERED))
    config = InferenceConfig(model=str(model))
    first = weights.weights_digest(config)
    monkeypatch.setattr(weights, "file_digest", lambda file: (read.append(file), "0" * 64)[1])
    assert weights.weights_digest(config) == first and not read
    (model / "a.safetensors").write_bytes(bytes(weights.REMEMBERED - 1) + b"1")
    assert weights.weights_digest(config) != first and len(read) == 1


def test_a_line_on_top_of_a_file_changes_nothing(program):
    Path("a.txt").write_text("one\ntwo\n")
    assert program("--prompts", "a.txt", "--seconds", "1")[0] == 0
    before = {path.name for path in Path("outputs").iterdir()}
    Path("a.txt").write_text("zero\none\ntwo\n")
    status, said = program("--prompts", "a.txt", "--seconds", "1")
    assert status == 0 and said.count("is finished already") == 2 and before < {path.name for path in Path("outputs").iterdir()}


def test_a_line_that_is_there_twice_is_made_with_two_seeds(program):
    Path("a.txt").write_text("one\ntwo\none\n")
    assert program("--prompts", "a.txt", "--seconds", "1", "--num-samples", "2", "--seed", "5")[0] == 0
    names = sorted(path.stem.rpartition("-")[0] for path in Path("outputs").glob("*.mp4"))
    assert names == ["one-seed5", "one-seed6", "one-seed7", "one-seed8", "two-seed5", "two-seed6"]


def test_a_file_that_is_not_ours_is_not_lost(program):
    arguments = ("--prompt", "a", "--seconds", "1")
    program(*arguments)
    path = the_video()
    path.with_suffix(".json").write_text(json.dumps(the_json() | {"request": "another"}))
    content = path.read_bytes()
    status, said = program(*arguments)
    assert status == 2 and "belongs to another request; give overwrite=true" in said and path.read_bytes() == content
    path.with_suffix(".json").unlink()
    assert program(*arguments)[0] == 2 and path.read_bytes() == content
    assert program(*arguments, "overwrite=true")[0] == 0 and the_json()["complete"]


def test_two_programs_do_not_make_the_same_video(program, stand_in):
    stand_in.pause = 0.2
    arguments = ("--prompt", "a", "--seconds", "3")
    outcome = []
    first = threading.Thread(target=lambda: outcome.append(loading_status(arguments)))
    first.start()
    while not list(Path("outputs").glob("*.mp4")):
        time.sleep(0.02)
    status, said = program(*arguments, "overwrite=true")
    first.join()
    assert status == 2 and f"is being made by process {os.getpid()} on" in said
    assert outcome == [0] and the_json()["images"] == 57 and not list(Path("outputs").glob(".*"))


def loading_status(arguments):
    config = programs.parse(list(arguments), description="", default_config=ROOT / "configs" / "miniature" / "inference.yaml")
    programs.run(config)
    return 0


def test_seeds_do_not_depend_on_the_number_of_ranks(program, monkeypatch):
    Path("prompts.txt").write_text("one\n\ntwo\nthree\n")
    arguments = ("--prompts", "prompts.txt", "--seconds", "1", "--num-samples", "2", "--seed", "5")
    assert program(*arguments, "--output", "alone")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        before = set(Path("shared").glob("*")) if shares else set()
        assert program(*arguments, "--output", "shared")[0] == 0
        shares.append({path.name for path in set(Path("shared").glob("*")) - before})
    alone = {path.name for path in Path("alone").iterdir()}
    assert shares[0] | shares[1] == alone and not shares[0] & shares[1] and len(shares[0]) == len(shares[1]) == 9
    assert {name for name in alone if name.endswith("mp4")} == {
        name for name in alone if re.fullmatch(r"(one|two|three)-seed[56]-[0-9a-f]{8}\.mp4", name)
    }
    for name in alone:
        if name.endswith(".mp4"):
            np.testing.assert_array_equal(video.read_video(f"alone/{name}"), video.read_video(f"shared/{name}"))


def test_prompts_that_follow_each_other(program):
    Path("a.jsonl").write_text(
        '{"prompts": ["one", "two"], "switch_frame_indices": [4]}\n'
        '{"prompts": [{"text": "three", "seconds": 1.5}, {"text": "four", "seconds": 0.5}]}\n'
    )
    assert program("--prompts", "a.jsonl", "seconds=null")[0] == 0
    one, two = the_json("one*"), the_json("three*")
    assert [entry["image"] for entry in one["prompts"]] == [0, 21]  # frame 4 lies in the second block: from frame 6 on
    assert [entry["image"] for entry in two["prompts"]] == [0, 21] and one["images"] == 81 and two["images"] == 33
    assert one["request"]["cues"][1] == {"latent_frame": 4, "prompt": "two", "transition": None}


def test_lines_of_a_text_are_one_interactive_video(program):
    Path("a.txt").write_text("one\ntwo\nthree")
    arguments = ("--prompts", "a.txt", "--seconds", "3", "switch_frame_indices=[3,6]")
    assert program(*arguments, interactive=True)[0] == 0
    assert [entry["prompt"] for entry in the_json()["prompts"]] == ["one", "two", "three"]


def lines(descriptor, *texts, pause=0.4):  # longer than a block: no two prompts in one
    for text in texts:
        os.write(descriptor, text.encode())
        time.sleep(pause)
    os.close(descriptor)


@pytest.mark.parametrize("seconds", [None, 15])
def test_prompts_of_a_pipe_are_all_shown(program, monkeypatch, seconds):
    """At once, though a typist's newest prompt counts: each for five seconds, or from the time that it says."""
    read, write = os.pipe()
    monkeypatch.setattr(programs.run, "__kwdefaults__", {**(programs.run.__kwdefaults__ or {}), "terminal": read})
    lines(write, "one ci", "rcle\n\n", "twö\n@8.3 three\n", "@+1 four", pause=0)
    status, said = program(*(("--seconds", str(seconds)) if seconds else ()), interactive=True)
    assert status == 0 and "from the next block on" not in said
    assert "the miniature understands shape (circle, square" in said and 'the miniature does not know "four"' in said
    written = the_json("typed-*-????")
    begun = [(entry["prompt"], entry["image"]) for entry in written["prompts"]]
    assert begun == [("one circle", 0), ("twö", 81), ("three", 129), ("four", 141)]
    assert written["complete"] and written["images"] == (249 if seconds else 225)
    os.close(read)

    (file,) = Path("outputs").glob("*.timeline.json")
    typed = Timeline.load(file)
    assert [cue.prompt for cue in typed.cues] == ["one circle", "twö", "three", "four"]
    status, said = program("--timeline", str(file), interactive=True)
    assert status == 0, said
    again = the_json(file.name.replace(".timeline.json", "-again-*"))
    assert again["images"] == 4 * typed.num_latent_frames - 3 and [p["prompt"] for p in again["prompts"]] == [
        cue.prompt for cue in typed.cues
    ]
    assert [cue["latent_frame"] for cue in again["request"]["cues"]] == [cue.latent_frame for cue in typed.cues]


SETTINGS = {**StandIn.info._asdict(), "context_timestep": 0.0}


@pytest.mark.parametrize(
    ("argv", "change", "words"),
    [
        (["seconds=3"], {}, "both timeline and seconds are given"),
        (["window=9"], {}, "was made with window 12, not 9"),
        ([], {"settings": {}}, "has no height"),
        ([], {"version": 7}, "version 7"),
        ([], {"seed": -1}, "its seed -1 is not one from 0"),
        ([], {"seed": "x"}, "t.json is not a timeline: invalid literal"),
        ([], {"cues": "none"}, "t.json is not a timeline"),
        (
            [],
            {"settings": SETTINGS | {"height": "tall"}},
            "t.json is not a timeline: setting height",
        ),
        ([], {"settings": SETTINGS | {"denoising_steps": 5}}, "setting denoising_steps"),
        ([], {"block": 2}, "was made by a model with blocks of 2 latent frames; this one has blocks of 3"),
    ],
)
def test_timelines_that_cannot_be_made_again(program, tmp_path, argv, change, words):
    settings = {**StandIn.info._asdict(), "context_timestep": 0.0, **({"block": change["block"]} if "block" in change else {})}
    timeline = Timeline(5, settings, [Cue(0, "one")], 6).to_json() | change
    (tmp_path / "t.json").write_text(json.dumps(timeline))
    is_refused(program("--timeline", "t.json", *argv, interactive=True), words)
    is_refused(program("--timeline", "other.json", interactive=True), "there is no timeline other.json")


def test_a_closed_input(program, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    is_refused(program(interactive=True), "the standard input is closed, so nothing can be typed; give prompts=FILE")


def test_lines_that_a_short_video_has_no_room_for_are_said(program, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(programs.run, "__kwdefaults__", {**(programs.run.__kwdefaults__ or {}), "terminal": read})
    lines(write, "one\n@20 two\nthree\n", pause=0)
    status, said = program("--seconds", "2", interactive=True)
    assert status == 0 and "the video ended before 2 of the lines" in said


def test_the_pace_of_playing(program):
    began = time.perf_counter()
    assert program("--prompt", "a", "--seconds", "3", "realtime=true", "device=cpu")[0] == 0
    assert time.perf_counter() - began > 2.6 and the_json()["images"] == 57


def test_nothing_typed(program, monkeypatch):
    read, write = os.pipe()
    os.close(write)
    monkeypatch.setattr(programs.run, "__kwdefaults__", {**(programs.run.__kwdefaults__ or {}), "terminal": read})
    status, said = program(interactive=True)
    assert status == 2 and "no prompt came from the terminal" in said


@pytest.mark.parametrize(
    ("interruption", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FloatingPointError("latents are not finite at block 2, step 1"), 1, "block 2, step 1"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (torch.OutOfMemoryError("out of memory"), 1, "out of memory"),
    ],
)
def test_what_interrupts_a_video_leaves_a_valid_one(program, stand_in, interruption, status, message):
    stand_in.breaks_at = {2: interruption}
    arguments = ("--prompt", "a", "--seconds", "3")
    got, said = program(*arguments)
    assert got == status and message in said and "holds the first 1.3 s" in said and "Traceback" not in said
    written = the_json()
    assert written["complete"] is False and type(interruption).__name__ in written["error"]
    assert len(video.read_video(the_video())) == 21 == written["images"]
    stand_in.breaks_at = {}
    assert program(*arguments)[0] == 0 and the_json()["complete"] is True
    assert video.probe(the_video()).images == 57


def test_a_full_disk_in_mid_video(program):
    """Files may not grow beyond so many bytes, which the system says in the same place as that a disk is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        status, said = program("--prompt", "a", "--seconds", "60", "crf=0", "scale=16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1 and "error: File too large: outputs/a-seed0" in said and "Traceback" not in said
    written, images = the_json(), video.read_video(the_video())
    assert written["complete"] is False and 0 < len(images) == written["images"] and "OSError" in written["error"]
    assert the_video().stat().st_size == video.whole_fragments(the_video())
    assert program("--prompt", "a", "--seconds", "60", "crf=0", "scale=16")[0] == 0 and the_json()["complete"]


def test_an_interruption_before_the_first_image_leaves_nothing(program, stand_in):
    stand_in.breaks_at = {0: KeyboardInterrupt()}
    assert program("--prompt", "a")[0] == 130 and not list(Path("outputs").iterdir())


TWO = '{"prompts": ["a", "b"], "switch_frame_indices": [%s]}'
BAD = {
    "unknown setting": (["sed=1"], "there is no setting 'sed'; did you mean 'seed'?"),
    "wrong type": (["--seconds", "ten"], "setting seconds: Value 'ten'"),
    "no such configuration": (["--config", "none.yaml"], "no configuration at none.yaml"),
    "frames and block": (
        ["--prompt", "a", "num_latent_frames=10"],
        "10 latent frames cannot be cut into blocks of 3; choose a multiple, 9",
    ),
    "no picture": (["--prompt", "a", "image=nowhere.png"], "nowhere.png does not exist"),
    "two beginnings": (["--prompt", "a", "--image=a", "--continue=b"], "both image and continue_from are given; choose one"),
    "no pixel frames": (["--prompt", "a", "num_frames=0"], "num_frames 0: a video has at least one block"),
    "two kinds of frames": (["num_frames=9", "num_latent_frames=3"], "both num_latent_frames and num_frames are given; choose one"),
    "height": (["--prompt", "a", "height=40"], "height 40 is not divisible by 16; choose 32"),
    "width": (["--prompt", "a", "width=8"], "width 8 is not divisible by 16; choose 16"),
    "empty prompt": (["--prompt", " "], "the prompt is empty"),
    "two lengths": (["seconds=1", "num_latent_frames=3"], "choose one"),
    "prompt and prompts": (["--prompt", "a", "--prompts", "b.txt"], "choose one"),
    "no prompts file": (["--prompts", "none.txt"], "the prompt file none.txt does not exist"),
    "other kind of file": (["--prompts", "a.csv"], ".txt (one per line) or .jsonl"),
    "no model": (["--model", "nowhere", "--prompt", "a"], "hf download Efficient-Large-Model/LongLive-1.3B --local-dir longlive_models"),
    "no released weights": (["--config", str(ROOT / "configs/inference.yaml")], "wan_models/Wan2.1-T2V-1.3B does not exist"),
    "no prompt": (["prompts=null"], "no prompt"),
    "not UTF-8": (["--prompt", "a \udcff"], "the prompt is not valid UTF-8 at character 3"),
    "threads": (["--prompt", "a", "threads=100000"], "threads 100000: choose 1 to"),
    "window": (["--prompt", "a", "window=0"], "window 0: choose latent frames, or -1"),
    "sink": (["--prompt", "a", "sink=-1"], "sink -1: choose 0 or more"),
    "shift": (["--prompt", "a", "timestep_shift=nan"], "timestep_shift nan: choose a number above 0"),
    "context": (["--prompt", "a", "context_timestep=2000"], "context_timestep 2000.0: choose one from 0 to 1000"),
    "positions": (["--prompt", "a", "relative_rope=always"], "relative_rope 'always': choose auto, true or false"),
    "shown": (["--prompt", "a", "show=terminal"], "show=terminal is for `longlive live`"),
    "another device": (["device=mps"], "device 'mps' is not one that LongLive runs on; choose auto, cpu, cuda"),
    "device": (["device=tpu9"], "there is no device 'tpu9'"),
    "graphs": (["graphs=true", "device=cpu"], "graphs are CUDA graphs, and the device is cpu; leave graphs out"),
    "unwritable": (["--output", "/dev/null/videos"], "cannot write to /dev/null/videos"),
    "memory": (["--prompt", "a", "height=1600000", "width=1600000"], "GiB of memory needed on cpu"),
    "disk": (["--prompt", "a", "--seconds", "1e12"], "GiB of disk needed"),
}
BAD_FILES = {
    "empty file": ("a.txt", "\n\n", "a.txt contains no prompt"),
    "not JSON": ("a.jsonl", TWO % 3 + '\n{"prompts": ["a",', "a.jsonl, line 2: not JSON"),
    "a list": ("a.jsonl", '["a"]', "a.jsonl, line 1: expected an object with prompts"),
    "unknown key": ("a.jsonl", '{"promts": ["a"]}', "line 1: unknown key 'promts'; did you mean 'prompts'?"),
    "missing key": ("a.jsonl", "{}", "line 1: prompts is missing"),
    "no list": ("a.jsonl", '{"prompts": "a"}', "prompts is a list"),
    "empty prompt": ("a.jsonl", '{"prompts": ["a", " "], "switch_frame_indices": [3]}', "line 1: prompt 2 of 2 is empty"),
    "no text": ("a.jsonl", '{"prompts": [{"text": 3, "seconds": 1}]}', "line 1: prompt 1 of 1 is not text: 3"),
    "no seconds": ("a.jsonl", '{"prompts": [{"text": "a"}]}', "line 1: seconds is missing"),
    "seconds": ("a.jsonl", '{"prompts": [{"text": "a", "seconds": -1}]}', "line 1: seconds -1 is not a duration"),
    "too few switches": ("a.jsonl", '{"prompts": ["a", "b", "c"], "switch_frame_indices": [3]}', "3 prompts need 2 switch_frame_indices"),
    "no switches": ("a.jsonl", '{"prompts": ["a", "b"]}', "line 1: 2 prompts, but not where they begin"),
    "switches are no numbers": ("a.jsonl", TWO % '"3"', "line 1: switch_frame_indices is a list of whole numbers"),
    "switches out of order": ("a.jsonl", '{"prompts": ["a", "b", "c"], "switch_frame_indices": [6, 3]}', "line 1: "),
    "switch at the start": ("a.jsonl", TWO % 0, "line 1: "),
    "switch beyond the end": ("a.jsonl", TWO % 3 + "\n" + TWO % 300, "a.jsonl, line 2: "),
    "not text": ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
}


def is_refused(outcome, message):
    status, said = outcome
    (record,) = [line for line in said.split("ERROR")[1:]]
    assert status == 2 and message in record and "Traceback" not in said
    assert len(record.strip().splitlines()) <= 3 and not list(Path("outputs").glob("*"))


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(program, case):
    arguments, message = BAD[case]
    is_refused(program(*arguments), message)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(program, case):
    name, content, message = BAD_FILES[case]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    is_refused(program("--prompts", name, "seconds=5"), message)


def test_ranks_that_are_no_numbers(program, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    is_refused(program("--prompt", "a"), "RANK, WORLD_SIZE and LOCAL_RANK are '0', 'two', '0'")


@pytest.mark.parametrize(
    ("settings", "relative", "warned"),
    [
        (["num_latent_frames=120"], False, False),
        (["num_latent_frames=123"], True, False),
        (["num_latent_frames=123", "relative_rope=auto"], True, False),
        (["num_latent_frames=123", "relative_rope=false"], False, True),
        (["num_latent_frames=120", "relative_rope=true"], True, False),
    ],
)
def test_positions_beyond_what_a_sink_bears(program, settings, relative, warned):
    status, said = program("--prompt", "a", *settings)
    assert status == 0 and the_json()["request"]["relative_rope"] is relative
    assert ("132 and 201 frames after the sink" in said) is warned


def test_a_prompt_that_is_never_shown_is_said(program):
    Path("a.jsonl").write_text('{"prompts": ["one", "two", "three"], "switch_frame_indices": [4, 5]}\n')
    assert "line 1: prompt 2 is never shown: prompt 3 begins in the same block of 3" in program("--prompts", "a.jsonl", "--seconds", "2")[1]


def test_unknown_flag(program, capsys):
    with pytest.raises(SystemExit) as exit:
        program("--sede", "1")
    assert exit.value.code == 2 and "--sede" in capsys.readouterr().err


def test_ranks_cannot_share_a_terminal(program, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    is_refused(program(interactive=True), "2 ranks cannot read one terminal")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*inference.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_load(path):
    config = load(InferenceConfig, path)
    if config.prompts is not None:
        assert Path(config.prompts).is_file()
    if path.parent.name == "configs":
        assert (config.height, config.width, config.window, config.sink) == (480, 832, 12, 3) and config.keep_sink
        assert config.denoising_steps == (1000, 750, 500, 250) and config.timestep_shift == 5 and config.context_timestep == 0
        assert config.relative_rope == ("auto" if "interactive" in path.name else "infinite" in path.name)


def test_command_line_takes_the_place_of_the_file():
    parse = lambda *argv: programs.parse(argv, description="", default_config=ROOT / "configs/miniature/inference.yaml")  # noqa: E731
    released = ("--config", str(ROOT / "configs/inference.yaml"))
    assert parse().prompts.endswith("prompts.txt") and parse().model == "miniature" and parse().seconds == 10
    assert parse("--prompt", "a").prompts is None and parse("prompt=a").prompt == "a"
    assert parse("num_latent_frames=3").seconds is None
    assert parse("num_frames=9").seconds is None and parse("num_frames=9").num_frames == 9
    assert parse("--model", "folder").prompts is None
    assert parse(*released, "--seconds", "3").num_latent_frames is None
    assert parse(*released, "--model", "folder").checkpoint is None and parse(*released, "--model", "folder").window == 12
    assert parse("height=64", "--seed", "3", "width=128") == parse("--seed", "3", "height=64", "width=128")
