"""The training loop: what is killed goes on bit for bit, what is mixed up is refused, what goes wrong stops and leaves its batch."""

import json
import logging
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longlive.config import TrainConfig
from longlive.parallel.world import choose_device, gather, get_world, joined
from longlive.provenance import commit
from longlive.settings import load
from longlive.training import __main__ as program
from longlive.training.metrics import LossWatch
from longlive.training.trainer import Terminated, train, weights_digest
from tests import processes
from tests.processes import run_ranks

ASKED_ONCE = commit()
EVERY = {"save_every": 3, "validate_every": 4, "log_every": 1}


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
    """Git is slow where it is asked a hundred times."""
    monkeypatch.setattr("longlive.provenance.commit", lambda: ASKED_ONCE)


class Walk:
    """A weight that wanders: its steps come from a generator of its own, from torch's and from Python's."""

    between_videos = True

    def __init__(self):
        self.weight, self.generator = torch.zeros(3), torch.Generator().manual_seed(0)
        self.events = {}  # step -> what happens in it
        self.exported = False
        random.seed(0)
        torch.manual_seed(0)

    def step(self, number):
        last = torch.randn(3, generator=self.generator)
        self.last_batch = {"last": last}
        self.weight += last + torch.rand(3) + random.random()
        loss = self.events.get(number, lambda: None)()
        return {"walk/loss": 1 + self.weight.tanh().abs().sum().item() if loss is None else loss}

    def validate(self, folder, number):
        return {"walk/length": self.weight.norm().item()}

    def state(self):
        return {"weight": self.weight.clone(), "generator": self.generator.get_state()}

    def load(self, state):
        self.weight = state["weight"]
        self.generator.set_state(state["generator"])

    def export(self, folder):
        self.exported = True


def walk(run, *, steps=10, events=(), **settings):
    stage = Walk()
    stage.events = dict(events)
    train(stage, **{"run": run, "name": "walk", "steps": steps, "settings": {}, **EVERY, **settings})
    return stage


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def saved(run):
    return torch.load(run / "checkpoint.pt", weights_only=False)


def crash():
    raise MemoryError


def test_what_crashes_at_any_step_goes_on_bit_for_bit(tmp_path):
    whole = walk(tmp_path / "whole")
    for step in range(10):
        run = tmp_path / str(step)
        with pytest.raises(MemoryError):
            walk(run, events={step: crash})
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"walk/lo')  # killed while it wrote
        assert torch.equal(walk(run).weight, whole.weight) and metrics(run) == metrics(tmp_path / "whole"), step
        assert not list(run.glob("*.partial"))
    assert [line["step"] for line in metrics(tmp_path / "whole") if "walk/length" in line] == [4, 8, 10]


def test_started_again_when_it_is_done_it_only_exports(tmp_path):
    walk(tmp_path)
    before = metrics(tmp_path)
    assert walk(tmp_path, events={number: crash for number in range(10)}).exported
    assert metrics(tmp_path) == before


class Kept(Walk):
    """Exports its weight."""

    def export(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.weight, folder / "weight.pt")


def keep(run, *, events=(), **settings):
    stage = Kept()
    stage.events = dict(events)
    train(
        stage,
        **{"run": run, "name": "walk", "steps": 10, "settings": {}, **EVERY, "validate_every": 2, "keep_best": "walk/near", **settings},
    )
    return stage


def best(run):
    return json.loads((run / "best" / "best.json").read_text()), torch.load(run / "best" / "weight.pt")


def test_the_best_export_is_kept_and_survives_a_crash(tmp_path, monkeypatch):
    near = {2: 0.1, 4: 0.7, 6: 0.3, 8: 0.9, 10: 0.9}
    monkeypatch.setattr(Kept, "validate", lambda self, folder, number: {"walk/near": near.get(number, 2.0)})  # others are not counted
    keep(tmp_path / "whole")
    assert best(tmp_path / "whole")[0] == {"metric": "walk/near", "step": 8, "value": 0.9}
    stopped = keep(tmp_path / "stopped", steps=8)
    assert torch.equal(best(tmp_path / "whole")[1], stopped.weight)
    for step in range(10):
        run = tmp_path / str(step)
        with pytest.raises(MemoryError):
            keep(run, events={step: crash})
        keep(run)
        assert best(run)[0] == best(tmp_path / "whole")[0] and torch.equal(best(run)[1], stopped.weight), step
        assert {path.name for path in run.iterdir()} == {"best", "export", "checkpoint.pt", "metrics.jsonl", "settings.json"}


