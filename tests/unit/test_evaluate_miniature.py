"""The evaluation of the miniature: switches read from renders whose truth is known, intervals, batches, and the table."""

import json
from pathlib import Path

import pytest
import torch

from longlive.generation.cues import PromptSchedule
from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature import oracle
from longlive.miniature.captions import SwitchPair, canonical, parse
from longlive.miniature.switches import AFTER, WATCHED, after_switch, images_needed, switch_pairs
from longlive.miniature.world import (
    ATTRIBUTES,
    COLORS,
    LIGHTS,
    Captioned,
    Identity,
    all_captioned,
    draw_identity,
    held_out,
    render,
    training_set,
)
from scripts import evaluate_miniature
from scripts.evaluate_miniature import Sentences, generate, mean, share, table

AT, LENGTH = 20, 20 + WATCHED + 1


@pytest.fixture(scope="module")
def pairs():
    return switch_pairs(held_out(), 4, seed=1, old=all_captioned())


@pytest.fixture(scope="module")
def pipe():
    return LongLivePipeline.from_pretrained("miniature")


def videos(pairs, *, until=AT, light=0, x=0):
    """Renders that show the old caption for `until` images; from the switch on with another light or elsewhere."""
    generator = torch.Generator().manual_seed(2)
    first = [draw_identity(generator) for _ in pairs]
    said = [[pair.before] * until + [pair.after] * (LENGTH - until) for pair in pairs]
    changed = [Identity(i.radius, i.x + x, i.y, (i.light + light) % LIGHTS) for i in first]
    return torch.cat([render(said, first, LENGTH)[:, :AT], render(said, changed, LENGTH)[:, AT:]], dim=1)


def test_pairs_end_in_held_out_captions_and_begin_there_where_they_can(pairs):
    many, new = switch_pairs(held_out(), 50, seed=1, old=all_captioned()), set(held_out())
    assert [pair.attribute for pair in many] == list(ATTRIBUTES) * 50 and len(set(many)) == 200
    for pair in many:
        assert pair.after in new and pair.before.with_one_change(pair.attribute, getattr(pair.after, pair.attribute)) == pair.after
    assert sum(pair.before not in new for pair in many) == 4  # of shape, of which there are only 46
    assert many[:16] != switch_pairs(held_out(), 4, seed=2, old=all_captioned()) and many[:16] == pairs
    with pytest.raises(ValueError, match="differ in shape alone, not 50"):
        switch_pairs(held_out(), 50, seed=1, old=[])


def test_a_perfect_switch(pairs):
    found = after_switch(videos(pairs), pairs, AT)
    means = {name: value.float().mean() for name, value in found.outcomes().items()}
    assert means.pop("lost") == 0 and len(means) == 6 and all(value == 1 for value in means.values())
    assert found.jump.max() < 1.5 and found.size.abs().max() < 0.1 and found.turn.abs().max() < 0.06


def test_what_a_switch_fails_to_change(pairs):
    late = after_switch(videos(pairs, until=AT + AFTER + 8), pairs, AT)
    assert not late.new.any() and not late.right.any() and (late.kept == 1).all()


@pytest.mark.parametrize("change, name", [({}, "size"), ({"light": 3}, "light"), ({"x": 24}, "position")])
def test_what_no_prompt_describes_is_compared_across_the_switch(pairs, change, name):
    same = [pair._replace(before=pair.after) for pair in pairs]  # a new shape is read with another size, by a few per cent
    images = videos(same, **change)
    if name == "size":
        sizes = [(10.0, AT), (14.0, LENGTH - AT)]
        images = torch.cat([render([pair.after for pair in same], [Identity(r, 8, 8, 0) for _ in same], n) for r, n in sizes], dim=1)
    outcomes = after_switch(images, same, AT).outcomes()
    assert not outcomes[name].any() and all(outcomes[other].all() for other in {"position", "size", "light"} - {name, "position"})


def test_a_subject_is_lost_when_it_is_gone_for_a_latent_frame(pairs):
    images = videos(pairs)
    for image in range(AT + 20, AT + 23):
        images[:, image] = images[:, image, :, :1, :1]  # nothing but background
    assert not after_switch(images, pairs, AT).lost.any()
    images[:, AT + 23] = images[:, AT + 23, :, :1, :1]
    found = after_switch(images, pairs, AT)
    assert found.lost.all() and not found.right.any()
    with pytest.raises(ValueError, match="24 images must follow it"):
        after_switch(images[:, : AT + 23], pairs, AT)
    assert images_needed(AT) == range(12, LENGTH) and images_needed(3).start == 0


@pytest.mark.parametrize("side, lost", [(9, True), (15, False)])
def test_a_subject_is_lost_when_little_of_it_is_left(side, lost):
    caption = Captioned("square", "red", "black", "still")
    images = render([caption], [Identity(14.0, 32, 32, 0)], LENGTH)
    images[:, AT + 8 :] = images[:, AT + 8 :, :, :1, :1]
    images[:, AT + 8 :, :, 20 : 20 + side, 20 : 20 + side] = torch.tensor(COLORS["red"], dtype=torch.uint8)[:, None, None]
    assert after_switch(images, [SwitchPair(caption, caption, "shape")], AT).lost.item() == lost


