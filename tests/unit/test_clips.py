"""Long videos handed out in clips: where each begins, what in it is new, under which prompt, and that the video goes on after a stop."""

import io
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.cache.history import HistoryCache
from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import Euler, FewStep
from longlive.generation.transition import Transition
from longlive.ops.rope import Rope
from longlive.parallel.world import SharedChoices, World
from longlive.training.clips import StreamingTuner, anchor_frame
from longlive.training.prompts import PromptSampler

BLOCK, CLIP, OVERLAP = 3, 21, 3


class Recorder:
    """A rollout whose frames say where in the video they are; it writes down what is asked of it."""

    def __init__(self, steps=4):
        self.cache = HistoryCache(num_layers=1, batch=1, num_heads=1, rope=Rope(1, 1, 2), window=Window(3, 9))
        self.solver = Euler(list(range(steps)))
        self.denoiser = SimpleNamespace(network=SimpleNamespace(project_text=lambda text: self.log.append(("read", text)) or text))
        self.log, self.weights = [], {}

    @property
    def end(self):
        return self.cache.end

    def reset(self):
        self.cache.reset()
        self.log.append(("reset",))

    def switch(self, text, transition):
        self.log.append(("switch", self.end, int(text[0, 0, 0]), transition))

    def block(self, noise, text, *, num_passes, grad):
        self.log.append(("block", self.end, int(text[0, 0, 0]), num_passes, grad))
        frames = torch.arange(self.end, self.end + noise.shape[1]).float().view(1, -1, 1, 1, 1).expand_as(noise)
        self.weights[self.end] = torch.ones((), requires_grad=grad)
        return frames * self.weights[self.end]

    def remember(self, x0, text):
        assert torch.equal(x0.detach()[0, :, 0, 0, 0], torch.arange(self.end, self.end + x0.shape[1]))
        self.log.append(("remember", self.end, int(text[0, 0, 0])))
        self.cache._extent.end += x0.shape[1]


class Numbered:
    """Batch k has the prompts 10 k and, after the switch, 10 k + 5."""

    def __init__(self, switch=True):
        self.batches, self.switch = 0, switch

    def next(self):
        self.batches += 1
        return [(str(10 * self.batches), *([str(10 * self.batches + 5)] if self.switch else []))] * 2


def recorded(rollout=None, prompts=None, **settings):
    """A tuner over a recorder; a text's embedding is the number it says."""
    return StreamingTuner(
        rollout or Recorder(),
        prompts or Numbered(),
        embed=lambda texts: torch.tensor([float(text) for text in texts])[:, None, None],
        noise=lambda frames: torch.zeros(2, frames, 1, 1, 1),
        choices=SharedChoices(0, World()),
        **{"block": BLOCK, "clip_frames": CLIP, "overlap": OVERLAP} | settings,
    )


def positions(clip):
    """Of every frame of the clip in its video."""
    return clip.latents.detach()[0, :, 0, 0, 0].long().tolist()


def asked(rollout, what):
    return [entry[1:] for entry in rollout.log if entry[0] == what]


def test_240_frames_are_13_clips_and_then_a_new_video_begins():
    tuner = recorded()
    for video in (1, 2):
        starts = []
        for number in range(13):
            assert tuner.between_videos == (number == 0)
            clip = tuner.clip(grad=False)
            starts.append(clip.frames.start)
            first = number == 0
            assert positions(clip) == list(range(clip.frames.stop - CLIP, clip.frames.stop))
            assert len(clip.frames) == (CLIP if first else CLIP - OVERLAP)
            assert clip.fresh.tolist() == [[first] * OVERLAP + [True] * (CLIP - OVERLAP)] * 2
            assert clip.prompts == (str(10 * video),) * 2 and (clip.text == 10 * video).all()
        assert starts == [0, *range(21, 220, 18)] and clip.frames.stop == tuner.rollout.end == 237
        assert tuner.between_videos
    made, remembered = asked(tuner.rollout, "block"), asked(tuner.rollout, "remember")
    assert [entry[0] for entry in made] == [entry[0] for entry in remembered] == 2 * list(range(0, 237, BLOCK))
    assert len(asked(tuner.rollout, "read")) == 26  # weights change between clips, and what is read of a prompt with them
    assert len(asked(tuner.rollout, "reset")) == 2 and not asked(tuner.rollout, "switch")


