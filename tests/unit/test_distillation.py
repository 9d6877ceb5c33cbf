"""Which clip trains which network; a run goes on bit for bit, alone and as two processes; what is exported is what was trained."""

import io
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.cache.window import Window
from longlive.checkpoints import store
from longlive.checkpoints.lora import load_lora
from longlive.config import DistillationConfig
from longlive.engine.apply import Recipe, Sharding, apply
from longlive.engine.sharding import full_state
from longlive.generation.caches import history_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.lora import add_lora, lora_state, merge_lora
from longlive.models.wan import WanTransformer
from longlive.parallel.world import SharedChoices, World, gather, get_world, joined, rank_generator
from longlive.training.clips import StreamingTuner
from longlive.training.distillation import DistillationStage
from longlive.training.dmd import DMD, GeneratorLoss
from longlive.training.ema import EMA
from longlive.training.networks import TrainableNetwork, load_network, write_transformer
from longlive.training.prompts import PromptSampler
from longlive.training.trainer import Checkpoints
from longlive.training.validation import Preview
from tests.processes import run_ranks

PAIRS = [(f"old {n}", f"new {n}") for n in range(6)]
WORDS = {text: torch.randn(5, 8, generator=torch.Generator().manual_seed(n)) for n, text in enumerate(sum(PAIRS, ()))}


def small_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanTransformer(in_dim=4, out_dim=4, dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=5, num_heads=2, num_layers=2)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def embed(texts):
    return torch.stack([WORDS[text] for text in texts])


class Watched(Rollout):
    """Writes down noise and exit step of every block."""

    def block(self, noise, text, *, num_passes=None, grad=False, guided=True):
        self.blocks.append((self.end, num_passes, noise.sum().item()))
        return super().block(noise, text, num_passes=num_passes, grad=grad, guided=guided)


class Recording(DMD):
    """Writes down what each network is trained on."""

    def generator_loss(self, clip, text, negative, **told):
        self.log.append(("generator", clip, text, told["fresh"]))
        return super().generator_loss(clip, text, negative, **told)

    def critic_loss(self, clip, text, **told):
        self.log.append(("critic", clip, text, told["fresh"]))
        return super().critic_loss(clip, text, **told)


