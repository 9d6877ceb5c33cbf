"""Transitions between prompts as cues: cuts, switches, blends over several blocks, and weighted mixes; again to the bit from a timeline."""

import json

import pytest
import torch

from longlive import Cue, LongLivePipeline, PromptSchedule, Timeline, Transition, mix
from longlive.generation.dimensions import Timing
from longlive.generation.mixes import interpolate, parts_of
from longlive.generation.prompt_files import read_scripts

RED = "a red circle moving right on a black background"
BLUE = "a blue square moving up on a white background"
GREEN = "a green ring moving down on a gray background"


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


def video(pipe, *cues, length=18):
    """Latents of a video of these cues."""
    plan = PromptSchedule(tuple(Cue(*cue) for cue in cues))
    return pipe(plan, num_latent_frames=length, generator=torch.Generator().manual_seed(0), output_type="latent").frames


def named(name):
    return Transition.named(name)


def test_what_each_transition_is(pipe):
    """A cut is a video that begins anew; a blend over one block is a switch; all leave what was before alone."""
    made = {name: video(pipe, (0, RED), (6, BLUE, named(name))) for name in ("cut", "switch", "blend:1", "blend:3", "blend:3:slerp")}
    assert torch.equal(made["switch"], video(pipe, (0, RED), (6, BLUE))) and torch.equal(made["switch"], made["blend:1"])
    assert torch.equal(made["cut"], video(pipe, (0, RED), (6, BLUE, Transition(recache="clear"))))
    different = [made[name] for name in ("cut", "switch", "blend:3", "blend:3:slerp")]
    for number, one in enumerate(different):
        assert torch.equal(one[:, :6], different[0][:, :6])
        assert all(not torch.equal(one[:, 6:9], other[:, 6:9]) for other in different[:number])


@pytest.mark.parametrize("how", ["linear", "slerp"])
def test_a_blend_is_one_switch_per_block_to_the_text_between(pipe, how, monkeypatch):
    """Its texts are those of the two prompts, interpolated, and the last is exactly the new prompt's."""
    texts = []
    project = type(pipe.transformer).project_text
    monkeypatch.setattr(type(pipe.transformer), "project_text", lambda self, text: texts.append(text) or project(self, text))
    pipe._conditioner = None
    video(pipe, (0, RED), (6, BLUE, named(f"blend:3:{how}")))
    red, blue = pipe.encode_prompt(RED)[0], pipe.encode_prompt(BLUE)[0]
    expected = [red, interpolate(red, blue, 1 / 3, how), interpolate(red, blue, 2 / 3, how), blue]
    assert len(texts) == 4 and all(torch.equal(text, wanted) for text, wanted in zip(texts, expected))


def test_a_prompt_within_a_blend_starts_from_the_text_of_that_moment(pipe, monkeypatch):
    texts = []
    project = type(pipe.transformer).project_text
    monkeypatch.setattr(type(pipe.transformer), "project_text", lambda self, text: texts.append(text) or project(self, text))
    pipe._conditioner = None
    video(pipe, (0, RED), (3, BLUE, named("blend:4")), (9, GREEN, named("blend:2")))
    red, blue, green = (pipe.encode_prompt(prompt)[0] for prompt in (RED, BLUE, GREEN))
    half = torch.lerp(red, blue, 0.5)
    for text, wanted in zip(texts[1:], [torch.lerp(red, blue, 0.25), half, torch.lerp(half, green, 0.5), green], strict=True):
        torch.testing.assert_close(text, wanted)


@pytest.mark.parametrize("name", ["cut", "blend:3", "blend:2:slerp"])
def test_a_timeline_replays_it_to_the_bit(pipe, name, tmp_path):
    session = pipe.session(RED, seed=3, num_latent_frames=18)
    blocks = [next(session), next(session)]
    session.prompt(BLUE, transition=named(name))
    blocks += [next(session)]
    session.prompt(mix({GREEN: 0.5, RED: 0.5}))
    blocks += list(session)
    session.timeline.save(tmp_path / "a.json")
    timeline = Timeline.load(tmp_path / "a.json")
    assert [cue.latent_frame for cue in timeline.cues] == [0, 6, 9] and timeline.cues[1].transition == named(name)
    again = pipe.session(timeline.schedule, seed=timeline.seed, num_latent_frames=timeline.num_latent_frames)
    assert torch.equal(torch.cat([block.images for block in again], 1), torch.cat([block.images for block in blocks], 1))


def test_a_batch_blends_as_one_video_does(pipe):
    plan = PromptSchedule((Cue(0, RED), Cue(3, BLUE, named("blend:2"))))
    seeds = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    both = pipe(plan, num_latent_frames=9, num_videos_per_prompt=2, generator=seeds, output_type="latent").frames
    torch.testing.assert_close(both[:1], video(pipe, (0, RED), (3, BLUE, named("blend:2")), length=9), atol=1e-5, rtol=0)


