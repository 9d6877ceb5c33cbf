"""What a run reports: metrics and progress. Knows nothing of what is trained."""

from __future__ import annotations

import json
import logging
import math
import secrets
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from longlive.files import write_text

Tracking = Literal["off", "offline", "online"]
"""Whether metrics also go to wandb, and whether that connects to a server."""

SPEED = "seconds_per_step"  # in lines of training, not in those of validation
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"

log = logging.getLogger(__name__)


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file up to `step`, without an incomplete last line, which a killed run may leave."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if line["step"] <= step]


class LossWatch:
    """Detects a metric that is not finite, or a loss more than `factor` times the median of its last `window` logged values.

    A loss is a metric with "loss" in its name. With fewer than `least` past values, or without a `factor`, it only must be finite.
    """

    def __init__(self, factor: float | None, *, window: int = 100, least: int = 10) -> None:
        self.factor, self.window, self.least = factor, window, least
        self._past: dict[str, deque[float]] = {}

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Add logged metrics to the past values."""
        for key, value in metrics.items():
            if "loss" in key:
                self._past.setdefault(key, deque(maxlen=self.window)).append(abs(value))

    def problem(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with these metrics, or None."""
        for key, value in metrics.items():
            if not math.isfinite(value):
                return f"{key} is {value}"
            past = self._past.get(key, ())
            if self.factor is not None and len(past) >= self.least:
                usual = statistics.median(past)
                if abs(value) > self.factor * usual > 0:
                    return f"{key} is {value:.4g}, more than {self.factor:g} times its median of {usual:.4g}"
        return None


def import_wandb(mode: Tracking) -> Any:
    """The package wandb; None when `mode` is "off". Raises ValueError when it is needed and not installed."""
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={mode} needs the package wandb ({error}): pip install 'longlive[train]', or set wandb=off") from error
    return wandb


def start_wandb(wandb: Any, mode: Tracking, *, project: str, run: Path, settings: Mapping[str, Any]) -> Any:
    """A wandb run named after the folder `run`; a resumed training continues its run, which ignores steps it already has."""
    identity = run / "wandb_id"
    if not identity.exists():
        write_text(identity, secrets.token_hex(4))
    return wandb.init(
        project=project, id=identity.read_text(), name=run.name, dir=str(run), mode=mode, resume="allow", config=dict(settings)
    )


class RunLog:
    """`metrics.jsonl` in the folder of a run, wandb if wanted, and a progress bar with losses, seconds per step and the time left.

    Lines after step `start`, which a resumed run will write again, are dropped; `past` has the training lines before it.

    Args:
        log_every: steps per line.
        writes: whether this rank writes; the others only read `past`.

    Raises:
        ValueError: on all ranks, when wandb is wanted and not installed.
    """

    def __init__(
        self,
        run: Path,
        *,
        name: str,
        start: int,
        steps: int,
        log_every: int,
        wandb: Tracking,
        project: str,
        settings: Mapping[str, Any],
        writes: bool,
    ) -> None:
        package = import_wandb(wandb)
        self._path, self._writes, self._wandb = run / "metrics.jsonl", writes, None
        self._steps, self._log_every, self._last_line = steps, log_every, start
        self._seconds, self._newest = 0.0, dict[str, float]()  # since the last line
        lines = lines_until(self._path, start)
        self.past = [line for line in lines if SPEED in line]
        if writes:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        if writes and package is not None:
            self._wandb = start_wandb(package, wandb, project=project, run=run, settings=settings)
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=5, bar_format=BAR, disable=not writes)

    def step(self, done: int, metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
        """A training step, after which `done` are done. Every `log_every` steps, and after the last, this writes a line and returns it.

        A network that is not trained at every step reports only then: a line has the newest value of each metric since the last line.
        Returns an empty dictionary when no line is written.
        """
        self._bar.update()
        self._seconds += seconds
        self._newest |= metrics
        if done % self._log_every and done != self._steps:
            return {}
        line = self._newest | {SPEED: self._seconds / (done - self._last_line)}
        self.write(done, line)
        self._seconds, self._last_line, self._newest = 0.0, done, {}
        return line

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics after `step` steps, in full precision."""
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        losses = {key: f"{value:.4g}" for key, value in metrics.items() if "loss" in key}
        if losses:
            self._bar.set_postfix(losses, refresh=False)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