def make_stage(*, rank=None, average=True, seed=0, world=World(), **settings):  # noqa: B008  # a constant
    """Clips of 6 frames from videos of 12 or 15, each with a switch. `seed` is that of everything but frozen weights."""
    adapters = rank is not None
    generator, critic = (small_network(n if adapters else n + 100 * seed) for n in range(2))
    teacher = small_network(2).requires_grad_(False)
    ema = EMA(generator, decay=0.9, warm_up=False) if average and not adapters else None
    learners = []
    for network, lr in ((generator, 1e-3), (critic, 2e-3)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of adapters
            learners.append(TrainableNetwork(network, lr=lr, lora_rank=rank, recipe=Recipe(checkpointing=True, sharding=Sharding())))
    for frozen in (teacher, *([ema.average] if ema else [])):
        apply(frozen, Recipe(sharding=Sharding()))
    random = {name: rank_generator(seed + n, world.rank) for n, name in enumerate(("noise", "timesteps"))}
    noise = lambda frames: torch.randn(1, frames, 4, 4, 4, generator=random["noise"])  # noqa: E731
    cache = history_cache(generator, 4, 4, window=Window(3, 6))
    rollout = Watched(Denoiser(generator), cache, FewStep([1000.0, 625.0], lambda latents: noise(latents.shape[1])))
    rollout.blocks = []
    tuner = StreamingTuner(
        rollout,
        PromptSampler(PAIRS, batch=1, seed=4, rank=world.rank, size=world.size),
        embed=embed,
        noise=noise,
        choices=SharedChoices(seed + world.rank, world),  # the first rank's counts
        clip_frames=6,
        max_frames=(12, 15),
        switch_at=(6, 9),
    )
    objective = Recording(Denoiser(teacher), Denoiser(critic))
    objective.log = []
    return DistillationStage(
        DistillationConfig(**settings),
        tuner,
        objective,
        *learners,
        steps=10,
        negative=torch.zeros(1, 5, 8),
        random=random,
        validate=lambda network, folder, number: {"mean": answer(network).mean().item()},
        world=world,
        average=ema,
    )


def weights_of(stage):
    return [[weight.detach().clone() for weight in learner.weights] for learner in (stage.generator, stage.critic)]


def changed(before, after):
    return [not all(map(torch.equal, b, a)) for b, a in zip(before, after)]


def test_generator_and_critic_take_turns_with_the_clips_of_one_stream():
    """Of 6 clips in 5 steps the first trains the generator, the next the critic in the same step, the others the critic."""
    stage = make_stage()
    clips, made = [], stage.tuner.clip

    def watched(*, grad):
        clips.append((made(grad=grad), grad))
        return clips[-1][0]

    stage.tuner.clip = watched
    for number in range(10):
        stage.objective.log.clear()
        clips.clear()
        before = weights_of(stage)
        metrics = stage.step(number)
        trained = ["generator", "critic"] if number % 5 == 0 else ["critic"]
        assert [entry[0] for entry in stage.objective.log] == trained
        assert changed(before, weights_of(stage)) == ["generator" in trained, True]
        assert {name.split("/")[0] for name in metrics} - {"video"} == set(trained)
        assert len(clips) == len(trained)
        for (who, latents, text, fresh), (clip, grad) in zip(stage.objective.log, clips):
            assert latents is clip.latents and fresh is clip.fresh and torch.equal(text, embed(clip.prompts))
            assert grad == latents.requires_grad == (who == "generator")
        assert metrics["video/frames"] == clip.frames.stop
        assert all(weight.grad is None for learner in (stage.generator, stage.critic) for weight in learner.weights)
    starts = [end for end, _, _ in stage.tuner.rollout.blocks]
    assert all(later in (0, earlier + 3) for earlier, later in pairwise(starts))
    videos = starts.count(0)
    assert videos in (3, 4) and len(starts) == 12 + videos  # a block a clip, and one more in the first of a video


def test_accumulated_clips_count_as_one_batch(monkeypatch):
    stage = make_stage(critic_updates=1, gradient_accumulation=3)
    weight, other = stage.generator.weights[0], stage.critic.weights[0]
    factors, given = iter((1.0, 10.0, 3.0, 20.0, 5.0, 60.0)), []

    def generator_loss(clip, *_, **__):
        return GeneratorLoss(next(factors) * weight.sum(), torch.zeros_like(clip), clip)

    monkeypatch.setattr(stage.objective, "generator_loss", generator_loss)
    monkeypatch.setattr(stage.objective, "critic_loss", lambda *_, **__: next(factors) * other.sum())
    sums = weight.sum().item(), other.sum().item()
    for learner in (stage.generator, stage.critic):
        monkeypatch.setattr(
            learner, "update", lambda max_norm, lr_factor, w=learner.weights[0]: given.append(w.grad.clone()) or w.grad.norm()
        )
    metrics = stage.step(0)
    for gradient, expected in zip(given, (3.0, 30.0)):
        torch.testing.assert_close(gradient, torch.full_like(gradient, expected))
    assert metrics["generator/loss"] == pytest.approx(3 * sums[0], rel=1e-4)
    assert metrics["critic/loss"] == pytest.approx(30 * sums[1], rel=1e-4)
    with pytest.raises(ValueError, match="critic_updates 0: choose 1 or more"):
        make_stage(critic_updates=0)


def test_a_schedule_scales_both_rates(monkeypatch):
    """AdamW without a past moves each weight by its rate: half of it at half the rate, and nothing at none."""
    moves = []
    for rate in (1.0, 0.5, 0.0):
        stage = make_stage(critic_updates=1, ema_start=1000)
        stage._lr_factor = lambda number, rate=rate: rate if number else 0.0
        before = [weight.detach().clone() for weight in (*stage.generator.weights, *stage.critic.weights)]
        stage.step(0)
        after = [*stage.generator.weights, *stage.critic.weights]
        assert all(torch.equal(one, two) for one, two in zip(before, after))
        stage.step(1)
        moves.append([(two - one).detach() for one, two in zip(before, after)])
    for whole, half, none in zip(*moves):
        torch.testing.assert_close(half, whole / 2, atol=1e-7, rtol=1e-3)
        assert whole.any() and not none.any()


def everything(stage):
    """All tensors of a stage that training changes, by name."""
    found = {f"{part}/{n}": w for part, ws in zip("gc", weights_of(stage)) for n, w in enumerate(ws)}
    for part, learner in (("g", stage.generator), ("c", stage.critic)):
        for n, weight in enumerate(learner.weights):
            found |= {f"{part}/{n}/{name}": value.clone() for name, value in learner.optimizer.state[weight].items()}
    if stage.average is not None:
        found |= {f"average/{name}": value.clone() for name, value in stage.exported_generator.state_dict().items()}
    return found


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "adapters"])
def test_resumed_anywhere_a_run_goes_on_bit_for_bit(rank):
    """The average begins at step 2, the generator is updated at 0, 2 and 4; cuts lie before and after, in and between videos."""
    settings = {"rank": rank, "critic_updates": 2, "ema_start": 2}
    stage, files, metrics = make_stage(**settings), [], []
    for number in range(6):
        file = io.BytesIO()
        torch.save(stage.state(), file)
        files.append((file, stage.between_videos))
        metrics.append(stage.step(number))
    whole = everything(stage)
    assert {rest for _, rest in files[1:]} == {True, False}
    for cut in (1, 2, 3, 5):
        files[cut][0].seek(0)
        resumed = make_stage(**settings, seed=1)
        resumed.step(0)  # leaves traces, which must all be gone
        resumed.load(torch.load(files[cut][0], weights_only=False))
        assert resumed.between_videos == files[cut][1]
        assert (resumed.exported_generator is resumed.generator.network) == (rank is not None or cut < 3)
        assert [resumed.step(number) for number in range(cut, 6)] == metrics[cut:]
        found = everything(resumed)
        assert found.keys() == whole.keys() and not [name for name in whole if not torch.equal(found[name], whole[name])]
    state = stage.state()
    state["ranks"] = state["ranks"] * 2
    with pytest.raises(ValueError, match="the state is of 2 ranks, this run has 1; start as many"):
        stage.load(state)