def test_videos_one_clip_long_are_the_initial_stage():
    tuner = recorded(max_frames=(CLIP,))
    for number in range(1, 4):
        clip = tuner.clip(grad=True)
        assert clip.fresh.all() and positions(clip) == list(range(CLIP)) and clip.prompts == (str(10 * number),) * 2
        assert tuner.between_videos
    assert len(asked(tuner.rollout, "reset")) == 3


def test_every_clip_has_one_exit_step_and_all_occur():
    tuner, found = recorded(), []
    for number in range(60):
        tuner.rollout.log.clear()
        tuner.clip(grad=number % 2 == 0)
        (passes,) = {entry[2:] for entry in asked(tuner.rollout, "block")}
        assert passes[1] == (number % 2 == 0)
        found.append(passes[0])
    assert set(found) == {1, 2, 3, 4}


@pytest.mark.parametrize("transition", [Transition(True), Transition(False, "causal")], ids=str)
def test_a_switch_is_read_and_recached_before_the_first_block_of_its_clip(transition):
    tuner = recorded(switch_at=(39,), transition=transition)
    clips = [tuner.clip(grad=False) for _ in range(13)]
    for clip in clips:  # the losses know one prompt for the whole clip: from the switch on the new one
        said = 15 if clip.frames.start >= 39 else 10
        assert (clip.text == said).all() and clip.prompts == (str(said),) * 2
        assert clip.earlier == (str(15 if clip.frames.start > 39 else 10),) * 2
    log = [entry[:3] if entry[0] != "read" else ("read", int(entry[1][0, 0, 0])) for entry in tuner.rollout.log]
    assert asked(tuner.rollout, "switch") == [(39, 15, transition)]
    place = log.index(("switch", 39, 15))
    assert log[place - 2 : place + 2] == [("remember", 36, 10), ("read", 15), ("switch", 39, 15), ("block", 39, 15)]
    assert all(entry[-1] == (15 if entry[1] >= 39 else 10) for entry in log if entry[0] in ("block", "remember"))


def test_lengths_and_switches_are_chosen_for_each_video_and_every_switch_happens():
    """57 frames end with the clip at 39, 48 and 39 with that at 21: there a switch at 39 would never come."""
    tuner, found = recorded(max_frames=(39, 48, 57), switch_at=(21, 39)), set()
    for _ in range(60):
        starts, changes = [], []
        while True:
            clip = tuner.clip(grad=False)
            starts.append(clip.frames.start)
            changes.append(clip.prompts[0][-1] == "5")
            if tuner.between_videos:
                break
        found.add((len(starts), starts[changes.index(True)]))
    assert found == {(2, 21), (3, 21), (3, 39)}


def test_several_switches_each_take_the_next_prompt_of_the_chain():
    """Every choice of frames occurs; each switch recaches before the first block of its clip, under the prompt that is next."""
    chains = SimpleNamespace(next=lambda: [("10", "11", "12", "13")] * 2)
    tuner, found = recorded(prompts=chains, max_frames=(57, 93), switch_at=(21, 39, 57, 75), num_switches=3), set()
    for _ in range(60):
        tuner.rollout.log.clear()
        said = {}
        while not said or not tuner.between_videos:
            clip = tuner.clip(grad=False)
            said[clip.frames.start] = int(clip.prompts[0])
            assert (clip.text == said[clip.frames.start]).all()
        switches = [(frame, text) for frame, text, _ in asked(tuner.rollout, "switch")]
        assert switches == [(frame, text) for (_, before), (frame, text) in pairwise(said.items()) if text != before]
        assert [text for _, text in switches] == [11, 12, 13][: len(switches)]
        found.add(tuple(frame for frame, _ in switches))
    assert found == {(21, 39), (21, 39, 57), (21, 39, 75), (21, 57, 75), (39, 57, 75)}  # 57 frames have room for two only


