"""The trained networks that experiments compare (arms), by name: which arm they continue, and their settings.

All share one pre-trained start; `init` and the arms that continue it are trained for each seed. The arms of a seed see the same prompts
in the same order. Each is trained once, into its own folder; an interrupted training resumes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.scale import Scale
from experiments.state_model import CLIP, OVERLAP, Distillation, WorldStage, distillation_stage, new_network
from experiments.state_world import tables
from longlive.cache.window import Window
from longlive.models.wan import WanTransformer
from longlive.training.networks import load_network
from longlive.training.trainer import train, weights_digest

LENGTHS = (48, 120)  # frames of the training videos; with long ones alone switches would be rare
LONGEST = max(LENGTHS)
SWITCHES = tuple(range(CLIP, LONGEST, CLIP - OVERLAP))  # wherever a clip begins
LONG: Mapping[str, Any] = {"max_frames": LENGTHS, "switch_at": SWITCHES}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """`start`: the arm that it continues (None: the pre-trained start); `settings`: those that differ from the defaults."""

    description: str
    start: str | None = "init"
    settings: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    "init": Arm("stage init: clips only", None),
    "short": Arm("init trained on, on clips only, as long as the long arms", settings={}),
    "long": Arm("stage long: streaming, switches with joint recache, sink refreshed", settings=LONG),
    "long_window": Arm("long with a window of 12 and no sink", settings={**LONG, "window": Window(0, CLIP)}),
    "long_full": Arm("long with full attention", settings={**LONG, "window": Window.full(LONGEST)}),
    "long_kept": Arm("long, a switch keeps the cache", settings={**LONG, "recache": "none"}),
    "long_cleared": Arm("long, a switch clears the cache", settings={**LONG, "recache": "clear"}),
    "long_keep_sink": Arm("long, a switch keeps the sink", settings={**LONG, "keep_sink": True}),
    "long_causal": Arm("long, block-causal recache", settings={**LONG, "recache": "causal"}),
    "zero_sink": Arm("long as in the public code: no sink after a switch", settings={**LONG, "deviation": "zero_sink"}),
    "context_noise": Arm("long as in the public code: noise on the context", settings={**LONG, "deviation": "context_noise"}),
    "gradient_leak": Arm("long as in the public code: gradient through the context", settings={**LONG, "deviation": "gradient_leak"}),
}


class Trained:
    """Networks of a run folder, trained when they are first needed.

    Raises:
        ValueError: when the folder has a network of that name that was trained with other settings.
    """

    def __init__(self, runs: Path, scale: Scale) -> None:
        self.runs, self.scale = runs, scale

    def generator(self, arm: str, seed: int) -> WanTransformer:
        """The arm's averaged generator, frozen."""
        return load_network(self._distilled(arm, seed) / "transformer")

    def seconds(self) -> dict[str, float]:
        """Wall seconds of training of each run folder that exists."""
        found = {}
        for journal in sorted(self.runs.glob("**/metrics.jsonl")):
            lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
            steps = [0, *(line["step"] for line in lines)]
            speeds = [line["seconds_per_step"] for line in lines]
            found[str(journal.parent.relative_to(self.runs))] = sum(s * (b - a) for s, a, b in zip(speeds, steps, steps[1:]))
        return found

    def _distilled(self, name: str, seed: int) -> Path:
        arm, scale = ARMS[name], self.scale
        stage = "init" if arm.start is None else "long"
        sizes = {part: getattr(scale, f"{stage}_{part}") for part in ("steps", "lr", "critic_lr", "critic_updates")}
        settings = Distillation(batch=scale.batch, **sizes, **arm.settings)
        run = self.runs / f"seed_{seed}" / name
        if not self._is_finished(run, about := {**asdict(settings), "seed": seed}):
            if arm.start is None:
                generator, critic = (load_network(self.pretrained()) for _ in range(2))
            else:
                start = self._distilled(arm.start, seed)
                generator, critic = load_network(start / "transformer"), load_network(start / "critic" / "transformer")
            number = 1000 * seed + (0 if arm.start is None else 1)  # arms that continue `init` see other prompts than it did
            self._train(distillation_stage(generator, critic, settings, seed=number), run, settings.steps, about)
        return run / "export"

    def pretrained(self) -> Path:
        """The network that every seed starts from, generator and critic."""
        scale, run = self.scale, self.runs / "start"
        sizes = {"batch": scale.pretraining_batch, "steps": scale.pretraining_steps, "lr": scale.pretraining_lr}
        if not self._is_finished(run, about := {**sizes, "width": scale.width, "layers": scale.layers, "world": weights_digest(tables())}):
            stage = WorldStage(new_network(0, width=scale.width, layers=scale.layers), seed=0, **sizes)
            self._train(stage, run, scale.pretraining_steps, about)
        return run / "export" / "transformer"

    @staticmethod
    def _is_finished(run: Path, about: dict[str, Any]) -> bool:
        """Whether the run is finished. Raises ValueError when it was started with other settings."""
        file = run / "settings.json"
        if file.exists():
            then, now = json.loads(file.read_text(encoding="utf-8"))["settings"], json.loads(json.dumps(about, default=str))
            if then != now:
                changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
                raise ValueError(f"{run} was trained with another {', '.join(changed)}; remove it, or choose another folder with --runs")
        return (run / "export" / "transformer" / "config.json").exists()

    @staticmethod
    def _train(stage: Any, run: Path, steps: int, about: dict[str, Any]) -> None:
        clock = time.perf_counter()
        train(stage, run=run, name=run.name, steps=steps, save_every=200, validate_every=steps, log_every=20, settings=about)
        log.info("%s: %d steps in %.0f s", run, steps, time.perf_counter() - clock)
