"""Teacher forcing is the block loop in one pass; the trainer resumes bit for bit; every stage of the miniature trains and exports."""

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from longlive.cache.window import Window
from longlive.checkpoints.lora import load_lora
from longlive.config import TrainConfig
from longlive.engine import low_precision
from longlive.engine.low_precision import use_bfloat16_linears
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.pipeline import BUNDLED, LongLivePipeline
from longlive.generation.rollout import Rollout
from longlive.generation.solver import Euler
from longlive.miniature.prompt_pairs import write_pairs
from longlive.models.lora import merge_lora
from longlive.models.wan import WanTransformer
from longlive.models.zoo import ZOO
from longlive.ops.flow_matching import add_noise
from longlive.parallel.world import World
from longlive.settings import load
from longlive.training.dmd import DMD
from longlive.training.miniature import autoencoder
from longlive.training.miniature import transformer as transformer_stages
from longlive.training.miniature.autoencoder import EndlessVideos
from longlive.training.networks import load_network
from longlive.training.optimizer import MatrixOptimizer, Muon, orthogonalized, warmup_cosine
from longlive.training.stages import build
from longlive.training.teacher_forcing import TeacherForcing
from longlive.training.trainer import train


@pytest.mark.parametrize("context_blocks", [0, 2])
@pytest.mark.parametrize("window", [Window(3, 6), Window(0, 6), Window(3, 12)], ids=str)
def test_teacher_forcing_equals_the_block_loop(model, window, context_blocks):
    """Loss and gradient of one masked pass = those of denoising every block on a cache of the clean blocks before it."""
    generator = torch.Generator().manual_seed(0)
    clip, noise = (torch.randn(2, 15, 4, 4, 4, generator=generator) for _ in range(2))
    noise = noise[:, 3 * context_blocks :]
    text, t = torch.randn(2, 5, 8, generator=generator), 1000 * torch.rand(2, 5 - context_blocks, generator=generator)
    history = clip + 0.1
    objective = TeacherForcing(model, block=3, window=window)
    loss = objective(clip, range(15), text, t=t, noise=noise, context_blocks=context_blocks, history=history)

    rollout = Rollout(Denoiser(model), history_cache(model, 4, 4, window=window, batch=2), Euler([1000.0]))
    squares = []
    for block in range(5):
        part = slice(3 * block, 3 * block + 3)
        if block >= context_blocks:
            index = block - context_blocks
            own_noise, levels = noise[:, 3 * index : 3 * index + 3], t[:, index : index + 1].expand(-1, 3)
            view = rollout.cache.view(range(part.start, part.stop))
            velocity = rollout.denoiser(add_noise(clip[:, part], own_noise, levels), levels, text, view).velocity
            squares.append((velocity - (own_noise - clip[:, part])).square())
        rollout.remember(history[:, part], text)
    torch.testing.assert_close(loss, torch.stack(squares).mean(), atol=1e-5, rtol=1e-5)


def test_loss_of_a_perfect_network_is_zero_and_context_carries_none(model):
    clip, noise, text = torch.randn(1, 9, 4, 4, 4), torch.randn(1, 6, 4, 4, 4), torch.randn(1, 5, 8)

    class Perfect:
        config, rope = model.config, model.rope

        def __call__(self, x, t, text, view):
            return torch.cat([torch.full((1, x.shape[1] - 6, 4, 4, 4), torch.nan), noise - clip[:, 3:]], 1)

    objective = TeacherForcing(Perfect(), block=3, window=Window(3, 6))
    assert objective(clip, range(9), text, t=torch.rand(1, 2), noise=noise, context_blocks=1) == 0


