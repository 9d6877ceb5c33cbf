"""Long tuning against clips only: quality as a video grows to twenty clips. `python -m experiments.c_length`."""

from __future__ import annotations

import sys
import time
from functools import partial

from experiments.arms import ARMS, LONGEST, Trained
from experiments.command import main
from experiments.measure import DRIFT_COLUMNS, Case, Scores, claim, drift_cells, lasting, line, setting
from experiments.report import Report, Table
from experiments.state_model import CLIP
from longlive.evaluation.charts import Panel

NAMES = {"init": "init", "short": "clips only, as long", "long": "long tuning"}


def experiment(trained: Trained) -> Report:
    """The same start, trained on for as many steps on clips or on long videos."""
    clock, many, clips = time.perf_counter(), trained.scale.resamples, trained.scale.length_clips
    scores: dict[str, Scores] = {arm: lasting(trained, Case(arm), clips) for arm in NAMES}
    long, short = scores["long"], scores["short"]
    compare = partial(claim, resamples=many)
    claims = [
        compare("at the end long tuning is nearer to the manifold", "less", long, short, "distance", at=-1),
        compare("at the end long tuning adheres more", "more", long, short, "adherence", at=-1),
        compare("at the end long tuning has kept more identity", "more", long, short, "identity", at=-1),
        compare("at the end long tuning has kept the light better", "less", long, short, "light", at=-1),
        compare("at the end long tuning's steps are truer", "less", long, short, "step", at=-1),
        compare("in the first clip they are as near to the manifold", "equal", long, short, "distance", at=0, margin=0.02),
        compare("in the first clip they adhere as much", "equal", long, short, "adherence", at=0, margin=0.03),
    ]
    descriptions = {words: ARMS[arm].description for arm, words in NAMES.items()}
    panels = []
    for name, title, label in (
        ("distance", "Distance to the manifold", "distance / norm"),
        ("adherence", "All four captioned attributes", "share of frames right"),
        ("light", "Light", "degrees since the first block"),
        ("step", "Step error", "cells"),
    ):
        curves = [line(words, scores[arm][name], step=CLIP, first=CLIP, resamples=many) for arm, words in NAMES.items()]
        panels.append(Panel(title, "frame", label, curves, marks={float(LONGEST): "longest trained"}))
    return Report(
        name="c_length",
        title="Long tuning against clips only",
        question="Paper: train long, test long. Tuning on its own long videos keeps quality far beyond the clip; clips alone do not.",
        setting=setting(trained, f"{clips * CLIP} frames ({clips} clips) of one prompt", **descriptions),
        tables=[Table("Drift", DRIFT_COLUMNS, {words: drift_cells(scores[arm], resamples=many) for arm, words in NAMES.items()})],
        claims=claims,
        panels=panels,
        seconds=time.perf_counter() - clock,
        training_seconds=trained.seconds(),
    )


if __name__ == "__main__":
    sys.exit(main({"c_length": experiment}))