def test_the_best_is_compared_with_what_was_saved_and_only_with_that(tmp_path, monkeypatch):
    near = {0: 1.0, 2: 0.5, 3: 0.1, 4: 0.4}
    monkeypatch.setattr(Kept, "validate", lambda self, folder, number: {"walk/near": near[number], "walk/far": 1 - near[number]})
    keep(tmp_path, steps=3)
    (tmp_path / "best").rename(tmp_path / ".best.partial")  # as if killed before the last line
    (tmp_path / "export" / "weight.pt").unlink()
    (tmp_path / "export").rmdir()
    keep(tmp_path, steps=4)
    assert best(tmp_path)[0]["step"] == 2
    (tmp_path / "checkpoint.pt").unlink()  # from the beginning: what a later step had reached is not counted
    near[2] = 0.2
    shutil.rmtree(tmp_path / "export")
    keep(tmp_path, steps=2, keep_best="walk/far")
    assert best(tmp_path)[0] == {"metric": "walk/far", "step": 2, "value": 0.8}


def test_the_best_may_be_the_least(tmp_path, monkeypatch):
    monkeypatch.setattr(Kept, "validate", lambda self, folder, number: {"walk/lost": abs(number - 4) / 10})
    keep(tmp_path, keep_best="-walk/lost")
    assert best(tmp_path)[0] == {"metric": "-walk/lost", "step": 4, "value": 0.0}


def test_a_best_by_what_is_not_measured_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"keep_best walk/near is not measured at validation; choose from walk/length"):
        keep(tmp_path / "a")
    monkeypatch.setattr(Kept, "validate", lambda self, folder, number: {})
    with pytest.raises(ValueError, match="this stage measures nothing; leave keep_best out"):
        keep(tmp_path / "b")
    assert not (tmp_path / "a" / "best").exists()


def test_a_best_by_what_is_not_measured_is_refused_before_the_first_step(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="keep_best walk/near is not measured"):
        keep(tmp_path / "a", events={0: crash})
    numbers = []
    monkeypatch.setattr(Kept, "validate", lambda self, folder, number: (numbers.append(number), {"walk/near": number / 10})[1])
    keep(tmp_path / "b", steps=4)
    shutil.rmtree(tmp_path / "b" / "export")
    keep(tmp_path / "b", steps=6)
    assert numbers == [0, 2, 4, 6]  # a resumed run knows what is measured
    with pytest.raises(ValueError, match="keep_best walk/far is not measured"):
        keep(tmp_path / "b", steps=8, keep_best="walk/far", events={6: crash})


def test_sigterm_ends_with_a_saved_state(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="step 5 of 10 is saved"):
        walk(tmp_path / "asked", events={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert saved(tmp_path / "asked")["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.equal(walk(tmp_path / "asked").weight, walk(tmp_path / "whole").weight)
    assert metrics(tmp_path / "asked") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "run"}, "of stage 'walk', not 'run'"),
        ({"tuning": "full"}, "of tuning 'lora', not 'full'"),
        ({"base": "other"}, "of base 'this', not 'other'"),
        ({"base": None}, "of base 'this', not None"),
    ],
)
def test_mixed_up_checkpoints_are_refused(tmp_path, other, message):
    own = {"tuning": "lora", "base": "this"}
    walk(tmp_path, steps=3, **own)
    with pytest.raises(ValueError, match=message):
        walk(tmp_path, **(own | other))
    walk(tmp_path, steps=4, **own)
    assert saved(tmp_path)["step"] == 4


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    walk(tmp_path, steps=3)
    torch.save({key: value for key, value in saved(tmp_path).items() if key != "tuning"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="has no field 'tuning': an older version wrote it"):
        walk(tmp_path)


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.0123.partial").write_bytes(b"half")
    walk(tmp_path, steps=3)
    assert not list(tmp_path.glob("*.partial"))


def test_other_versions_are_said(tmp_path, caplog):
    walk(tmp_path, steps=3)
    walk(tmp_path, steps=4)
    assert "may not continue bit for bit" not in caplog.text
    checkpoint = saved(tmp_path)
    checkpoint["versions"]["torch"] = "0.1"
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    walk(tmp_path, steps=5)
    assert "may not continue bit for bit" in caplog.text


def test_the_hash_sees_names_types_shapes_and_values_and_not_their_order():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].view(3, 2), "b": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
        {"a": state["a"] + torch.eye(2, 3) * 1e-6, "b": state["b"]},
        {"a": state["a"]},
    ]
    assert (
        weights_digest(dict(reversed(state.items())))
        == weights_digest(state)
        == weights_digest({**state, "a": state["a"].T.contiguous().T})
    )
    assert len({weights_digest(other) for other in (state, *others)}) == 6