def test_dmd_gradient_is_exact_on_fresh_frames_and_zero_elsewhere(model):
    critic = Denoiser(WanTransformer.from_config(model.config).eval())
    dmd = DMD(Denoiser(model), critic, guidance_scale=4.0)
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(2, 6, 4, 4, 4, generator=generator).requires_grad_()
    text, negative, noise = (torch.randn(shape, generator=generator) for shape in ((2, 5, 8), (2, 5, 8), (2, 6, 4, 4, 4)))
    fresh = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])
    t = dmd.draw_timesteps(clip, generator)
    assert ((t >= 20) & (t <= 980) & (t == t[:, :1])).all()
    found = dmd.generator_loss(clip, text, negative, t=t, noise=noise, fresh=fresh)
    found.loss.backward()
    count = fresh.sum() * clip[0, 0].numel()
    expected = torch.where(fresh[..., None, None, None], found.gradient / count, 0)
    torch.testing.assert_close(clip.grad, expected, atol=1e-8, rtol=1e-4)
    assert not clip.grad[0, :3].any()
    torch.testing.assert_close(found.loss, 0.5 * found.gradient[fresh].double().square().mean())
    same = DMD(Denoiser(model), Denoiser(model), guidance_scale=1.0).generator_loss(clip.detach(), text, negative, t=t, noise=noise)
    assert not same.gradient.any()
    assert all(parameter.grad is None for parameter in critic.network.parameters())


def test_endless_videos_run_on():
    from longlive.miniature.world import render

    videos = EndlessVideos(3, torch.Generator().manual_seed(0), change=0.0)
    captions, identities = zip(*videos.scenes, strict=True)
    parts = torch.cat([videos.next(n) for n in (5, 4, 8)], dim=1)
    assert torch.equal(parts, render(captions, identities, 17))


def test_the_learning_rate_rises_to_its_value_and_falls_to_a_fiftieth():
    factors = [warmup_cosine(step, 300) for step in range(301)]
    assert factors[:100] == [(step + 1) / 100 for step in range(100)] and factors[100] == 1.0
    assert factors[200] == pytest.approx(0.51) and factors[300] == pytest.approx(0.02)
    assert factors[150] == pytest.approx(0.02 + 0.98 * (1 + 0.5**0.5) / 2)
    assert warmup_cosine(0, 10, warmup=0) == 1.0 and warmup_cosine(999, 10) == pytest.approx(0.02)


def test_matrix_optimizer_moves_every_weight_and_learns():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 3))
    x = torch.randn(8, 2, 8, 8)
    target = x.mean(1, keepdim=True)[..., 2:-2, 2:-2]
    optimizer, before, losses = MatrixOptimizer(net, lr=1e-2), [p.clone() for p in net.parameters()], []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all((p != q).any() for p, q in zip(net.parameters(), before))


def test_muon_is_torchs_but_for_rounding():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 72), (72, 24), (32, 32))] for _ in range(2))
    for p, q in zip(ours, theirs):
        q.data.copy_(p.data)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() / (p - old).norm() < 0.1  # updates of torch's have passed through bfloat16
            q.data.copy_(p.data)
    for rows, columns in ((24, 72), (72, 24)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(rows, columns)))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("instructions", [True, False])
def test_bfloat16_where_the_processor_has_instructions_for_it(instructions, monkeypatch):
    monkeypatch.setattr(low_precision, "cpu_has_bfloat16", lambda: instructions)
    assert [low_precision.resolve_bfloat16_linears(wanted) for wanted in (None, True, False)] == [instructions, True, False]


def test_bfloat16_linears_round_and_nothing_else(model):
    plain, rounded = deepcopy(model), deepcopy(model)
    use_bfloat16_linears(rounded)
    x, t, text = torch.randn(2, 3, 4, 4, 4), torch.full((2, 3), 400.0), torch.randn(2, 5, 8)
    outputs = [network(x, t, text) for network in (plain, rounded)]
    for output in outputs:
        output.square().mean().backward()
    scale = outputs[0].abs().max()
    assert 0 < (outputs[0] - outputs[1]).abs().max() / scale < 0.05
    for (name, a), (other, b) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        assert name == other and b.dtype == b.grad.dtype == torch.float32
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.99, name


