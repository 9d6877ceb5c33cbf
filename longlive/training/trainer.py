"""The training loop: steps, metrics, checkpoints, resume. Knows nothing of what is trained.

A `Stage` owns its networks, optimisers, data and every random generator it draws from, so that its state is all that a
resumed run needs: the run continues bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)


class Stage(Protocol):
    """One stage of training, advanced a step at a time."""

    def step(self, number: int) -> dict[str, float]:
        """Train on one batch; returns flat-named metrics."""
        ...

    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Measure and draw what a person wants to look at, into `folder`."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that changes while training: weights, optimisers, generators, positions in the data."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained component in the layout that the pipeline loads."""
        ...


def one_cycle(step: int, steps: int, *, warmup: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """`torch.save` that leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(
    stage: Stage, *, run: Path, name: str, steps: int, save_every: int, validate_every: int, log_every: int, settings: dict[str, Any]
) -> None:
    """Run `stage` up to step `steps`, from the newest checkpoint in folder `run` if there is one, then export it to `run/export`.

    Raises:
        ValueError: when the checkpoint in `run` is of another stage.
        FloatingPointError: when a loss is not finite; the state before the step stays in the last checkpoint.
    """
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False, map_location="cpu")
        if saved["stage"] != name:
            raise ValueError(f"{checkpoint} is a checkpoint of stage {saved['stage']!r}, not {name!r}; choose another run folder")
        stage.load(saved["state"])
        start = saved["step"]
        log.info("resuming %s at step %d of %d", name, start, steps)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    (run / "settings.json").write_text(json.dumps({"stage": name, "settings": settings, "versions": versions}, indent=2, default=str))

    def save(step: int) -> None:
        save_atomically({"stage": name, "step": step, "state": stage.state()}, checkpoint)

    with (run / "metrics.jsonl").open("a") as metrics_file, tqdm(total=steps, initial=start, desc=name, mininterval=5) as progress:
        began, last_logged = time.perf_counter(), start
        for step in range(start, steps):
            metrics = stage.step(step)
            for key, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{key} is {value} at step {step}; the last good state is {checkpoint}")
            done = step + 1
            progress.update()
            if done % log_every == 0 or done == steps:
                elapsed = time.perf_counter() - began
                metrics |= {"step": done, "seconds_per_step": elapsed / (done - last_logged)}
                metrics_file.write(json.dumps({k: round(v, 6) for k, v in metrics.items()}) + "\n")
                metrics_file.flush()
                progress.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if "loss" in k})
                began, last_logged = time.perf_counter(), done
            if done % save_every == 0 or done == steps:
                save(done)
            if done % validate_every == 0 or done == steps:
                measured = stage.validate(run, done)
                if measured:
                    log.info("step %d: %s", done, ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
                    metrics_file.write(json.dumps({"step": done, **{k: round(v, 6) for k, v in measured.items()}}) + "\n")
                    metrics_file.flush()
                began, last_logged = time.perf_counter(), done
    stage.export(run / "export")
    log.info("exported to %s", run / "export")
