"""The training benchmark tells parts apart, counts what a formula says, and sees what a clip keeps in memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longlive.config import DistillationConfig
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import step_count
import step_parts
import train_step
from flops import flops_of_pass

SIZE = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "text_dim": 20, "text_len": 7, "freq_dim": 16, "in_dim": 4, "out_dim": 4}
SETTINGS = DistillationConfig(
    height=32,
    width=32,
    window=6,
    clip_frames=6,
    max_frames=(15,),
    switch_at=(6, 9),
    critic_updates=2,
    denoising_steps=(1000, 500),
    anchor_context=2,
)
TOKENS = 4  # a frame of 4 x 4 latents
SMALL = ["window=6", "clip_frames=6", "max_frames=[15]", "switch_at=[6]", "num_switches=1"]
CONFIGS = train_step.CONFIGS


def of_long(*settings: str) -> list[str]:
    return [f"long.{setting}" for setting in settings]


def test_parts_are_exclusive():
    now = [0.0]

    def spend(seconds, *inner):
        now[0] += seconds
        for call in inner:
            call()

    parts = step_parts.Parts(lambda: now[0])
    inner = parts.wrap("inner", lambda: spend(2))
    outer = parts.wrap(lambda: "outer", spend)
    outer(1, inner, inner)
    inner()
    now[0] += 8
    assert parts.sums == {"outer": 5, "inner": 2}
    with pytest.raises(ZeroDivisionError):
        parts.wrap("failed", lambda: 1 / 0)()
    inner()
    assert parts.sums["inner"] == 4


def read(size) -> int:
    """FLOPs of keys and values of a prompt."""
    embedding = 2 * size["text_len"] * size["dim"] * (size["text_dim"] + size["dim"])
    return embedding + 2 * 2 * size["text_len"] * size["dim"] ** 2 * size["num_layers"]


def read_back(size) -> int:
    """Twice the forward pass, but nobody wants the gradient of the text itself."""
    return 2 * read(size) - 2 * size["text_len"] * size["dim"] * size["text_dim"]


def back(size, *, frames: int, visible: int, again: bool, timesteps: int | None = None) -> float:
    """FLOPs of a backward pass to all weights: linears twice, fused attention 2.5 times; latents and t have no gradient."""
    queries, width = frames * TOKENS, size["dim"]
    linears = 2 * queries * width * (6 * width + 2 * size["ffn_dim"]) * size["num_layers"]
    attended = 4 * queries * (visible * TOKENS + size["text_len"]) * width * size["num_layers"]
    into, out = 2 * queries * width * 4 * size["in_dim"], 2 * queries * width * 4 * size["out_dim"]
    different = frames if timesteps is None else timesteps
    time, times = 2 * different * width * size["freq_dim"], 2 * different * width * 7 * width
    return 2 * linears + 2.5 * attended + into + 2 * out + time + 2 * times + again * (linears + attended)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_flops_of_a_mean_step_are_those_of_the_formula(checkpointing):
    teacher = {**SIZE, "dim": 36, "num_layers": 4}
    flops = step_count.flops_of_step(SIZE, teacher, replace(SETTINGS, checkpointing=checkpointing), anchor=1000.0)
    with torch.device("meta"):
        models = {name: WanTransformer(**size) for name, size in (("size", SIZE), ("teacher", teacher))}

    def passed(frames: int, visible: int, of: str = "size", **settings: int) -> int:
        return flops_of_pass(models[of], frames=frames, visible=visible, tokens_per_frame=TOKENS, **settings)

    # a video of 15 frames: clips of 6, 3, 3 and 3 new ones, so blocks 3, 6, 6, 6, 6 frames can see
    blocks, written = ((passed(3, 3, timesteps=1, writes_only=w) + 4 * passed(3, 6, timesteps=1, writes_only=w)) / 4 for w in (False, True))
    clip, clips = passed(6, 6) + read(SIZE), 1 + 1 / 2
    again = {"again": checkpointing}
    generated_back = back(SIZE, frames=3, visible=6, timesteps=1, **again)
    expected = {
        "prompts": clips * read(SIZE),
        "denoise": clips * 1.5 * blocks,
        "remember": clips * written,
        "recache": clips * passed(6, 6, timesteps=1, writes_only=True) / 4,
        "anchor": clips * 1000 * 3 / 4,
        "teacher": (passed(6, 6, "teacher") + read(teacher)) * 2 / 2,
        "critic for the generator": clip / 2,
        "generator backward": (back(SIZE, frames=3, visible=3, timesteps=1, **again) / 4 + generated_back + read_back(SIZE)) / 2,
        "critic forward": clip,
        "critic backward": back(SIZE, frames=6, visible=6, **again) + read_back(SIZE),
    }
    assert flops == pytest.approx(expected, rel=1e-12)


def test_nothing_is_counted_outside_the_parts():
    clips = step_count.flops_of_clips(step_count.meta_stage(SIZE, SIZE, replace(SETTINGS, lora_rank=2), layers=1))
    assert len(clips) == 2
    assert all(clip["rest"] == 0 for clip in clips)
    assert clips[1]["recache"] > 0


def test_a_rollout_asks_for_no_value():
    """On the meta device there is none to be had: what would make a GPU's host wait raises there."""
    tuner = step_count.meta_stage(SIZE, SIZE, SETTINGS, layers=1).tuner
    for grad in (True, False):
        tuner.clip(grad=grad)
    tuner.rollout.on_step = lambda number, t, x0: x0 if x0.mean() > 0 else None
    with pytest.raises(RuntimeError, match="meta"):
        tuner.clip(grad=False)