SMALL = {
    "language": ["steps=4", "language.batch=4"],
    "autoencoder": ["steps=4", "autoencoder.base_dim=16", "autoencoder.batch=2", "autoencoder.z_dim=16"],
    "teacher": ["steps=4", "teacher.clip_batch=1", "teacher.clip_frames=6", "teacher.clip_every=2", "teacher.short_batch=2",
                "teacher.num_clips=2", "teacher.num_shorts=2", "teacher.phrasings=2"],
    "causal_init": ["steps=4", "causal_init.clip_batch=1", "causal_init.first_batch=2", "causal_init.num_videos=2",
                    "causal_init.num_first_videos=4", "causal_init.phrasings=2", "causal_init.denoising_steps=[1000]"],
    "init": ["steps=4", "init.max_frames=[6]", "init.ema_start=1", "init.lr_schedule=cosine", "init.bfloat16_linears=true"],
    "long": ["steps=4", "long.max_frames=[12]", "long.switch_at=[6,9]", "long.lora_rank=2", "long.bfloat16_linears=true"],
}  # fmt: skip
DISTILLED = [
    "height=64",
    "width=64",
    "window=6",
    "clip_frames=6",
    "batch=1",
    "critic_updates=2",
    "validation_videos=1",
    "validation_frames=6",
]


def words_of(stage: str, exports: dict, folder: Path) -> list[str]:
    """Settings of a small run of a stage, after those whose exports are known."""
    if stage in ("teacher", "causal_init"):
        return SMALL[stage] + [f"{stage}.{earlier}={exports[earlier]}" for earlier in ("language", "autoencoder")]
    if stage not in ("init", "long"):
        return SMALL[stage]
    components = folder / "components"
    for earlier in ("language", "autoencoder"):
        shutil.copytree(exports[earlier], components, dirs_exist_ok=True)
    files = write_pairs(folder / "prompts", num=8, seed=0, phrasings=2)
    given = {"generator": exports["causal_init" if stage == "init" else "init"], "teacher": exports["teacher"], "components": components}
    given |= {"prompts": files.prompts, "embeddings": folder / "embeddings"} | ({"switch_prompts": files.switch} if stage == "long" else {})
    return SMALL[stage] + [f"{stage}.{word}" for word in (*DISTILLED, *(f"{name}={value}" for name, value in given.items()))]


def run_stage(config, runs, upto, monkeypatch, *, copy=None):
    """Train, without validation. `copy`: a step before which the run's folder is copied, and where to."""
    stage = build(config, World(), torch.device("cpu")).stage
    step = stage.step

    def copied(number):
        if copy and number == copy[0]:
            shutil.copytree(runs, copy[1])
        return step(number)

    monkeypatch.setattr(stage, "step", copied)
    monkeypatch.setattr(stage, "validate", lambda folder, number: {})
    train(stage, run=runs, name=config.stage, steps=upto, save_every=1, validate_every=100, log_every=1, settings={})
    return stage


