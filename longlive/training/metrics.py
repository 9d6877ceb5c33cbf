"""What a run tells people: metrics, progress, and what it ran with. Knows nothing of what is trained."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

Tracking = Literal["off", "offline", "online"]
"""Whether metrics also go to wandb, and whether that talks to a server."""

SPEED = "seconds_per_step"  # what lines of training have and lines of validation have not
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"

log = logging.getLogger(__name__)


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file up to `step`; half a line at the end, of a run that was killed, is left out."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if line["step"] <= step]


class LossWatch:
    """Notices when a metric is not finite, or a loss more than `factor` times the median of its last `window` logged values.

    A loss is a metric with "loss" in its name. With fewer than `least` values behind it, or no `factor`, it is only asked to be finite.
    """

    def __init__(self, factor: float | None, *, window: int = 100, least: int = 10) -> None:
        self.factor, self.window, self.least = factor, window, least
        self._past: dict[str, deque[float]] = {}

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Logged metrics that were fine."""
        for key, value in metrics.items():
            if "loss" in key:
                self._past.setdefault(key, deque(maxlen=self.window)).append(abs(value))

    def trouble(self, metrics: Mapping[str, float]) -> str | None:
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
    """The package wandb; None when `mode` is "off". Raises ValueError when it is wanted and not installed."""
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={mode} needs the package wandb ({error}): pip install 'longlive[train]', or set wandb=off") from error
    return wandb


def start_wandb(wandb: Any, mode: Tracking, *, project: str, run: Path, settings: Mapping[str, Any]) -> Any:
    """A wandb run named like the folder `run`; when the training is resumed the same one, which ignores steps it already has."""
    identity = run / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    return wandb.init(
        project=project, id=identity.read_text(), name=run.name, dir=str(run), mode=mode, resume="allow", config=dict(settings)
    )


class RunLog:
    """`metrics.jsonl` in the folder of a run, wandb if asked, and a progress bar with losses, seconds a step and the time left.

    Lines past step `start`, which a resumed run is about to make again, are dropped; `past` has those of training before it.

    Args:
        speaks: whether this rank writes; the others only know `past`.

    Raises:
        ValueError: on all ranks, when wandb is asked for and not installed.
    """

    def __init__(
        self,
        run: Path,
        *,
        name: str,
        start: int,
        steps: int,
        wandb: Tracking,
        project: str,
        settings: Mapping[str, Any],
        speaks: bool,
    ) -> None:
        package = import_wandb(wandb)
        self._path, self._speaks, self._wandb = run / "metrics.jsonl", speaks, None
        lines = lines_until(self._path, start)
        self.past = [line for line in lines if SPEED in line]
        if speaks:
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(partial, self._path)
        if speaks and package is not None:
            self._wandb = start_wandb(package, wandb, project=project, run=run, settings=settings)
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=5, bar_format=BAR, disable=not speaks)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after `step` steps, to the last bit."""
        if not self._speaks:
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