def test_oracle_reads_the_light():
    captions, generator = all_captioned(), torch.Generator().manual_seed(0)
    identities = [draw_identity(generator) for _ in captions]
    found = oracle.read(render(captions, identities, 1)).light[:, 0]
    true = torch.tensor([identity.light for identity in identities]) * 2 * torch.pi / LIGHTS
    apart = ((found - true + torch.pi) % (2 * torch.pi) - torch.pi).abs()
    assert apart.max() < 0.1
    assert oracle.read(torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)).light.isnan().all()


def test_intervals():
    """Wilson's interval of 97 of 100 (Newcombe 1998's formula gives 91.55 to 98.97 %), and the normal one."""
    assert share(torch.tensor([1.0] * 97 + [0.0] * 3)) == (0.97, pytest.approx(0.9155, abs=1e-4), pytest.approx(0.9897, abs=1e-4))
    assert share(torch.ones(200)) == (1.0, pytest.approx(0.9812, abs=1e-4), 1.0) and share(torch.zeros(3)).low == 0
    assert mean(torch.tensor([1.0, 2.0, 3.0, torch.nan])) == (2.0, pytest.approx(2 - 1.1316, abs=1e-4), pytest.approx(3.1316, abs=1e-4))


def test_a_batch_holds_the_videos_that_the_pipeline_makes_alone(pipe):
    said = [[canonical(c), canonical(c.with_one_change("motion", "up"))] for c in held_out(3)]
    together = generate(pipe, said, num_latent_frames=6, seed=7, switch_at=[3], batch=2)
    assert together.shape == (3, 21, 3, 64, 64)
    for number, prompts in enumerate(said):
        schedule = PromptSchedule.at_latent_frames(prompts, [3])
        session = pipe.session(schedule, num_latent_frames=6, generator=torch.Generator().manual_seed(7 + number))
        alone = torch.cat([block.images for block in session], dim=1)[0].movedim(-1, 1)
        assert (together[number].int() - alone.int()).abs().max() <= 2
    assert not together[0, 9:].equal(generate(pipe, [said[0][:1]], num_latent_frames=6, seed=7)[0, 9:])


def test_the_end_of_a_long_video_is_decoded_alone(pipe):
    said = [[canonical(held_out(1)[0])]]
    whole = generate(pipe, said, num_latent_frames=48, seed=1)
    assert whole[:, -16:].equal(generate(pipe, said, num_latent_frames=48, seed=1, last=16))


def test_sets_differ_in_sentences_only():
    one, two, again = ([Sentences(number)(c) for c in held_out(20)] for number in (1, 2, 2))
    assert one == [canonical(c) for c in held_out(20)] and two == again and not set(one) & set(two)
    say = Sentences(2)
    assert all(parse(say(c)) == vars(c) for c in held_out(20))


def test_the_table_says_what_is_met():
    results = {"prompts": {"shape": [0.97, 0.9, 1.0], "color": [0.96, 0.9, 1.0]}, "switches": {"all": {"lost": [0.005, 0.0, 0.03]}}}
    lines = table(results).splitlines()
    assert lines[2:] == [
        "| shape | ≥ 97% | 97% [90%, 100%] | yes |",
        "| color | ≥ 97% | 96% [90%, 100%] | no |",
        "| switch: subject lost within 3 s | ≤ 0.0% | 0.5% [0.0%, 3.0%] | no |",
    ]
    assert table({"speed": {"megabytes": [12.5, 12.5, 12.5]}}).endswith("| weights, MB | ≤ 25.0 | 12.5 | yes |")


def test_the_command(tmp_path, capsys, monkeypatch):
    tiny = evaluate_miniature.Amount(prompts=3, minute=3.0, per_kind=1, runs=2, reconstructions=((9, 2),))
    monkeypatch.setattr(evaluate_miniature, "QUICK", tiny)
    monkeypatch.chdir(tmp_path)
    assert evaluate_miniature.main(["--quick"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 10 + 3 + 3 + 12 + 2 and all(row.count("|") == 5 for row in rows)
    folder = Path("outputs/miniature")
    pictures = {f"contact_sheet_{name}.png" for name in ("prompts", "minute", "switches")}
    assert {path.name for path in folder.iterdir()} == pictures | {"results.json"}
    before = json.loads((folder / "results.json").read_text())
    assert before["switches"]["videos"] == 4 and before["minute_last_second"]["seconds"] == 3 and before["autoencoder_9"]["videos"] == 2
    assert evaluate_miniature.main(["--quick", "--parts", "prompts", "--set", "2", "--num-prompts", "2"]) == 0
    assert json.loads((folder / "results_2.json").read_text())["prompts"]["videos"] == 2
    assert json.loads((folder / "results.json").read_text()) == before
    assert evaluate_miniature.main(["--quick", "--num-prompts", "101"]) == 2 and "choose 2 to 100" in capsys.readouterr().err
    assert evaluate_miniature.main(["--quick", "--model", "nowhere"]) == 2 and "nowhere holds no pipeline" in capsys.readouterr().err


def test_captions_of_the_test_are_never_trained_on():
    assert not set(held_out()) & set(training_set())