def tensors_of(state) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint's state, by its path."""
    found, left = {}, [("", state)]
    while left:
        path, value = left.pop()
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            left += [(f"{path}/{key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            left += [(f"{path}/{index}", item) for index, item in enumerate(value)]
    return found


def test_every_stage_resumes_bit_for_bit_and_the_exports_make_a_pipeline(tmp_path, monkeypatch, caplog):
    """A run is resumed from a copy that is made of its folder on the way."""
    caplog.set_level(logging.ERROR)
    monkeypatch.setitem(ZOO, "miniature", ZOO["miniature"] | {"dim": 48, "ffn_dim": 64, "num_layers": 2})
    for module, name in ((autoencoder, "all_captioned"), (transformer_stages, "training_set")):
        everything = vars(module)[name]
        monkeypatch.setattr(module, name, lambda *omitted, everything=everything: everything(*omitted)[::60])
    exports = {}
    for name in SMALL:
        losses, words = {}, words_of(name, exports, tmp_path)
        stop_at = 1 + sum(map(ord, name)) % 3  # somewhere else for every stage
        for kind in ("whole", "resumed"):
            runs = tmp_path / name / kind
            config = load(TrainConfig, None, [f"stage={name}", f"run={runs}", *words])
            run_stage(config, runs, 4, monkeypatch, copy=(stop_at, tmp_path / name / "resumed") if kind == "whole" else None)
            lines = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
            losses[kind] = [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]
            exports[name] = runs / "export"
        assert losses["whole"] == losses["resumed"], name
        whole, resumed = (
            tensors_of(torch.load(tmp_path / name / kind / "checkpoint.pt", weights_only=False)["state"]) for kind in ("whole", "resumed")
        )
        assert len(whole) > 10 and whole.keys() == resumed.keys(), name
        assert all(torch.equal(whole[path], resumed[path]) for path in whole), name

    from longlive.checkpoints import store

    encoder, tokenizer = store.load_text_encoder(exports["language"])
    transformer = merge_lora(load_network(exports["init"]), load_lora(exports["long"] / "lora.pt"))
    pipe = LongLivePipeline(
        transformer.eval(),
        store.load_vae(exports["autoencoder"]),
        encoder,
        tokenizer,
        window=9,
        height=64,
        width=64,
        denoising_steps=[1000],
    )
    assert pipe("a red circle", num_latent_frames=3, output_type="pt").frames.shape == (1, 9, 3, 64, 64)


def test_a_run_folder_of_another_stage_is_refused_and_a_bad_loss_stops(tmp_path, monkeypatch):
    config = load(TrainConfig, None, ["stage=language", "steps=1", "language.batch=2"])
    stage = run_stage(config, tmp_path, 1, monkeypatch)
    with pytest.raises(ValueError, match="is a checkpoint of stage 'language', not 'autoencoder'"):
        train(stage, run=tmp_path, name="autoencoder", steps=2, save_every=1, validate_every=9, log_every=1, settings={})
    monkeypatch.setattr(stage, "step", lambda number: {"loss": float("nan")})
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        train(stage, run=tmp_path, name="language", steps=3, save_every=1, validate_every=9, log_every=1, settings={})
    with pytest.raises(ValueError, match=r"run configs/miniature/language.yaml first"):
        build(load(TrainConfig, None, ["stage=causal_init", f"causal_init.language={tmp_path / 'none'}"]), World(), torch.device("cpu"))


def test_the_causal_start_from_trajectories_resumes_bit_for_bit(tmp_path, monkeypatch):
    """With the bundled model as teacher: pairs are made once, the student is exported, a resumed run is the uninterrupted one."""
    model, files = BUNDLED["miniature"], write_pairs(tmp_path / "prompts", num=4, seed=0, phrasings=2)
    given = {
        "teacher": model,
        "components": model,
        "prompts": files.prompts,
        "pairs": tmp_path / "pairs",
        "embeddings": tmp_path / "embeddings",
    }
    small = ["num_pairs=4", "height=64", "width=64", "clip_frames=6", "window=6", "num_steps=4", "lr=1e-3", "validation_videos=1"]
    words = [f"ode.{word}" for word in (*small, "validation_frames=6", *(f"{name}={value}" for name, value in given.items()))]
    lines = {}
    for kind in ("whole", "resumed"):
        config = load(TrainConfig, None, ["stage=causal_init", "causal_init.objective=ode", f"run={tmp_path / kind}", *words])
        run_stage(config, tmp_path / kind, 3, monkeypatch, copy=(1, tmp_path / "resumed") if kind == "whole" else None)
        written = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        lines[kind] = [line["causal_init/ode_loss"] for line in written]
    assert len(list((tmp_path / "pairs").glob("*.safetensors"))) == 4
    assert lines["whole"] == lines["resumed"] and len(set(lines["whole"])) == 3
    trained, before = load_network(tmp_path / "whole" / "export"), load_network(model)
    assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters()))
