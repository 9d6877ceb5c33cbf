"""The experiments measure what they say: on videos made to be right or wrong, and the public code's deviations do what they are said to."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from experiments import c_length
from experiments.all import EXPERIMENTS
from experiments.arms import ARMS, Trained
from experiments.command import main
from experiments.legacy import CONTEXT_T, LeakyCache, NoisedContext, ZeroSinkCache
from experiments.metrics import (
    Estimate,
    bootstrap,
    drift_scores,
    estimate,
    expected_frame,
    image_jump,
    latency,
    per_block,
    slope,
    switch_scores,
)
from experiments.report import Claim, write
from experiments.scale import QUICK
from experiments.state_world import draw_identity, latents
from experiments.summary import summarize
from experiments.videos import switch_pairs
from longlive.cache.history import HistoryCache
from longlive.cache.window import Window
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.ops.rope import Rope

FRAME, LENGTH = 24, 48


@pytest.fixture(scope="module")
def perfect():
    """Exact videos of 16 prompts that switch at `FRAME`, the pairs, and the identities."""
    pairs, generator = switch_pairs(16), torch.Generator().manual_seed(0)
    identities = [draw_identity(generator) for _ in pairs]
    captions = [[pair.before] * FRAME + [pair.after] * (LENGTH - FRAME) for pair in pairs]
    return latents(captions, identities, LENGTH), pairs, identities


def test_a_perfect_switch_scores_perfectly(perfect):
    video, pairs, _ = perfect
    scores = switch_scores(video, pairs, FRAME)
    for values in (scores.adherence, scores.unchanged, scores.identity):
        torch.testing.assert_close(values, torch.ones_like(values))
    for values in (scores.jump, scores.flicker, scores.distance):
        assert values.abs().max() < 1e-4
    assert latency(scores.adherence.mean(0).double()) == 0
    assert {pair.attribute for pair in pairs} == {"shape", "color", "background", "motion"}


def test_a_switch_that_comes_late_is_late_and_nothing_else(perfect):
    _, pairs, identities = perfect
    late = [[pair.before] * (FRAME + 6) + [pair.after] * (LENGTH - FRAME - 6) for pair in pairs]
    scores = switch_scores(latents(late, identities, LENGTH), pairs, FRAME)
    assert latency(scores.adherence.mean(0).double()) == 6
    assert scores.adherence[:, :2].max() == 0 and scores.adherence[:, 2:].min() == 1
    assert scores.unchanged.min() == 1 and scores.identity.min() == 1
    still = torch.tensor([pair.attribute != "motion" for pair in pairs])
    assert scores.flicker[still].max() < 1e-4  # what the switch changes is no flicker, changed or not


def test_another_subject_after_the_switch_is_seen(perfect):
    video, pairs, identities = perfect
    others = [replace(i, size=(i.size + 1) % 3, texture=(i.texture + 32) % 64, x=(i.x + 3) % 8) for i in identities]
    captions = [[pair.before] * FRAME + [pair.after] * (LENGTH - FRAME) for pair in pairs]
    cut = torch.cat([video[:, :FRAME], latents(captions, others, LENGTH)[:, FRAME:]], dim=1)
    scores = switch_scores(cut, pairs, FRAME)
    still = torch.tensor([pair.attribute != "motion" for pair in pairs])
    assert scores.adherence[still].min() == 1 and scores.unchanged[~still].min() == 1
    assert scores.identity.max() == 0
    torch.testing.assert_close(scores.jump, torch.full_like(scores.jump, 3.0), atol=1e-3, rtol=0)
    assert scores.flicker.min() > 0.5


def test_images_jump_where_videos_do(perfect):
    video, pairs, _ = perfect
    before = [pair.before for pair in pairs]
    ground = torch.tensor([pair.attribute == "background" for pair in pairs])
    assert image_jump(video, before, FRAME)[ground].min() > 2 > image_jump(video, before, FRAME - 6).max()
    torch.testing.assert_close(expected_frame(video, pairs, FRAME), video[:, FRAME : FRAME + 1])


def test_drift_is_seen_where_it_is():
    captions, generator = [pair.before for pair in switch_pairs(8)], torch.Generator().manual_seed(1)
    identities = [draw_identity(generator) for _ in captions]
    video = latents(captions, identities, 36)
    scores = drift_scores(video, captions)
    assert scores.adherence.min() == 1 and scores.identity.min() == 1 and scores.step.max() < 1e-3 and scores.distance.max() < 1e-5
    assert scores.light.max() < 1e-2
    others = latents(captions, [replace(i, size=(i.size + 1) % 3) for i in identities], 36)
    noise = 0.3 * torch.randn(video[:, 24:].shape, generator=generator)
    drifted = drift_scores(torch.cat([video[:, :12], others[:, 12:24], video[:, 24:] + noise], dim=1), captions)
    assert drifted.identity.mean(0).tolist() == [1.0, 0.5, 1.0]  # the texture stayed
    torch.testing.assert_close(drifted.distance.mean(0), torch.tensor([0.0, 0.0, 0.3]), atol=0.02, rtol=0)
    turning = [torch.cat([latents([c], [replace(i, texture=(i.texture + k // 3) % 64)], 1, start=k) for k in range(36)], 1)
               for c, i in zip(captions, identities)]  # fmt: skip
    slowly = drift_scores(torch.cat(turning), captions)
    torch.testing.assert_close(slowly.light.mean(0), 5.625 * torch.tensor([1.5, 5.5, 9.5]), atol=0.1, rtol=0)
    assert slowly.adherence.min() == 1 and slowly.distance.mean() > 0.01


def test_latency_wants_three_blocks_in_a_row():
    assert latency(torch.tensor([[1.0, 1.0, 0.8, 0.9, 1.0, 0.95, 0.2], [0.9, 0.89, 1.0, 1.0, 0.0, 1.0, 1.0]])).tolist() == [9.0, 21.0]
    torch.testing.assert_close(per_block(torch.tensor([[True, False, False, True, True, True]])), torch.tensor([[1 / 3, 1.0]]))
    assert slope(torch.tensor([9.0, 1.0, 1.12, 1.24], dtype=torch.float64)) == pytest.approx(
        1.0
    )  # 0.12 in 12 frames; the first clip is not asked


def test_intervals_cover_the_mean_and_feel_the_spread_of_seeds_and_videos():
    generator, hits, widths = torch.Generator().manual_seed(2), 0, []
    for _ in range(100):
        of_videos = torch.randn(1, 64, generator=generator).expand(3, -1)  # seeds agree
        found = estimate(of_videos, resamples=400)
        hits += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    assert 88 <= hits <= 99
    assert sum(widths) / 100 == pytest.approx(2 * 1.96 / 8, rel=0.1)
    of_seeds = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(-1, 64)
    found = estimate(of_seeds, resamples=400)
    assert found.mean == 1 and found.low < 0.5 and found.high > 1.5
    (paired,) = bootstrap(torch.stack([of_seeds, of_seeds + 0.25], dim=-1), lambda m: m[..., 1] - m[..., 0], resamples=50)
    assert paired == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("expected", "interval", "verdict"),
    [
        ("more", (0.1, 0.3), "shows"),
        ("more", (-0.1, 0.3), "does not show"),
        ("more", (-0.3, -0.1), "reversed"),
        ("less", (-0.3, -0.1), "shows"),
        ("less", (0.1, 0.3), "reversed"),
        ("equal", (-0.05, 0.05), "shows"),
        ("equal", (-0.05, 0.3), "does not show"),
    ],
)
def test_verdicts_follow_from_the_interval(expected, interval, verdict):
    assert Claim("", expected, Estimate(sum(interval) / 2, *interval), margin=0.06).verdict == verdict


def rollout_over(cache, network, kind=Rollout):
    generator = torch.Generator().manual_seed(3)
    return kind(Denoiser(network), cache, FewStep([1000.0, 500.0], lambda like: torch.randn(like.shape, generator=generator)))


SHAPE = {"num_layers": 2, "batch": 1, "num_heads": 2, "rope": Rope(2, 2, 12), "window": Window(3, 6)}


def visible(cache, span, layer, k, v):
    """Keys and values that a layer would attend to."""
    return cache.view(span).at(layer).attend(k, k, v, lambda q, keys, values: (keys, values))


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_zero_sink_says_nothing_after_a_switch_beyond_the_window(model):
    model.requires_grad_(False)
    texts = normal(4, 2, 1, 5, 8)
    for length, silent in ((6, False), (12, True)):
        rollout = rollout_over(ZeroSinkCache(**SHAPE), model)
        for block in range(length // 3):
            rollout.remember(normal(block, 1, 3, 4, 4, 4), texts[0])
        rollout.switch(texts[1], Transition(False))
        assert rollout.end == length
        keys, values = visible(rollout.cache, range(length, length + 3), 0, normal(5, 1, 12, 2, 12), normal(6, 1, 12, 2, 12))
        sink = keys[:, :12], values[:, :12]
        assert keys.shape[1] == 4 * min(9, length + 3)
        assert all((part == 0).all() == silent for part in sink)
        assert keys[:, 12:].abs().sum(dim=(2, 3)).min() > 0


def test_noised_context_changes_what_is_remembered_and_not_what_is_read_again(model):
    model.requires_grad_(False)
    text, x0 = normal(7, 1, 5, 8), normal(8, 1, 6, 4, 4, 4)
    plain, noised = (rollout_over(history_cache(model, 4, 4, window=Window(3, 6)), model, kind) for kind in (Rollout, NoisedContext))
    seen = []
    for rollout in (plain, noised):
        for block in x0.split(3, dim=1):
            rollout.remember(block, text)
        zero = torch.zeros(1, 12, 2, 12)
        seen.append(visible(rollout.cache, range(6, 9), 0, zero, zero)[1][:, :24])
    beyond = (seen[0] - seen[1]).norm() / seen[0].norm()
    assert 0.1 * CONTEXT_T / 1000 < beyond < 20 * CONTEXT_T / 1000
    for rollout in (plain, noised):
        rollout.switch(normal(9, 1, 5, 8), Transition(False))
    again = [visible(rollout.cache, range(6, 9), 1, zero, zero)[0] for rollout in (plain, noised)]
    assert torch.equal(*again)
    assert noised.end == 6


def test_a_leaky_cache_has_the_values_of_a_plain_one_and_a_gradient_to_earlier_blocks(model):
    text, noise = normal(10, 1, 5, 8), normal(11, 3, 1, 3, 4, 4, 4)
    made, felt = {}, {}
    for kind in (HistoryCache, LeakyCache):
        rollout, first = rollout_over(kind(**SHAPE), model), noise[0].clone().requires_grad_()
        rollout.remember(rollout.block(first, text, num_passes=1, grad=True), text)
        made[kind] = rollout.block(noise[1], text, num_passes=1, grad=True)
        made[kind].square().sum().backward()
        felt[kind] = first.grad is not None and bool(first.grad.any())
        model.zero_grad()
    assert torch.equal(*made.values())
    assert felt == {HistoryCache: False, LeakyCache: True}
    rollout.remember(made[LeakyCache].detach(), text)  # its last pass had a gradient: the page is attached
    rollout.remember(rollout.block(noise[2], text, grad=False), text)  # a critic's clip: constants from here on
    assert not rollout.cache._leak


def test_an_experiment_from_the_command_line_to_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.command.QUICK", replace(QUICK, seeds=(0,)))
    monkeypatch.setattr("experiments.state_model.NUM_PAIRS", 20)
    asked = ["--quick", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "docs")]
    assert main({"c_length": c_length.experiment}, asked) == 0
    found = json.loads((tmp_path / "docs" / "c_length.json").read_text())
    assert {claim["verdict"] for claim in found["claims"]} <= {"shows", "does not show", "reversed"}
    assert set(found["tables"][0]["arms"]) == set(c_length.NAMES.values())
    assert found["title"] in (tmp_path / "docs" / "README.md").read_text()
    page = (tmp_path / "docs" / "c_length.md").read_text()
    assert "95 % interval" in page and "c_length.png" in page
    assert Image.open(tmp_path / "docs" / "c_length.png").size[0] > 1000
    trained = sorted((tmp_path / "runs").glob("**/export/transformer/config.json"))
    assert len(trained) == 4  # the start, and three arms

    before = [path.stat().st_mtime_ns for path in trained]
    Trained(tmp_path / "runs", replace(QUICK, seeds=(0,))).generator("long", 0)
    assert [path.stat().st_mtime_ns for path in trained] == before  # trained once
    with pytest.raises(ValueError, match="was trained with another batch, steps"):
        Trained(tmp_path / "runs", replace(QUICK, batch=3, long_steps=4)).generator("long", 0)
    assert {arm.start for arm in ARMS.values()} == {None, "init"}


@pytest.mark.slow
def test_every_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.state_model.NUM_PAIRS", 20)
    trained = Trained(tmp_path / "runs", replace(QUICK, seeds=(0,)))
    for name, experiment in EXPERIMENTS.items():
        report = experiment(trained)
        assert report.name == name and report.claims and report.tables and report.panels
        write(report, tmp_path / "docs")
    summarize(tmp_path / "docs")
    assert (tmp_path / "docs" / "README.md").read_text().count("\n## ") == len(EXPERIMENTS)
