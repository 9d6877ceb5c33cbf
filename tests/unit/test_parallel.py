"""Sharded over two processes a network learns what it learns in one; recomputed activations give the same gradients; ranks choose alike."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from longlive.cache.window import Window
from longlive.engine import sharding
from longlive.engine.blocks import transformer_of
from longlive.engine.checkpointing import checkpoint_blocks
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.models.lora import add_lora, lora_state
from longlive.models.wan import TransformerBlock, WanTransformer
from longlive.parallel.shards import located, read_shards, write_shards
from longlive.parallel.world import SharedChoices, World, choose_device, get_world, joined, mean_over_ranks, rank_generator
from tests.processes import run_ranks

BATCH, STEPS = 4, 2


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_network() -> WanTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = WanTransformer(in_dim=4, out_dim=4, dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=5, num_heads=2, num_layers=2)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def small_adapted() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = add_lora(small_network(), rank=2)
        for parameter in network.parameters():
            if parameter.requires_grad:  # B = 0 would leave A without a gradient
                torch.nn.init.normal_(parameter, std=0.2)
    return network


def learn(network: torch.nn.Module, rows: slice) -> torch.optim.Optimizer:
    """Two AdamW steps on some rows of a fixed batch; the prompt is read within the forward pass, then before it, on a past."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # A large eps: where a gradient is zero but for rounding, AdamW would blow the rounding up.
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.1)
    model = transformer_of(network)
    for step in range(STEPS):
        x, target = (gaussian(BATCH, 3, 4, 4, 4, seed=10 * step + n)[rows] for n in range(2))
        text = gaussian(BATCH, 5, 8, seed=10 * step + 2)[rows]
        rollout = Rollout(
            Denoiser(model), history_cache(model, 4, 4, window=Window(3, 6), batch=len(x)), FewStep([1000.0, 600.0], torch.zeros_like)
        )
        if step:
            rollout.remember(target, text)
            text = model.project_text(text)
        loss = (rollout.block(x, text, grad=True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sharding.clip_gradients(trained, 0.5)
        optimizer.step()
    return optimizer


def assert_same_optimizer(found: dict, wanted: dict, *, atol: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    if wanted:
        torch.testing.assert_close(found["state"], wanted["state"], atol=atol, rtol=0)
        # Loading turns the tuple of betas into a list.
        groups = [[{k: list(v) if k == "betas" else v for k, v in group.items()} for group in of["param_groups"]] for of in (found, wanted)]
        assert groups[0] == groups[1]


def whole_of(tree):
    """A nested state with whole tensors for sharded ones."""
    if isinstance(tree, dict):
        return {key: whole_of(value) for key, value in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def rank_of_two(folder: Path) -> None:
    """What each of two processes does; the first leaves what it found in `folder`."""
    found = {}
    world = get_world()
    rank = world.rank
    with joined(world, choose_device("cpu", world)):
        choices = SharedChoices(7 + rank, world)  # rank 0's seed counts
        found["choices"] = mean_over_ranks({str(n): choices.integer(1000) for n in range(5)}, world)
        choices.check(world)
        if rank == 1:
            choices.pick("ab")
        with pytest.raises(RuntimeError, match=r"ranks \[1\] differ from rank 0"):
            choices.check(world)
        with pytest.raises(RuntimeError, match=r"rank 1 reports \['b'\], rank 0 \['a'\]"):
            mean_over_ranks({"ab"[rank]: 0.0}, world)

        rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        for name, make in (("whole", small_network), ("adapted", small_adapted)):
            network, adapters = make(), name == "adapted"
            before = {key: value.clone() for key, value in network.state_dict().items()}
            checkpoint_blocks(network)
            sharding.shard(network, param_dtype=torch.float32, reduce_dtype=torch.float32)
            held, whole = (sum(sizes) for sizes in zip(*((p.to_local().numel(), p.numel()) for p in network.parameters())))
            assert 0.4 < held / whole < 0.6
            optimizer = learn(network, rows)
            full, moments = sharding.full_state(network), whole_of(sharding.optimizer_state(network, optimizer))
            found[name] = {"weights": full, "trained": sharding.full_state(network, trainable_only=True), "moments": moments}

            parts, kept = folder / name, {"trainable_only": adapters}
            own = {"weights": sharding.sharded_state(network, **kept), "moments": sharding.optimizer_state(network, optimizer)}
            held = sum(tensor.to_local().numel() for tensor in own["weights"].values())
            assert held < 0.6 * sum(tensor.numel() for tensor in own["weights"].values())
            in_file = write_shards(own, parts)
            if rank == 0:
                torch.save(in_file, folder / f"{name}.pt")
            torch.distributed.barrier()
            assert (folder / f"{name}.pt").stat().st_size < sum(file.stat().st_size for file in parts.iterdir()) / 2
            saved = located(torch.load(folder / f"{name}.pt", weights_only=False), parts)

            sharding.load_state(network, before)
            torch.testing.assert_close(sharding.full_state(network), before if rank == 0 else {}, atol=0, rtol=0)
            sharding.load_state(network, saved["weights"], **kept)
            torch.testing.assert_close(sharding.full_state(network), full, atol=0, rtol=0)
            fresh = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1.0)
            sharding.load_optimizer_state(network, fresh, {})
            assert sharding.optimizer_state(network, fresh) == {}
            sharding.load_optimizer_state(network, fresh, saved["moments"])
            assert_same_optimizer(whole_of(sharding.optimizer_state(network, fresh)), moments)
            with pytest.raises(ValueError, match="1 names missing"):
                sharding.load_state(network, {k: v for k, v in before.items() if k != list(before)[-1]})
            with pytest.raises(ValueError, match="nowhere cannot be read"):
                sharding.load_state(network, located(saved["weights"], folder / "nowhere"), **kept)
            with pytest.raises(ValueError, match="was saved sharded over ranks but is not sharded here"):
                read_shards(saved, {})

        rounded = small_network()
        sharding.shard(rounded, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        out = rounded(gaussian(1, 3, 4, 4, 4, seed=0), torch.full((1, 3), 999.0), gaussian(1, 5, 8, seed=1))
        out.square().mean().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in rounded.parameters())
        if rank == 0:
            torch.save(found | {"rounded": out.detach()}, folder / "found.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(rank_of_two, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("name", "make"), [("whole", small_network), ("adapted", small_adapted)])
def test_two_processes_learn_what_one_learns_from_the_whole_batch(of_two, name, make):
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    sharding.shard(network, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)  # alone: nothing happens
    optimizer = learn(network, slice(None))
    state, found = network.state_dict(), of_two[name]
    assert list(found["weights"]) == list(state) == list(before)
    torch.testing.assert_close(found["weights"], dict(state), atol=1e-5, rtol=0)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(found["trained"]) == trained
    decay = (1 - 1e-2 * 0.1) ** STEPS
    still = [key for key in trained if (state[key] - decay * before[key]).abs().max() < 1e-4]
    assert all(key.endswith("self_attn.k.bias") for key in still)  # a softmax hardly feels it
    assert_same_optimizer(found["moments"], sharding.optimizer_state(network, optimizer), atol=1e-5)
    fresh = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    sharding.load_optimizer_state(network, fresh, found["moments"])  # one process goes on where two were
    assert_same_optimizer(sharding.optimizer_state(network, fresh), found["moments"])


def test_ranks_choose_alike(of_two):
    alone = SharedChoices(7, World())
    assert of_two["choices"] == {str(n): alone.integer(1000) for n in range(5)}


def test_a_sharded_network_computes_in_bfloat16(of_two):
    exact = small_network()(gaussian(1, 3, 4, 4, 4, seed=0), torch.full((1, 3), 999.0), gaussian(1, 5, 8, seed=1))
    error = (of_two["rounded"] - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.1


def test_choices_go_on_where_they_stood():
    choices = SharedChoices(0, World())
    choices.integer(5)
    state = choices.state()
    drawn = [choices.pick(["x", "y", "z"]) for _ in range(40)]
    choices.load(state)
    assert [choices.pick(["x", "y", "z"]) for _ in range(40)] == drawn
    assert set(drawn) == {"x", "y", "z"}
    with pytest.raises(ValueError, match="one of 0"):
        choices.pick([])


def test_every_rank_and_seed_has_its_own_draws():
    draws = [tuple(torch.rand(4, generator=rank_generator(seed, rank)).tolist()) for seed in range(4) for rank in range(4)]
    assert len(set(draws)) == 16
    assert torch.equal(torch.rand(4, generator=rank_generator(3, 2)), torch.tensor(draws[14]))


@pytest.mark.parametrize("make", [small_network, small_adapted], ids=["whole", "adapted"])
def test_recomputed_activations_give_the_same_gradients(make, monkeypatch):
    """Through the block loop, on a past that moves on before the backward pass."""
    runs = []
    original = TransformerBlock.forward

    def counted(block, *inputs):
        runs.append(torch.is_grad_enabled())
        return original(block, *inputs)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    results = []
    for recompute in (False, True):
        network = make()
        names = list(network.state_dict())
        if recompute:
            checkpoint_blocks(network)
            checkpoint_blocks(network)
        assert list(network.state_dict()) == names
        rollout = Rollout(
            Denoiser(transformer_of(network)),
            history_cache(transformer_of(network), 4, 4, window=Window(3, 6)),
            FewStep([1000.0, 500.0], torch.zeros_like),
        )
        text, loss = gaussian(1, 5, 8, seed=0), torch.zeros(())
        runs.clear()
        for block in range(4):
            made = rollout.block(gaussian(1, 3, 4, 4, 4, seed=1 + block), text, grad=block > 0)
            loss = loss + (made * gaussian(1, 3, 4, 4, 4, seed=9 + block)).sum()
            rollout.remember(made, text)
        forward = len(runs)
        loss.backward()
        assert len(runs) - forward == (3 * 2 if recompute else 0)  # blocks with a gradient, times layers
        results.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)
    assert all(gradient.any() for gradient in results[0].values())


def test_recomputed_activations_are_not_kept():
    def kept(network):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            network(gaussian(1, 3, 4, 4, 4, seed=0), torch.full((1, 3), 500.0), gaussian(1, 5, 8, seed=1))
        return sum(sizes)

    network = small_network()
    plain = kept(network)
    checkpoint_blocks(network)
    assert kept(network) < plain / 2


def test_adapters_of_a_sharded_network_have_released_names(of_two):
    network = small_adapted()
    released = lora_state(network)
    assert set(of_two["adapted"]["trained"]) == {name.replace(".weight", ".default.weight") for name in released}


def test_what_is_no_diffusers_model_is_refused():
    with pytest.raises(ValueError, match="a Linear holds no diffusers model"):
        checkpoint_blocks(torch.nn.Linear(2, 2))
