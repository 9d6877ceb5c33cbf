"""The training loop: steps, metrics, checkpoints, resume. Knows nothing of what is trained.

A `Stage` owns its networks, optimisers, data and every random generator it draws from, so that its state is all a resumed run needs:
the run continues bit for bit. With several ranks every rank runs the same loop; rank 0 writes.
"""

from __future__ import annotations

import hashlib
import logging
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

from longlive.files import replacing, write_json
from longlive.parallel.shards import located, write_shards
from longlive.parallel.world import World, barrier, gather, get_world, mean_over_ranks
from longlive.provenance import made_with, versions
from longlive.training.best import BestExport
from longlive.training.metrics import LossWatch, RunLog, Tracking

Tuning = Literal["full", "lora"]
"""What a stage trains: all weights, or adapters, which are useless without the weights they were trained on."""

log = logging.getLogger(__name__)


class Terminated(Exception):
    """The run received SIGTERM and stopped after its step; the message says which step is saved."""


class Stage(Protocol):
    """One stage of training, advanced one step at a time. With several ranks all methods are called on all of them."""

    last_batch: dict[str, Any]
    """What the last step was given: the tensors (and texts) that are saved when its loss is bad."""

    @property
    def between_videos(self) -> bool:
        """Whether no video is in progress, whose cache every rank would have to save: `state` is small. The same on all ranks."""
        ...

    def step(self, number: int) -> dict[str, float]:
        """Train on one batch; returns metrics under flat names: the losses ("loss" in their name) and the gradient's norm among them.

        A loss shows a bad network one step late; the gradient's norm shows it before it is saved.
        """
        ...

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Measure, and write pictures into `folder` on rank 0; changes nothing in `state`."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that changes during training: weights, optimisers, generators, positions in the data.

        What rank 0 returns is saved and given to `load` on all ranks, so values that differ between ranks must be gathered here. Of
        sharded tensors every rank returns, and is given, its own shards.
        """
        ...

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained component in the layout that the pipeline loads; rank 0 writes."""
        ...


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and every byte; independent of the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_states() -> dict[str, Any]:
    """States of the global generators of Python, torch and this rank's GPU. Stages draw from their own; libraries may not."""
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

    Rank 0 writes that file; of sharded tensors each rank first writes its shards into a folder `shards_000250` and so on, which is
    deleted when no checkpoint refers to it any more.

    Args:
        base: digest of the frozen weights under the adapters (`weights_digest`); None when all weights are trained.
        keep: this many of the newest checkpoints are also kept as `checkpoint_000250.pt` and so on.
    """

    def __init__(self, run: Path, *, stage: str, tuning: Tuning, base: str | None, keep: int, world: World) -> None:
        self.path = run / "checkpoint.pt"
        self._stamp = {"stage": stage, "tuning": tuning, "base": base}
        self._keep, self._world = keep, world

    def resume(self, stage: Stage) -> int:
        """Load the newest state into `stage`, if there is one; returns the number of steps it has taken.

        Raises:
            ValueError: on all ranks, when the checkpoint has another stage, tuning, base or number of ranks, or ranks find different ones.
        """
        saved: dict[str, Any] = {"step": 0}
        if self.path.exists():
            saved = torch.load(self.path, weights_only=False, map_location="cpu")
        steps = gather(saved["step"], self._world)
        if len(set(steps)) > 1:
            raise ValueError(f"ranks find checkpoints of steps {steps} in {self.path}; the run folder must be the same for all")
        if not saved["step"]:
            return 0
        if missing := self._stamp.keys() - saved.keys():
            raise ValueError(f"{self.path} has no field {sorted(missing)[0]!r}: an older version wrote it; choose another run folder")
        for key, wanted in self._stamp.items():
            if saved[key] != wanted:
                raise ValueError(f"{self.path} is a checkpoint of {key} {saved[key]!r}, not {wanted!r}; choose another run folder")
        states, size = saved["random"], self._world.size
        if len(states) != size:
            raise ValueError(f"{self.path} was saved by {len(states)} ranks, not {size}; start as many, or choose another run folder")
        if (then := saved["versions"]) != versions():
            log.warning("%s was saved with %s, this is %s: the run may not continue bit for bit", self.path, then, versions())
        stage.load(located(saved["state"], self._shards(saved["step"])))
        set_random_states(states[self._world.rank])
        return saved["step"]

    def save(self, stage: Stage, step: int) -> None:
        """Write the state after `step` steps; no rank continues before it is written."""
        state, states = write_shards(stage.state(), self._shards(step)), gather(random_states(), self._world)
        if self._world.is_main:
            with replacing(self.path) as partial:
                torch.save({**self._stamp, "versions": versions(), "step": step, "random": states, "state": state}, partial)
            self._keep_copy(step)
            self._remove_unused(step)
        barrier(self._world)

    def _shards(self, step: int) -> Path:
        return self.path.with_name(f"shards_{step:06d}")

    def _remove_unused(self, newest: int) -> None:
        """Delete shards that no checkpoint refers to, and what an interrupted `save` left behind."""
        kept = {self._shards(newest)} | {self._shards(int(path.stem.split("_")[1])) for path in self.path.parent.glob("checkpoint_*.pt")}
        for folder in self.path.parent.glob("shards_*"):
            if folder not in kept:
                shutil.rmtree(folder)
        for partial in self.path.parent.glob(f".{self.path.name}.*.partial"):
            partial.unlink()

    def _keep_copy(self, step: int) -> None:
        """Link the newest checkpoint under its step's name, and delete the oldest of those beyond `keep`."""
        if not self._keep:
            return
        named = self.path.with_name(f"checkpoint_{step:06d}.pt")
        named.unlink(missing_ok=True)
        os.link(self.path, named)
        for old in sorted(self.path.parent.glob("checkpoint_*.pt"), key=lambda path: path.stat().st_mtime_ns)[: -self._keep]:
            old.unlink()


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process at once. For the main thread only."""
    requested = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)


def _save_batch(stage: Stage, step: int, metrics: dict[str, float], checkpoints: Checkpoints, world: World) -> str:
    """Save what a bad step was given, each rank its own; returns where that and the last good state are."""
    path = checkpoints.path.with_name("bad_batch.pt" if world.is_main else f"bad_batch_rank{world.rank}.pt")
    with replacing(path) as partial:
        torch.save({"step": step, "metrics": metrics, "batch": stage.last_batch}, partial)
    good = f"the last good state in {checkpoints.path}" if checkpoints.path.exists() else "there is no checkpoint yet"
    return f"its batch is in {path}, {good}"


def _step(
    stage: Stage, step: int, watch: LossWatch, requested: threading.Event, checkpoints: Checkpoints, world: World
) -> tuple[dict[str, float], bool]:
    """One step: metrics averaged over ranks, and whether any rank received SIGTERM. Raises FloatingPointError when a loss is bad."""
    own: dict[str, float] = {}
    try:
        own = stage.step(step)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} at step {step}; {_save_batch(stage, step, own, checkpoints, world)}") from error
    metrics = mean_over_ranks(own | {"terminate": float(requested.is_set())}, world)
    ending = metrics.pop("terminate") > 0
    if (problem := watch.problem(metrics)) is not None:
        raise FloatingPointError(f"{problem} at step {step}; {_save_batch(stage, step, own, checkpoints, world)}")
    return metrics, ending


def _validate(stage: Stage, run: Path, done: int, journal: RunLog, best: BestExport | None) -> None:
    """Measure the stage after `done` steps, and keep its export if it is the best."""
    if measured := stage.validate(run, done):
        journal.write(done, measured)
        log.info("step %d: %s", done, ", ".join(f"{key} {value:.4g}" for key, value in measured.items()))
    if best is not None:
        best.offer(done, measured, stage.export)


def _best_export(stage: Stage, run: Path, keep_best: str | None, start: int, world: World) -> BestExport | None:
    """The best export of a run. Validates once before the first step, so that a metric that is not measured is found at once."""
    if keep_best is None:
        return None
    best = BestExport(run, keep_best, start=start, world=world)
    if not best.known:
        best.check(stage.validate(run, start))
    return best


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
    tuning: Tuning = "full",
    base: str | None = None,
    loss_spike_factor: float | None = None,
    keep_checkpoints: int = 0,
    keep_best: str | None = None,
    wandb: Tracking = "off",
    project: str = "longlive",
) -> None:
    """Run `stage` up to step `steps`, from the newest checkpoint in folder `run` if there is one, then export it to `run/export`.

    Several ranks must have joined (`parallel.world`). A loss is known only after its step was taken, so the last checkpoint is the good
    state, not the networks in memory. For `tuning`, `base` and `keep_checkpoints` see `Checkpoints`, for `loss_spike_factor` `LossWatch`,
    for `keep_best`, the name of a validation metric, `BestExport`.

    Raises:
        ValueError: when the checkpoint in `run` has another stage, tuning, base or number of ranks, or `keep_best` is not measured.
        FloatingPointError: on all ranks, when a loss is not finite or spikes; its batch is saved.
        Terminated: after SIGTERM, once the current step is finished; its message says which step is saved.
    """
    world = get_world()
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run, stage=name, tuning=tuning, base=base, keep=keep_checkpoints, world=world)
    start = checkpoints.resume(stage)
    if start:
        log.info("resuming %s at step %d of %d", name, start, steps)
    if world.is_main:
        write_json(run / "settings.json", {"stage": name, "tuning": tuning, "base": base, "settings": settings, **made_with(world.size)})
    watch, save_due = LossWatch(loss_spike_factor), False
    best = _best_export(stage, run, keep_best, start, world)
    tracking = {"wandb": wandb, "project": project, "settings": settings}
    journal = RunLog(run, name=name, start=start, steps=steps, log_every=log_every, writes=world.is_main, **tracking)
    for line in journal.past:
        watch.remember(line)
    with journal, termination() as requested:
        for step in range(start, steps):
            began, done = time.perf_counter(), step + 1
            metrics, ending = _step(stage, step, watch, requested, checkpoints, world)
            watch.remember(journal.step(done, metrics, time.perf_counter() - began))
            # Before the checkpoint: a run that resumes from it then has all lines up to it, and none twice.
            if done % validate_every == 0 or done == steps:
                _validate(stage, run, done, journal, best)
            save_due = save_due or ending or done % save_every == 0 or done == steps
            if save_due and (stage.between_videos or world.size == 1):  # several ranks save only between videos
                checkpoints.save(stage, done)
                save_due = False
            if ending:
                saved = "the last checkpoint" if save_due else f"step {done} of {steps}"
                raise Terminated(f"received SIGTERM; {saved} is saved in {checkpoints.path}, start again to continue")
    stage.export(run / "export")
    log.info("exported to %s", run / "export")