def test_the_average_begins_at_its_step_and_follows_updates_of_the_generator_only():
    stage = make_stage(critic_updates=2, ema_start=2)
    first = stage.generator.network.head.head.weight
    for number in range(5):
        before = stage.exported_generator.head.head.weight.clone()
        stage.step(number)
        now = stage.exported_generator.head.head.weight
        if number < 2:
            assert now is first
        elif number == 2:
            assert now is not first and torch.equal(now, first)
        else:
            expected = before.lerp(first, 1 - 0.9) if number == 4 else before
            torch.testing.assert_close(now, expected, atol=0, rtol=0)


@torch.no_grad()
def answer(network):
    x, text = (torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in ((1, 3, 4, 4, 4), (1, 5, 8)))
    return network(x, torch.full((1, 3), 700.0), text)


def test_written_networks_are_read_back(tmp_path):
    network = small_network()
    write_transformer(network, tmp_path, write=True)
    again = load_network(tmp_path)
    torch.testing.assert_close(answer(again), answer(network), atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert dict(again.config)["dim"] == 24
    assert load_network(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    write_transformer(network, tmp_path / "other", write=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_adapters_merged_are_the_trained_network(tmp_path, alpha):
    network = small_network()
    write_transformer(network, tmp_path, write=True)
    before, learner = answer(network), TrainableNetwork(network, lr=0.05, lora_rank=2, lora_alpha=alpha, recipe=Recipe())
    assert learner.adapters_only and torch.equal(answer(network), before)
    for _ in range(2):
        network(torch.ones(1, 3, 4, 4, 4), torch.full((1, 3), 700.0), torch.ones(1, 5, 8)).square().sum().backward()
        learner.update(10.0)
    assert (answer(network) - before).abs().max() > 0.01
    released = learner.adapters()
    assert set(released) == set(lora_state(add_lora(small_network(), rank=2)))
    torch.testing.assert_close(answer(merge_lora(load_network(tmp_path), released, alpha=alpha)), answer(network), atol=1e-5, rtol=0)
    if alpha is None:
        store.write_pt({"generator_lora": released}, tmp_path / "lora.pt")
        torch.testing.assert_close(answer(load_network(tmp_path, lora=tmp_path / "lora.pt")), answer(network), atol=1e-5, rtol=0)


def test_update_limits_the_gradient_and_forgets_it():
    network = small_network()
    learner = TrainableNetwork(network, lr=1e-3, recipe=Recipe())
    for weight in learner.weights:
        weight.grad = torch.full_like(weight, 2.0)
    count, seen = sum(weight.numel() for weight in learner.weights), []
    learner.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([w.grad.flatten() for w in learner.weights]).norm().item()))
    assert learner.update(10.0).item() == pytest.approx(2 * count**0.5, rel=1e-4)
    assert seen == [pytest.approx(10.0, rel=1e-3)] and all(weight.grad is None for weight in learner.weights)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "adapters"])
def test_a_stage_exports_what_inference_wants(tmp_path, rank):
    stage = make_stage(rank=rank, critic_updates=1, ema_start=0)
    base = small_network(0)
    for number in range(2):
        stage.step(number)
    stage.export(tmp_path)
    if rank is None:
        network = load_network(tmp_path)
        assert not torch.equal(answer(network), answer(stage.generator.network))  # the average, not the newest weights
        assert torch.equal(answer(load_network(tmp_path / "critic")), answer(stage.critic.network))
    else:
        network = merge_lora(base, load_lora(tmp_path / "lora.pt"))
        critic = merge_lora(small_network(1), load_lora(tmp_path / "lora.pt", which="critic_lora"))
        torch.testing.assert_close(answer(critic), answer(stage.critic.network), atol=1e-5, rtol=0)
    torch.testing.assert_close(answer(network), answer(stage.exported_generator), atol=1e-5, rtol=0)
    assert (answer(network) - answer(small_network(0))).abs().max() > 1e-3