def test_one_switch_is_chosen_as_ever():
    """The default draws as it did before there could be several: the same lengths, frames and exit steps."""
    tuner, drawn = recorded(max_frames=(39, 48, 57), switch_at=(21, 39)), SharedChoices(0, World())
    for _ in range(20):
        length = drawn.pick((39, 48, 57))
        switch = drawn.pick([frame for frame in (21, 39) if frame in range(21, length - 17, 18)])
        tuner.rollout.log.clear()
        while not asked(tuner.rollout, "block") or not tuner.between_videos:
            passes = 1 + drawn.integer(4)
            assert tuner.clip(grad=False) and asked(tuner.rollout, "block")[-1][2] == passes
        assert [entry[0] for entry in asked(tuner.rollout, "switch")] == [switch]


def test_the_anchor_is_given_the_frames_up_to_its_own_and_stands_first():
    weight, given = torch.ones((), requires_grad=True), []

    def anchor(frames):
        given.append((frames[0, :, 0, 0, 0].tolist(), frames.requires_grad))
        return (1000 + frames[:, -1:]) * weight

    tuner = recorded(anchor=anchor)
    for number in range(4):
        clip = tuner.clip(grad=True)
        end = clip.frames.stop
        first = [end - CLIP + (1000 if number else 0)]
        assert positions(clip) == first + list(range(end - CLIP + 1, end))
    # whole[:, :19] of 21 frames of before and 18 new ones; the video goes on from its raw frames, not from the anchor
    assert given == [(list(range(end - CLIP - 18, end - CLIP + 1)), False) for end in (39, 57, 75)]
    clip.latents.sum().backward()
    assert weight.grad is None


def test_only_new_frames_carry_a_gradient():
    tuner = recorded()
    for _ in range(3):
        before = dict(tuner.rollout.weights)
        clip = tuner.clip(grad=True)
        own = [tuner.rollout.weights[start] for start in range(clip.frames.start, clip.frames.stop, BLOCK)]
        gradients = torch.autograd.grad(clip.latents.sum(), [*own, *before.values()], allow_unused=True, retain_graph=True)
        assert [g is not None for g in gradients] == [True] * len(own) + [False] * len(before)
        old = clip.latents[~clip.fresh].sum()
        if len(before):
            assert not any(g.any() for g in torch.autograd.grad(old, own))
    assert not tuner.clip(grad=False).latents.requires_grad


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (
        ({"clip_frames": 20}, "clip_frames 20 cannot be cut into blocks of 3"),
        ({"overlap": 4}, "overlap 4 cannot be cut into blocks of 3"),
        ({"overlap": 0}, "clips of 21 frames cannot overlap by 0"),
        ({"overlap": 21}, "clips of 21 frames cannot overlap by 21"),
        ({"max_frames": (240, 18)}, "shorter than a clip of 21"),
        ({"max_frames": ()}, "shorter than a clip of 21"),
        ({"switch_at": (21, 40)}, "no clip starts at frame 40 in videos of 240 frames; prompts can switch at 21, 39, 57"),
        ({"switch_at": (0,)}, "no clip starts at frame 0"),
        ({"switch_at": (237,)}, "no clip starts at frame 237"),  # 3 frames are left there, too few
        ({"max_frames": (48,), "switch_at": (39,)}, "no clip starts at frame 39 in videos of 48 frames; prompts can switch at 21$"),
        ({"max_frames": (21,), "switch_at": (21,)}, "these videos are one clip long"),
        ({"switch_at": (21, 39), "num_switches": 3}, "num_switches 3: choose 1 to 2"),
        ({"num_switches": 0}, "num_switches 0: choose 1 to 1"),
        ({"num_switches": 3}, "num_switches 3: choose 1 to 1"),  # without switch_at there is no switch at all
    ):
        with pytest.raises(ValueError, match=message):
            recorded(**settings)
    recorded(max_frames=(240,), switch_at=(219,))
    ring = RingCache(num_layers=1, batch=1, num_heads=1, rope=Rope(1, 1, 2), window=Window(3, 9))
    with pytest.raises(ValueError, match="needs a HistoryCache, which never overwrites what a gradient may need; got a RingCache"):
        recorded(SimpleNamespace(cache=ring))
    with pytest.raises(ValueError, match="prompt '10' has no switch prompt"):
        recorded(prompts=Numbered(switch=False), switch_at=(21,)).clip(grad=False)
    with pytest.raises(ValueError, match="prompt '10' is followed by 1 prompts, and its video switches 2 times"):
        recorded(switch_at=(21, 39), num_switches=2).clip(grad=False)


