"""Attention: full, a window, a window with a sink; drift to ten clips, cost of a block. `python -m experiments.b_attention`."""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

import torch

from experiments.arms import LONGEST, Trained
from experiments.command import main
from experiments.measure import DRIFT_COLUMNS, Case, Scores, claim, drift_cells, lasting, line, setting
from experiments.report import Claim, Report, Table
from experiments.state_model import BLOCK, CLIP, WINDOW
from experiments.videos import Video
from longlive.cache.window import Window
from longlive.evaluation.charts import Line, Panel

NAMES = {"sink": "window 9 + sink 3", "window": "window 12", "full": "full", "turned": "window 9 + sink 3, turned"}
OWN = {"sink": "long", "window": "long_window", "full": "long_full", "turned": "long"}


def experiment(trained: Trained) -> Report:
    """Each kind with a network trained with it on long videos, and with one trained on clips (where all kinds attend to the same)."""
    clock, many, clips = time.perf_counter(), trained.scale.resamples, trained.scale.attention_clips
    windows = {"sink": WINDOW, "window": Window(0, CLIP), "full": Window.full(clips * CLIP), "turned": WINDOW}
    scores: dict[tuple[str, str], Scores] = {}
    seconds: dict[str, list[list[float]]] = {}
    for training, arms in (("long", OWN), ("short", dict.fromkeys(OWN, "short"))):
        for kind, window in windows.items():

            def look(video: Video, label: str = kind) -> None:
                seconds.setdefault(label, []).append(video.seconds)

            case = Case(arms[kind], window=window, relative=kind == "turned")
            scores[training, kind] = lasting(trained, case, clips, look)

    costs = {kind: _costs(runs) for kind, runs in seconds.items() if kind != "turned"}
    tables = [
        Table(title, DRIFT_COLUMNS, {NAMES[kind]: drift_cells(scores[training, kind], resamples=many) for kind in windows})
        for training, title in (("long", "Trained on long videos, each with its own attention"), ("short", "Trained on clips only"))
    ]
    blocks = {}
    for kind in costs:
        early, late = (1000 * statistics.median(run[k] for run in costs[kind]) for k in (0, -1))
        blocks[NAMES[kind]] = [early, late, float(min(windows[kind].visible, clips * CLIP))]
    columns = ["ms when the window is just full", "ms at the end", "frames seen at the end"]
    tables.append(Table(f"Cost of a block of {trained.scale.videos} videos", columns, blocks))
    panels = []
    for name, title, label in (
        ("light", "Light", "degrees since the first block"),
        ("distance", "Distance to the manifold", "distance / norm"),
        ("adherence", "All four captioned attributes", "share of frames right"),
    ):
        curves = [line(NAMES[kind], scores["long", kind][name], step=CLIP, first=CLIP, resamples=many) for kind in windows]
        panels.append(Panel(f"{title} (trained on long videos)", "frame", label, curves, marks={float(LONGEST): "longest trained"}))
    curves = [line(NAMES[kind], scores["short", kind]["distance"], step=CLIP, first=CLIP, resamples=many) for kind in windows]
    panels.append(Panel("Distance to the manifold (trained on clips)", "frame", "distance / norm", curves, marks={float(CLIP): "clip"}))
    panels.append(Panel("Cost of a block", "frame", "ms", [_cost_line(NAMES[kind], costs[kind], clips) for kind in costs]))
    return Report(
        name="b_attention",
        title="Attention: full, window, window with a sink",
        question="Paper: a short window with a sink is as consistent as full attention, at a constant cost; a window alone drifts.",
        setting=setting(
            trained,
            f"{clips * CLIP} frames ({clips} clips) of one prompt",
            turned="the sink's keys are turned to stand just before the window (infinite mode); otherwise as window 9 + sink 3",
        ),
        tables=tables,
        claims=_claims(scores, costs, many),
        panels=panels,
        seconds=time.perf_counter() - clock,
        training_seconds=trained.seconds(),
    )


def _claims(scores: dict[tuple[str, str], Scores], costs: dict[str, list[list[float]]], resamples: int) -> list[Claim]:
    """About drift at the end of the videos, and about the cost of a block."""
    claims = []
    compare = partial(claim, resamples=resamples, at=-1)
    for training, where in (("long", "trained on long videos"), ("short", "trained on clips")):
        sink, window, full, turned = (scores[training, kind] for kind in ("sink", "window", "full", "turned"))
        claims += [
            compare(f"{where}: at the end a sink has kept more identity than a window alone", "more", sink, window, "identity"),
            compare(f"{where}: at the end a sink has kept the light better than a window alone", "less", sink, window, "light"),
            compare(f"{where}: at the end a turned sink has kept the light better than a window alone", "less", turned, window, "light"),
            compare(f"{where}: at the end a sink is nearer to the manifold than a window alone", "less", sink, window, "distance"),
            compare(
                f"{where}: at the end full attention has kept as much identity as a sink", "equal", full, sink, "identity", margin=0.05
            ),
        ]
    growth = {kind: {"cost": torch.tensor([[run[-1] / run[0]] for run in costs[kind]])} for kind in costs}
    as_before = {"cost": torch.ones_like(growth["full"]["cost"])}
    compare = partial(claim, resamples=resamples)
    statement = "a block of full attention costs more at the end than when the window is just full"
    claims.append(compare(statement, "more", growth["full"], as_before, "cost", margin=0.1))
    for kind in ("sink", "window"):
        statement = f"a block of {NAMES[kind]} costs the same at the end as when the window is just full"
        claims.append(compare(statement, "equal", growth[kind], as_before, "cost", margin=0.1))
    return claims


def _costs(runs: list[list[float]]) -> list[list[float]]:
    """Seconds per block of each run, medians over the blocks of a clip, from the first block with a full window on."""
    per_clip = CLIP // BLOCK
    return [[statistics.median(run[k : k + per_clip]) for k in range(per_clip, len(run), per_clip)] for run in runs]


def _cost_line(label: str, costs: list[list[float]], clips: int) -> Line:
    """Median, minimum and maximum over runs."""
    by_clip = [[1000 * run[k] for run in costs] for k in range(clips - 1)]
    xs = [CLIP * (k + 2) for k in range(clips - 1)]
    return Line(label, xs, [statistics.median(c) for c in by_clip], [min(c) for c in by_clip], [max(c) for c in by_clip])


if __name__ == "__main__":
    sys.exit(main({"b_attention": experiment}))
