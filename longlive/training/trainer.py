"""The training loop: steps, metrics, checkpoints, resume. Knows nothing of what is trained.

A `Stage` owns its networks, optimisers, data and every random generator it draws from, so that its state is all that a
resumed run needs: the run continues bit for bit. Several ranks run the same loop side by side; the first writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from longlive.parallel.parts import located, write_parts
from longlive.parallel.world import World, gather, get_world, mean_over_ranks
from longlive.provenance import commit, hardware, versions
from longlive.training.metrics import SPEED, LossWatch, RunLog, Tracking

Kind = Literal["full", "lora"]
"""What a stage trains: whole networks, or adapters that mean nothing without the weights under them."""

log = logging.getLogger(__name__)


class Terminated(Exception):
    """The run was asked to end (SIGTERM) and has saved its state."""


class Stage(Protocol):
    """One stage of training, advanced a step at a time. On several ranks all methods are called on all of them."""

    def step(self, number: int) -> dict[str, float]:
        """Train on one batch; returns flat-named metrics, the losses ("loss" in their name) and the gradient's norm among them.

        A loss shows a bad network one step late; the gradient's norm shows it before it is saved.
        """
        ...

    def batch(self) -> dict[str, Any]:
        """What the last step was given: the tensors (and texts) that are saved when its loss is bad."""
        ...

    @property
    def at_rest(self) -> bool:
        """Whether `state` is small: no video under way, whose cache would have to be saved for every rank. All ranks agree."""
        ...

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Measure and draw what a person wants to look at, into `folder` (the first rank draws); changes nothing in `state`."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that changes while training: weights, optimisers, generators, positions in the data.

        What the first rank returns is saved and given to all ranks' `load`, so what differs between ranks is gathered here; of
        tensors that are spread over ranks every rank returns, and is given, its own parts.
        """
        ...

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained component in the layout that the pipeline loads (the first rank writes)."""
        ...


def one_cycle(step: int, steps: int, *, warmup: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """`torch.save` that leaves the old file or the new one, never half of one, also when the machine goes down."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and every byte; the order of names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_states() -> dict[str, Any]:
    """Of the generators that belong to nobody: Python's, torch's and this rank's GPU's. Stages have their own; libraries may not."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "gpu": gpu}


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["gpu"] is not None:
        torch.cuda.set_rng_state(states["gpu"])


class Checkpoints:
    """The newest state of a run in `checkpoint.pt` of its folder, stamped with what it belongs to. All ranks call.

    The first rank writes that file; of tensors that are spread over ranks each writes its parts into a folder `parts_000250` and so on
    before. It is there when the file is, and goes when no file needs it.

    Args:
        base: hash of the weights the stage started from (`hash_of`); None when it started from nothing.
        keep: this many of the newest are also kept as `checkpoint_000250.pt` and so on.
    """

    def __init__(self, run: Path, *, stage: str, kind: Kind, base: str | None, keep: int, world: World) -> None:
        self.path = run / "checkpoint.pt"
        self._stamp = {"stage": stage, "kind": kind, "base": base}
        self._keep, self._here = keep, world

    def resume(self, stage: Stage) -> int:
        """Give `stage` the newest state, if there is one; returns the steps it has behind it.

        Raises:
            ValueError: on all ranks, when the checkpoint is of another stage, kind, base or number of ranks, or not the same for all.
        """
        saved: dict[str, Any] = {"step": 0}
        if self.path.exists():
            saved = torch.load(self.path, weights_only=False, map_location="cpu")
        steps = gather(saved["step"], self._here)
        if len(set(steps)) > 1:
            raise ValueError(f"ranks find checkpoints of steps {steps} in {self.path}; the run folder must be the same one for all")
        if not saved["step"]:
            return 0
        for key, wanted in self._stamp.items():
            # Checkpoints from before there were stamps say their stage only.
            if key in saved and saved[key] != wanted:
                raise ValueError(f"{self.path} is a checkpoint of {key} {saved[key]!r}, not {wanted!r}; choose another run folder")
        states = saved.get("random", [])
        if states and len(states) != self._here.size:
            raise ValueError(
                f"{self.path} was saved by {len(states)} ranks, not {self._here.size}; start as many, or choose another run folder"
            )
        if (then := saved.get("versions", versions())) != versions():
            log.warning("%s was saved with %s, this is %s: the run goes on, but perhaps not bit for bit", self.path, then, versions())
        stage.load(located(saved["state"], self._parts(saved["step"])))
        if states:
            set_random_states(states[self._here.rank])
        return saved["step"]

    def save(self, stage: Stage, step: int) -> None:
        """Write the state after `step` steps; no rank goes on before it is there."""
        state, states = write_parts(stage.state(), self._parts(step)), gather(random_states(), self._here)
        if self._here.is_main:
            save_atomically({**self._stamp, "versions": versions(), "step": step, "random": states, "state": state}, self.path)
            self._name(step)
            self._clear(step)
        gather(None, self._here)

    def _parts(self, step: int) -> Path:
        return self.path.with_name(f"parts_{step:06d}")

    def _clear(self, newest: int) -> None:
        """An end to parts that no checkpoint needs: those of older ones, and of one that was never finished."""
        kept = {self._parts(newest)} | {self._parts(int(path.stem.split("_")[1])) for path in self.path.parent.glob("checkpoint_*.pt")}
        for folder in self.path.parent.glob("parts_*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _name(self, step: int) -> None:
        """A second name for the newest checkpoint, and an end to the oldest of those."""
        if not self._keep:
            return
        named = self.path.with_name(f"checkpoint_{step:06d}.pt")
        named.unlink(missing_ok=True)
        os.link(self.path, named)
        for old in sorted(self.path.parent.glob("checkpoint_*.pt"), key=lambda path: path.stat().st_mtime_ns)[: -self._keep]:
            old.unlink()


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process at once. For the main thread only."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_batch(stage: Stage, step: int, metrics: dict[str, float], checkpoints: Checkpoints, world: World) -> str:
    """Save what a bad step was given, every rank its own; returns where that and the last good state are."""
    path = checkpoints.path.with_name("bad_batch.pt" if world.is_main else f"bad_batch_rank{world.rank}.pt")
    save_atomically({"step": step, "metrics": metrics, "batch": stage.batch()}, path)
    good = f"the last good state in {checkpoints.path}" if checkpoints.path.exists() else "there is no checkpoint yet"
    return f"its batch is in {path}, {good}"


def _step(
    stage: Stage, step: int, watch: LossWatch, asked: threading.Event, checkpoints: Checkpoints, world: World
) -> tuple[dict[str, float], bool]:
    """One step: metrics as a mean over ranks, and whether any rank was asked to end. Raises FloatingPointError when a loss is bad."""
    own: dict[str, float] = {}
    try:
        own = stage.step(step)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} at step {step}; {_keep_batch(stage, step, own, checkpoints, world)}") from error
    metrics = mean_over_ranks(own | {"asked": float(asked.is_set())}, world)
    ending = metrics.pop("asked") > 0
    if (trouble := watch.trouble(metrics)) is not None:
        raise FloatingPointError(f"{trouble} at step {step}; {_keep_batch(stage, step, own, checkpoints, world)}")
    return metrics, ending


def train(
    stage: Stage,
    *,
    run: Path,
    name: str,
    steps: int,
    save_every: int,
    validate_every: int,
    log_every: int,
    settings: dict[str, Any],
    kind: Kind = "full",
    base: str | None = None,
    explode: float | None = None,
    keep: int = 0,
    wandb: Tracking = "off",
    project: str = "longlive",
) -> None:
    """Run `stage` up to step `steps`, from the newest checkpoint in folder `run` if there is one, then export it to `run/export`.

    Several ranks must have joined (`parallel.world`). A loss is known only when its step has been taken, so the last checkpoint
    is the good state, not the networks in memory.

    Args:
        kind, base: what is trained, and the hash of the weights it started from (`hash_of`): checkpoints are stamped with both.
        explode: a loss more than this many times its running median stops the run; None: only one that is not finite does.
        keep: so many of the newest checkpoints are kept, each under its own name.

    Raises:
        ValueError: when the checkpoint in `run` is of another stage, kind, base or number of ranks.
        FloatingPointError: on all ranks, when a loss is not finite or explodes; its batch is saved.
        Terminated: after SIGTERM, when the step at hand is finished and saved.
    """
    world = get_world()
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run, stage=name, kind=kind, base=base, keep=keep, world=world)
    start = checkpoints.resume(stage)
    if start:
        log.info("resuming %s at step %d of %d", name, start, steps)
    if world.is_main:
        ran_with = {"versions": versions(), "commit": commit(), "hardware": hardware(world.size)}
        about = {"stage": name, "kind": kind, "base": base, "settings": settings, **ran_with}
        (run / "settings.json").write_text(json.dumps(about, indent=2, default=str), encoding="utf-8")
    watch = LossWatch(explode)
    journal = RunLog(run, name=name, start=start, steps=steps, wandb=wandb, project=project, settings=settings, speaks=world.is_main)
    with journal, termination() as asked:
        for line in journal.past:
            watch.remember(line)
        seconds, last, due = 0.0, start, False
        newest: dict[str, float] = {}
        for step in range(start, steps):
            began, done = time.perf_counter(), step + 1
            metrics, ending = _step(stage, step, watch, asked, checkpoints, world)
            seconds += time.perf_counter() - began
            journal.advance()
            newest |= metrics  # a network that is not trained at every step reports when it was
            if done % log_every == 0 or done == steps:
                watch.remember(newest)
                journal.write(done, newest | {SPEED: seconds / (done - last)})
                seconds, last, newest = 0.0, done, {}
            # Before the checkpoint: a run that goes on from it has all lines up to it, and none twice.
            if (done % validate_every == 0 or done == steps) and (measured := stage.validate(run, done)):
                journal.write(done, measured)
                log.info("step %d: %s", done, ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
            due = due or ending or done % save_every == 0 or done == steps
            if due and (stage.at_rest or world.size == 1):  # of several ranks, only between videos
                checkpoints.save(stage, done)
                due = False
            if ending:
                saved = "the last checkpoint" if due else f"step {done} of {steps}"
                raise Terminated(f"asked to end; {saved} is saved in {checkpoints.path}, start again to go on")
    stage.export(run / "export")
    log.info("exported to %s", run / "export")