def fail():
    raise FloatingPointError("latents are not finite")


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda: float("nan"), "walk/loss is nan at step 13"),
        (lambda: float("-inf"), "walk/loss is -inf at step 13"),
        (lambda: 500.0, "walk/loss is 500, more than 100 times its median of"),
        (lambda: -500.0, "walk/loss is -500, more than 100 times"),
        (fail, "latents are not finite at step 13"),
    ],
)
def test_a_bad_loss_stops_and_leaves_its_batch(tmp_path, event, message):
    with pytest.raises(FloatingPointError, match=message) as stopped:
        walk(tmp_path, steps=15, loss_spike_factor=100.0, events={13: event})
    assert str(tmp_path / "bad_batch.pt") in str(stopped.value) and str(tmp_path / "checkpoint.pt") in str(stopped.value)
    bad = torch.load(tmp_path / "bad_batch.pt")
    whole = walk(tmp_path / "whole", steps=14)
    assert bad["step"] == 13 and torch.equal(bad["batch"]["last"], whole.last_batch["last"])
    assert saved(tmp_path)["step"] == 12 and metrics(tmp_path)[-1]["step"] == 13
    # What is usual is known to a resumed run too, from its metrics.
    with pytest.raises(FloatingPointError, match=message):
        walk(tmp_path, steps=15, loss_spike_factor=100.0, events={13: event})


def test_without_a_past_or_a_factor_large_losses_pass(tmp_path):
    walk(tmp_path / "a", loss_spike_factor=100.0, events={2: lambda: 1e6})
    walk(tmp_path / "b", steps=15, events={13: lambda: 1e6})
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet"):
        walk(tmp_path / "c", events={1: lambda: float("nan")})


def test_losses_are_compared_with_their_own_recent_past():
    watch = LossWatch(10.0, window=20, least=5)
    for n in range(40):
        watch.remember({"a/loss": 2.0**n, "b/loss": 1.0, "rate": 1.0})
    assert watch.problem({"a/loss": 9.9 * 2**29.5}) is None  # the median of 2^20 … 2^39 lies between 2^29 and 2^30
    assert "a/loss is" in watch.problem({"a/loss": 11 * 2**30})
    assert watch.problem({"rate": 1e9, "c/loss": 1e9}) is None
    assert "b/loss is 11," in watch.problem({"a/loss": 1.0, "b/loss": 11.0})
    assert watch.problem({"rate": float("nan")}) == "rate is nan"


def test_kept_checkpoints(tmp_path):
    walk(tmp_path, steps=11, keep_checkpoints=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint.pt", "checkpoint_000009.pt", "checkpoint_000011.pt"]
    assert torch.load(tmp_path / "checkpoint_000009.pt", weights_only=False)["step"] == 9


def test_settings_say_what_ran(tmp_path):
    config = load(TrainConfig, None, ["stage=language"])
    walk(tmp_path, steps=1, settings={"seed": config.seed}, base="this")
    about = json.loads((tmp_path / "settings.json").read_text())
    assert about["stage"] == "walk" and about["base"] == "this" and about["settings"] == {"seed": 0}
    assert set(about["versions"]) == {"python", "torch", "diffusers", "transformers", "peft", "longlive", "numpy", "av"}
    assert about["hardware"]["ranks"] == 1
    repository = Path(__file__).parents[2]
    assert (repository / ".git").exists() == (about["commit"] is not None)


def test_wandb_gets_what_the_file_gets_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    began, logged, ended = [], [], []
    run = SimpleNamespace(log=lambda values, step: logged.append({"step": step} | values), finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: began.append(settings) or run))
    ask = {"wandb": "offline", "project": "p", "settings": {"seed": 4}}
    with pytest.raises(MemoryError):
        walk(tmp_path, events={5: crash}, **ask)
    walk(tmp_path, **ask)
    assert began[0] == began[1] and began[0]["mode"] == "offline" and began[0]["config"] == {"seed": 4} and began[0]["project"] == "p"
    assert ended == [1, 0]
    last = {(line["step"], *line): line for line in logged}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [last[(line["step"], *line)] for line in lines if line["step"] > 5] == [line for line in lines if line["step"] > 5]


def test_wandb_is_asked_for_and_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    walk(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"pip install 'longlive\[train\]', or set wandb=off"):
        walk(tmp_path, wandb="online")


class Ranked(Walk):
    """Ranks wander apart; what is saved has them all."""

    def __init__(self):
        super().__init__()
        self.generator.manual_seed(get_world().rank)
        torch.manual_seed(10 + get_world().rank)

    def state(self):
        return {"all": gather(super().state(), get_world())}

    def load(self, state):
        super().load(state["all"][get_world().rank])


