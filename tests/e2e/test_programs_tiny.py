"""The programs around a real pipeline, though one of random weights: from files on disk to a video, in processes of their own too."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from longlive import video
from longlive.programs import inference as programs
from longlive.programs import loading
from tests.processes import start_program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)

    def run(*argv, **kind):
        caplog.clear()
        status = programs.main(["--model", str(tiny), *argv], description="a test", default_config=ROOT / "none.yaml", **kind)
        return status, caplog.text

    return run


def images(folder):
    (path,) = Path(folder).glob("*.mp4")
    return video.read_video(path)


def test_a_longer_video_begins_as_a_shorter_one_and_the_seed_matters(program):
    for name, argv in {"short": ["--seconds", "1"], "long": ["num_latent_frames=9"], "other": ["--seconds", "1", "--seed", "1"]}.items():
        status, said = program("--prompt", "a red circle", "--output", name, "crf=0", "scale=1", *argv)
        assert status == 0, said
    short, long, other = images("short"), images("long"), images("other")
    assert len(short) == 21 and len(long) == 33
    assert np.abs(short.astype(int) - long[:21]).mean() < 1 < np.abs(short.astype(int) - other).mean()


def test_settings_reach_the_model(program):
    Path("a.jsonl").write_text('{"prompts": ["one", "two"], "switch_frame_indices": [9]}')
    common = ("--prompts", "a.jsonl", "num_latent_frames=12", "crf=0", "scale=1")
    made = {}
    for name, argv in {
        "as it is": [],
        "on demand": ["text_encoder=on_demand"],
        "window": ["window=6"],
        "sink": ["sink=0"],
        "steps": ["denoising_steps=[1000]"],
        "shift": ["timestep_shift=1"],
        "context": ["context_timestep=500"],
        "sink refreshed": ["keep_sink=false", "window=6"],
        "relative": ["relative_rope=true"],
    }.items():
        status, said = program("--output", name, *argv, *common)
        assert status == 0, said
        made[name] = images(name).astype(int)
    assert np.abs(made["as it is"] - made["on demand"]).max() == 0
    for name in made.keys() - {"as it is", "on demand"}:
        assert np.abs(made[name] - made["window" if name == "sink refreshed" else "as it is"]).max() > 0, name


def test_broken_weights_stop_with_block_and_step(program, monkeypatch):
    real = loading.load_pipeline

    def broken(*arguments):
        pipe = real(*arguments)
        for weight in pipe.transformer.head.parameters():
            weight.data.fill_(float("nan"))
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", broken)
    status, said = program("--prompt", "a")
    assert status == 1 and re.search(r"block 0 .*step 1", said) and "Traceback" not in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["num_latent_frames=10"], "10 latent frames cannot be cut into blocks of 3"),
        (["height=40"], "height 40 is not divisible by 16"),
        (["window=2"], "choose a larger window"),
        (["window=4"], "no room for a block"),
        (["attention=fa9"], "attention backend 'fa9' is unknown"),
        (["denoising_steps=[1000,1000]"], "decreasing"),
        (["lora=nowhere.pt"], "nowhere.pt does not exist"),
        (["device=cuda:99"], "cuda:99"),
    ],
)
def test_mistakes(program, argv, message):
    status, said = program("--prompt", "a", *argv)
    assert status == 2 and message in said and "Traceback" not in said
    assert not list(Path("outputs").glob("*"))


def test_attention_that_cannot_run_here(program):
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    status, said = program("--prompt", "a", "attention=fa3")
    assert status == 2 and "'fa3' cannot be used" in said and not list(Path("outputs").glob("*"))


def test_a_prompt_that_is_too_long_is_cut_where_it_is_said(program):
    status, said = program("--prompt", "a red circle " * 20, "num_latent_frames=3")
    assert status == 0 and "reads 32: cut after" in said


def test_interrupted_from_outside(program, tiny, tmp_path):
    """A process of its own: Ctrl-C in the middle of a video that is typed and has no end."""
    said, typed = tmp_path / "said", tmp_path / "typed"
    os.mkfifo(typed)
    words = ["--model", tiny, "--output", tmp_path, "scale=1"]
    process = start_program("interactive_inference.py", *words, output=said, stdin=typed)
    terminal = os.open(typed, os.O_WRONLY)  # waits for the process to open it
    for line in (b"a red circle\n", b"@0 a blue square\n"):  # a line without a time would wait five seconds
        os.write(terminal, line)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.mp4"))
        for _ in range(600):
            if sum(path.stat().st_size for path in tmp_path.glob("*.mp4")) > size + 10_000:
                break
            time.sleep(0.1)
    growing = video.read_video(next(tmp_path.glob("*.mp4")))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    os.close(terminal)
    assert process.exitcode == 130 and "interrupted" in said.read_text() and "Traceback" not in said.read_text(), said.read_text()
    (record,) = (path for path in tmp_path.glob("*.json") if "timeline" not in path.name)
    written = json.loads(record.read_text())
    assert written["complete"] is False and written["images"] >= len(growing) > 0
    shown = video.read_video(next(tmp_path.glob("*.mp4")))
    assert len(shown) == written["images"]

    timeline = next(tmp_path.glob("*.timeline.json"))
    again = ["--timeline", str(timeline), "--output", str(tmp_path / "again"), "scale=1"]
    assert program(*again, interactive=True)[0] == 0
    repeated = video.read_video(next((tmp_path / "again").glob("*.mp4")))
    assert len(repeated) >= len(shown) and (repeated[: len(shown)] == shown).all()
    assert [entry["prompt"] for entry in written["prompts"]] == ["a red circle", "a blue square"]