def test_mixes(pipe):
    """The weighted sum of embeddings; weights count by their ratio, and a mix of one prompt is the prompt."""
    mixed = mix({RED: 3, BLUE: 1})
    red, blue, embedded = (pipe.encode_prompt(prompt)[0] for prompt in (RED, BLUE, mixed))
    torch.testing.assert_close(embedded, 0.75 * red + 0.25 * blue)
    assert torch.equal(video(pipe, (0, f"{RED}::3|{BLUE}::1"), length=3), video(pipe, (0, mixed), length=3))
    assert torch.equal(video(pipe, (0, f"{RED}::1 | {RED}::0"), length=3), video(pipe, (0, RED), length=3))
    assert parts_of("a | b") is None and parts_of("a ratio of 1::2") is None and parts_of("a::1 | b::-.5") == [("a", 2.0), ("b", -1.0)]
    for prompt, words in ((f"{RED}::1 | {BLUE}", "a part without a weight"), ("a::1 | b::-1", "have no sum above 0")):
        with pytest.raises(ValueError, match=words):
            video(pipe, (0, prompt))
    with pytest.raises(ValueError, match="at least two prompts"):
        mix({RED: 1})


def test_interpolation():
    """The ends are the prompts; slerp keeps the length of tokens of one length and is linear where a token is zero."""
    a, b = (
        torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)),
        torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)),
    )
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    b[:, 3] = 0
    for how in ("linear", "slerp"):
        torch.testing.assert_close(interpolate(a, b, 0.0, how), a)
        torch.testing.assert_close(interpolate(a, b, 1.0, how), b)
        torch.testing.assert_close(interpolate(a, b, 0.3, how), interpolate(b, a, 0.7, how))
        torch.testing.assert_close(interpolate(a, a, 0.3, how), a)
    turned = interpolate(a, b, 0.3, "slerp")
    torch.testing.assert_close(turned.norm(dim=-1)[:, :3], torch.ones(1, 3))
    torch.testing.assert_close(turned[:, 3], 0.7 * a[:, 3])
    angles = [torch.arccos((turned * end).sum(-1))[:, :3] for end in (a, b)]
    torch.testing.assert_close(angles[0] * 0.7, angles[1] * 0.3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cut", Transition(False, "clear")),
        ("switch", Transition(False, "causal")),
        ("blend:4", Transition(False, "causal", 4)),
        ("blend:4:slerp", Transition(False, "causal", 4, "slerp")),
    ],
)
def test_names_keep_what_the_model_does(words, expected):
    assert Transition.named(words, Transition(False, "causal", 2)) == expected


@pytest.mark.parametrize("words", ["fade", "blend", "blend:x", "blend:-1", "blend:3:cubic", "cut:3", "blend:3:slerp:4", 3])
def test_unknown_names(words):
    with pytest.raises(ValueError, match=r"transition .* is unknown; choose cut, switch, blend:N|interpolation 'cubic' is unknown"):
        Transition.named(words)


@pytest.mark.parametrize(("settings", "words"), [({"blend": 0}, "at least 1"), ({"blend": 2, "recache": "clear"}, "keeps the past")])
def test_transitions_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        Transition(**settings)


def test_prompt_files(tmp_path, pipe):
    lines = [
        {"prompts": ["a", "b::1 | c::1", "d"], "switch_frame_indices": [6, 12], "transitions": ["cut", None]},
        {"prompts": [{"text": "a", "seconds": 2}, {"text": "b", "seconds": 2, "transition": "blend:2:slerp"}]},
        {"prompts": ["a", "b"], "switch_frame_indices": [6]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second, third = (script.schedule(Timing(), Transition(keep_sink=False)) for script in read_scripts(tmp_path / "a.jsonl"))
    assert [cue.transition for cue in first.cues] == [None, Transition(False, "clear"), None]
    assert [cue.transition for cue in second.cues] == [None, Transition(False, "joint", 2, "slerp")]
    assert [cue.transition for cue in third.cues] == [None, None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompts": ["a", "b"], "switch_frame_indices": [6], "transitions": ["fade"]}, "line 1: transition 'fade' is unknown"),
        ({"prompts": ["a", "b"], "switch_frame_indices": [6], "transitions": ["cut", "cut"]}, "need a list of 1 transitions"),
        ({"prompts": [{"text": "a", "seconds": 2, "transition": "cut"}]}, "there is nothing before it"),
        ({"prompts": [{"text": "a", "seconds": 2}], "transitions": []}, "beside seconds each prompt says its transition"),
        ({"prompts": ["a::1 | b"]}, "a part without a weight"),
    ],
)
def test_prompt_files_that_are_refused(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=words):
        read_scripts(tmp_path / "a.jsonl")