def real(model, noise, **settings):
    """A tuner over a network: clips of 9 frames, videos of 21 or 27, a switch in each, or two."""
    pairs = [(f"a{n}", f"b{n}", f"c{n}") for n in range(5)]
    words = {text: torch.randn(5, 8, generator=torch.Generator().manual_seed(n)) for n, text in enumerate(sum(pairs, ()))}
    draw = lambda frames: torch.randn(1, frames, 4, 4, 4, generator=noise)  # noqa: E731
    rollout = Rollout(
        Denoiser(model), history_cache(model, 4, 4, window=Window(3, 6)), FewStep([1000.0, 625.0], lambda latents: draw(latents.shape[1]))
    )
    return StreamingTuner(
        rollout,
        PromptSampler(pairs, batch=1, seed=3),
        embed=lambda texts: torch.stack([words[text] for text in texts]),
        noise=draw,
        choices=SharedChoices(1, World()),
        clip_frames=9,
        max_frames=(21, 27),
        switch_at=(9, 15),
        **settings,
    )


@pytest.mark.parametrize("keep_sink, num_switches", [(False, 1), (True, 1), (False, 2)])
def test_stopped_anywhere_a_video_goes_on_bit_for_bit(model, keep_sink, num_switches):
    noise = torch.Generator().manual_seed(0)
    settings = {"transition": Transition(keep_sink), "num_switches": num_switches}
    tuner, files, made = real(model, noise, **settings), [], []
    for _ in range(7):
        file = io.BytesIO()
        torch.save((tuner.state(), tuner.choices.state(), noise.get_state()), file)
        files.append((file, tuner.between_videos))
        made.append(tuner.clip(grad=False))
    assert {between for _, between in files} == {True, False}
    for cut, (file, between) in enumerate(files):
        file.seek(0)
        state, choices, drawn = torch.load(file)
        assert (state["video"] is None) == between  # nothing half-made is saved between videos
        noise = torch.Generator()
        resumed = real(model, noise, **settings)
        resumed.clip(grad=False)  # leaves traces, which must all be gone
        resumed.load(state)
        resumed.choices.load(choices)
        noise.set_state(drawn)
        assert resumed.between_videos == between
        for expected in made[cut : cut + 3]:
            clip = resumed.clip(grad=False)
            assert torch.equal(clip.latents, expected.latents) and torch.equal(clip.text, expected.text)
            assert (clip.frames, clip.prompts) == (expected.frames, expected.prompts)