def test_live_bytes_are_of_what_was_made_and_is_there():
    old = torch.zeros(1000)
    with step_parts.LiveMemory(torch.device("cpu")) as live:
        a = torch.zeros(100)
        b = a[:50].view(5, 10)
        old.add_(1)
        c = a + 1
        assert (live.bytes, live.peak) == (800, 800)
        del c
        assert live.bytes == 400
        del a
        assert live.bytes == 400  # b is a view of it
        del b
        assert (live.bytes, live.peak) == (0, 800)


@pytest.mark.slow
def test_command_line_measures_the_bundled_miniature(tmp_path, capsys):
    output = tmp_path / "result.json"
    settings = of_long(*SMALL, "critic_updates=2", "batch=1", "denoising_steps=[1000,500]")
    assert train_step.main(["--steps", "2", "--output", str(output), "device=cpu", *settings]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert [run["checkpointing"] for run in result["runs"]] == [True, False]
    checkpointed, plain = result["runs"]
    for run in result["runs"]:
        assert run["steps"] == 2
        assert set(run["parts"]) == set(train_step.SECONDS)
        assert sum(run["parts"].values()) == pytest.approx(run["seconds"])
        assert 0 <= run["parts"].pop("rest") < 0.1 * run["seconds"]
        assert all(seconds > 0 for seconds in run["parts"].values())
        assert run["peak_bytes"] > max(clip["alive"] for clip in run["clips"])
        clips = run["clips"]
        assert len(clips) == 4  # the video grows, what its newest clip holds does not
        for clip in clips[2:]:
            assert (clip["saved"], clip["backward"]) == (clips[1]["saved"], clips[1]["backward"])
            assert clip["alive"] < 1.01 * clips[1]["alive"]  # a remembered block is 0.6 MB, a fifth of the smaller
    assert checkpointed["clips"][3]["saved"] < plain["clips"][3]["saved"] / 5
    assert checkpointed["clips"][3]["alive"] < plain["clips"][3]["alive"] / 3


@pytest.mark.slow
def test_command_line_counts(tmp_path, capsys):
    output = tmp_path / "result.json"
    settings = of_long("height=32", "width=32", *SMALL, "critic_updates=2", "denoising_steps=[1000,500]", "lora_rank=4", "anchor_context=1")
    assert train_step.main(["--count", "miniature", "--teacher", "miniature", *settings, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert "against the design" not in printed  # which says nothing of the miniature
    assert result["flops_plain"]["critic backward"] < result["flops"]["critic backward"]
    same = set(step_parts.PARTS) - {"critic backward", "generator backward"}
    assert all(result["flops_plain"][part] == result["flops"][part] > 0 for part in same)
    with torch.device("meta"):
        every = sum(p.numel() for p in WanTransformer(**arguments("miniature")).parameters())
    weights, gradients, states = result["weights"]["generator"]
    assert weights == 4 * every + gradients
    assert states == 2 * gradients
    assert result["weights"]["teacher"] == [2 * every, 0, 0]
    for network in ("generator", "critic"):
        assert result["checkpointed"][network]["alive"] < result["plain"][network]["alive"] / 2


@pytest.mark.slow
def test_count_of_the_full_size_agrees_with_the_design(tmp_path, capsys):
    output = tmp_path / "result.json"
    assert train_step.main(["--count", "1.3b", "--output", str(output)]) == 0
    flops = json.loads(output.read_text())["flops"]
    assert sum(flops.values()) / 1e12 == pytest.approx(step_count.DESIGNED_TFLOP, rel=0.05)


def test_what_cannot_be_measured_is_refused(capsys):
    assert train_step.main(["--steps", "0"]) == 2
    assert "choose at least 1" in capsys.readouterr().err
    assert train_step.main(["--config", str(CONFIGS / "miniature" / "teacher.yaml")]) == 2
    assert "no rollout" in capsys.readouterr().err
    with pytest.raises(ValueError, match="in progress at frame 6; finish it first"):
        tuner = step_count.meta_stage(SIZE, SIZE, SETTINGS, layers=1).tuner
        tuner.clip(grad=False)
        step_parts.held_by_clips(tuner, 1)