def rank_of_two(folder: Path) -> None:
    """Trains with another rank: whole, and stopped by what happens on one of them."""
    rank = get_world().rank

    def go(run, *, steps=10, events=()):
        stage = Ranked()
        stage.events = dict(events) if rank == 1 else {}
        train(stage, run=folder / run, name="ranked", steps=steps, settings={}, **EVERY)
        return stage

    with joined(get_world(), choose_device("cpu", get_world())):
        whole = go("whole")
        with pytest.raises(Terminated):
            go("asked", events={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert torch.equal(go("asked").weight, whole.weight)
        with pytest.raises(FloatingPointError, match="walk/loss is nan at step 7"):
            go("bad", events={7: lambda: float("nan")})
        with pytest.raises(ValueError, match=r"checkpoints of steps \[10, 0\]"):
            go(("whole", "elsewhere")[rank])
    torch.save(whole.weight, folder / f"weight{rank}.pt")


def test_two_ranks_stop_together_and_go_on_each_with_its_own_draws(tmp_path):
    run_ranks(rank_of_two, tmp_path)
    weights = [torch.load(tmp_path / f"weight{rank}.pt") for rank in range(2)]
    assert not torch.equal(*weights)
    assert [line["step"] for line in metrics(tmp_path / "whole")] == sorted([*range(1, 11), 4, 8, 10])
    assert metrics(tmp_path / "asked") == metrics(tmp_path / "whole")
    assert torch.load(tmp_path / "bad" / "bad_batch_rank1.pt")["step"] == 7
    with pytest.raises(ValueError, match="was saved by 2 ranks, not 1"):
        train(Walk(), run=tmp_path / "whole", name="ranked", steps=12, settings={}, **EVERY)


WORDS = ["stage=language", "steps=24", "language.batch=2", "save_every=5", "validate_every=100", "log_every=1", "threads=1"]


def run_program(words, dies):
    """The program in a process of its own, which may get SIGKILL after its third update or in the middle of its third checkpoint."""
    from longlive.training.miniature.language import LanguageStage

    LanguageStage.validate = lambda stage, folder, number: {}  # long, and not what is tried here
    update, save, calls = torch.optim.AdamW.step, torch.save, []

    def die_at_third():
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if dies == "update":
        torch.optim.AdamW.step = lambda optimizer: (update(optimizer), die_at_third())
    if dies == "save":
        torch.save = lambda state, path: (Path(path).write_bytes(b"half"), die_at_third(), save(state, path))
    sys.exit(program.main(words))


def start(run, tmp_path, dies=None):
    (tmp_path / "empty.yaml").write_text("")
    words = ["--config", str(tmp_path / "empty.yaml"), *WORDS, f"run={run}"]
    return processes.start(run_program, words, dies)


def test_a_killed_program_goes_on_bit_for_bit(tmp_path):
    """Killed once before there is a checkpoint and once while one is written; then it may finish."""
    whole = start(tmp_path / "whole", tmp_path)
    for dies, lines in (("update", 2), ("save", 15)):
        process = start(tmp_path / "killed", tmp_path, dies)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(metrics(tmp_path / "killed")) == lines
    last = start(tmp_path / "killed", tmp_path)
    for process in (whole, last):
        process.join()
        assert process.exitcode == 0
    assert len(metrics(tmp_path / "whole")) == 24
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [saved(tmp_path / run)["state"] for run in ("whole", "killed")]
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    exports = [(tmp_path / run / "export/text_encoder/model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert exports[0] == exports[1]


def test_several_ranks_are_refused_where_they_make_no_sense(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    (tmp_path / "empty.yaml").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program.main(["--config", str(tmp_path / "empty.yaml"), "stage=language", f"run={tmp_path}"]) == 2
    assert "trains in one process, not 2" in caplog.text


@pytest.mark.parametrize("word", ["loss_spike_factor=1", "keep_checkpoints=-1", "save_every=0", "wandb=perhaps"])
def test_settings_that_make_no_sense_are_refused(word):
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        load(TrainConfig, None, [word])


def test_what_is_not_trained_at_every_step_is_logged_all_the_same(tmp_path):
    """Of a step in three, with a line every fourth step: the newest value since the line before."""
    stage = Walk()
    step = stage.step
    stage.step = lambda number: step(number) | ({"other/loss": float(number)} if number % 3 == 0 else {})
    train(stage, run=tmp_path, name="walk", steps=8, save_every=8, validate_every=8, log_every=4, settings={})
    lines = [line for line in metrics(tmp_path) if "walk/loss" in line]
    assert [line["other/loss"] for line in lines] == [3.0, 6.0]