@pytest.fixture(scope="module")
def vae():
    """Small enough that the decoder's memory is shorter than what it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=0,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 0.8, 1.2, 0.9],
        )
    return network.eval().requires_grad_(False)


def test_a_clip_never_waits_for_the_device(model, vae):
    """Tensors on the meta device have no values: whatever would fetch one to the host fails."""
    autoencoder = AutoencoderKLWan.from_config(vae.config).to("meta")

    def latents(frames):
        return torch.empty(1, frames, 4, 4, 4, device="meta")

    def tuner(watch):
        rollout = Rollout(
            Denoiser(model.to("meta")),
            history_cache(model, 4, 4, window=Window(3, 6)),
            FewStep([1000.0, 500.0], torch.empty_like),
            on_step=watch,
        )
        prompts = PromptSampler([("a", "b")], batch=1, seed=0)
        return StreamingTuner(
            rollout,
            prompts,
            embed=lambda texts: torch.empty(1, 5, 8, device="meta"),
            noise=latents,
            choices=SharedChoices(0, World()),
            clip_frames=6,
            max_frames=(12,),
            switch_at=(6,),
            anchor=partial(anchor_frame, autoencoder, context=2),
        )

    made = tuner(None)
    assert [made.clip(grad=True).latents.shape[1] for _ in range(3)] == [6] * 3
    for fetch in (lambda x: x.sum().item(), lambda x: bool(x.any()), torch.Tensor.tolist, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            tuner(lambda number, t, x0, fetch=fetch: fetch(x0) and None).clip(grad=True)


def whole(vae, frames):
    """Decoded at once by diffusers; the last image encoded at once by diffusers."""
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    images = vae.decode(frames.transpose(1, 2) * std + mean).sample
    return ((vae.encode(images[:, :, -1:]).latent_dist.mode() - mean) / std).transpose(1, 2)


def test_the_anchor_is_the_last_image_encoded_alone(vae):
    frames = torch.randn(2, 24, 4, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    anchor = anchor_frame(vae, frames)
    assert anchor.shape == (2, 1, 4, 2, 2) and not anchor.requires_grad
    torch.testing.assert_close(anchor, whole(vae, frames.detach()), atol=1e-5, rtol=0)
    assert (anchor - frames[:, -1:]).abs().max() > 0.1  # it is another frame than the raw one
    assert torch.equal(anchor_frame(vae, frames, context=24), anchor) and torch.equal(anchor_frame(vae, frames, context=99), anchor)
    errors = [(anchor_frame(vae, frames, context=context) - anchor).abs().max().item() for context in (1, 22)]
    assert errors[0] > 1e-3 and errors[1] < 1e-6  # 22 frames are all that the decoder can remember
    torch.testing.assert_close(anchor_frame(vae, frames, context=2), whole(vae, frames.detach()[:, -2:]), atol=1e-5, rtol=0)


def test_defaults_are_those_of_the_paper():
    """Clips of 21 latent frames, 3 of them shared, blocks of 3, videos of 240; the sink is written anew at a switch."""
    tuner = StreamingTuner(Recorder(), Numbered(), embed=torch.tensor, noise=torch.zeros, choices=SharedChoices(0, World()))
    assert (tuner.block, tuner.clip_frames, tuner.overlap, tuner.max_frames, tuner.switch_at) == (3, 21, 3, (240,), ())
    assert tuner.anchor is None and tuner.transition == Transition(keep_sink=False, recache="joint")


def test_blocks_of_one_frame_may_overlap_by_one():
    tuner = recorded(block=1, clip_frames=4, overlap=1, max_frames=(7,))
    assert [tuner.clip(grad=False).frames for _ in range(2)] == [range(0, 4), range(4, 7)] and tuner.between_videos


def test_a_clip_must_fit_whole_where_a_switch_is():
    """In a video of 56 latent frames, 17 follow frame 39, where a clip needs 18."""
    with pytest.raises(ValueError, match="no clip starts at frame 39 in videos of 56 frames"):
        recorded(max_frames=(56,), switch_at=(39,))
    recorded(max_frames=(57,), switch_at=(39,))


def test_a_text_is_projected_with_a_gradient_only_where_one_is_wanted():
    tuner, seen = recorded(), []
    network = tuner.rollout.denoiser.network
    project = network.project_text
    network.project_text = lambda text: seen.append(torch.is_grad_enabled()) or project(text)
    for grad in (True, False):
        tuner.clip(grad=grad)
    assert seen == [True, False]


def test_a_state_holds_no_more_than_the_clip(model):
    """`previous` is a part of a longer tensor; saved as it is, it would take all of that along."""
    tuner = real(model, torch.Generator().manual_seed(0))
    for _ in range(2):
        tuner.clip(grad=False)
    previous = tuner.state()["video"]["previous"]
    assert previous.untyped_storage().nbytes() == previous.numel() * previous.element_size()


def test_the_length_of_a_video_under_way_is_loaded(model):
    tuner = real(model, torch.Generator().manual_seed(0))
    tuner.clip(grad=False)
    state = tuner.state()
    resumed = real(model, torch.Generator().manual_seed(0))
    resumed.load(state)
    assert not resumed.between_videos and resumed.rollout.end == 9


def test_an_anchor_needs_a_frame_and_keeps_the_dtype(vae):
    frames = torch.randn(1, 3, 4, 2, 2)
    with pytest.raises(ValueError, match="anchor_context 0: choose 1 frame or more"):
        anchor_frame(vae, frames, context=0)
    assert anchor_frame(vae, frames.double(), context=1).dtype == torch.float64