def make_preview():
    """Of one video with a switch, judged by its pixels; nobody writes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[True, True], scale_factor_spatial=4,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip

    def measure(videos, schedules):
        assert videos.shape == (1, 33, 16, 16, 3) and len(schedules) == 1
        return {"mean": videos.float().mean().item(), "deviation": videos.float().std().item()}

    return Preview(
        [PromptSchedule.at_latent_frames(["old 0", "new 0"], [6])],
        vae.eval(),
        embed,
        window=Window(3, 3),
        block=3,
        steps=[1000.0, 500.0],
        num_latent_frames=9,
        height=16,
        width=16,
        transition=Transition(),
        seed=0,
        measure=measure,
        write=False,
    )


def rank_of_two(folder):
    """What each of two processes does; the first leaves what both found in `folder`."""
    world = get_world()
    with joined(world, torch.device("cpu")):
        settings = {"critic_updates": 2, "ema_start": 2, "world": world}
        stage, own = make_stage(**settings), []
        taken, make = [], stage.tuner.clip

        def clip(*, grad):
            taken.append(make(grad=grad))
            return taken[-1]

        stage.tuner.clip = clip
        for number in range(5):
            if number == 3:
                checkpoints = Checkpoints(folder, stage="init", tuning="full", base=None, keep=1, world=world)
                for step in (1, 2, 3):
                    checkpoints.save(stage, step)
                stage.validate(folder, number)  # of the average; changes nothing, and it goes on afterwards
            own.append(stage.step(number))
        stage.tuner.choices.check(world)
        said = answer(stage.generator.network)  # before anything else gathers the weights anew
        weights = full_state(stage.generator.network)

        resumed = make_stage(**settings, seed=1)
        assert checkpoints.resume(resumed) == 3
        assert [path.name for path in sorted(folder.glob("*_00*"))] == ["checkpoint_000003.pt", "shards_000003"]
        assert [resumed.step(number) for number in (3, 4)] == own[3:]
        for one, two in ((stage, resumed), (stage.critic, resumed.critic)):
            network = (one.exported_generator if one is stage else one.network, two.exported_generator if two is resumed else two.network)
            torch.testing.assert_close(*map(full_state, network), atol=0, rtol=0)

        rounded = TrainableNetwork(small_network(), lr=1e-3, recipe=Recipe(sharding=Sharding(param_dtype=torch.bfloat16))).network
        shown = make_preview()(rounded, folder, 0)

        told = [{"frames": (c.frames.start, c.frames.stop), "switched": c.prompts[0][:3], "prompts": c.prompts} for c in taken]
        found = gather({"clips": told, "blocks": stage.tuner.rollout.blocks, "resumed": resumed.tuner.rollout.blocks}, world)
        if world.is_main:
            torch.save({"ranks": found, "weights": weights, "said": said, "shown": shown}, folder / "found.pt")


def test_two_processes_go_in_step_with_prompts_and_noise_of_their_own(tmp_path):
    run_ranks(rank_of_two, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    one, two = found["ranks"]
    assert len(one["clips"]) == 8
    for a, b in zip(one["clips"], two["clips"], strict=True):
        assert (a["frames"], a["switched"]) == (b["frames"], b["switched"]) and a["prompts"] != b["prompts"]
    assert {clip["switched"] for clip in one["clips"]} == {"old", "new"}
    for ours, theirs in zip(one["blocks"], two["blocks"], strict=True):
        assert ours[:2] == theirs[:2] and ours[2] != theirs[2]
    assert {stop for _, stop, _ in one["blocks"]} == {1, 2}
    for rank in (one, two):
        assert rank["blocks"][-len(rank["resumed"]) :] == rank["resumed"]
    alone = make_stage(critic_updates=2, ema_start=2)
    with pytest.raises(ValueError, match="was saved by 2 ranks, not 1"):
        Checkpoints(tmp_path, stage="init", tuning="full", base=None, keep=1, world=World()).resume(alone)
    network = small_network()
    network.load_state_dict(found["weights"])  # whole tensors under their own names
    assert not torch.equal(network.head.head.weight, small_network().head.head.weight)
    whole = make_preview()(small_network(), tmp_path, 0)  # float32, in one process
    assert found["shown"]["mean"] == pytest.approx(whole["mean"], abs=1.0) and whole["deviation"] > 5
    torch.testing.assert_close(found["said"], answer(network), atol=1e-5, rtol=0)  # the newest weights are in use
