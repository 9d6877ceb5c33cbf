"""The cost of three deviations of the public v1.0 code from its paper, one at a time. `python -m experiments.d_legacy`."""

from __future__ import annotations

import sys
import time
from functools import partial

from experiments.arms import ARMS, Trained
from experiments.command import main
from experiments.measure import (
    AFTER,
    DRIFT_COLUMNS,
    SWITCH,
    SWITCH_COLUMNS,
    Case,
    Scores,
    claim,
    drift_cells,
    lasting,
    line,
    setting,
    switch_cells,
    switched,
)
from experiments.report import Report, Table
from experiments.state_model import BLOCK, CLIP
from longlive.evaluation.charts import Panel

NAMES = {"long": "mended", "zero_sink": "zero sink", "context_noise": "context noise", "gradient_leak": "gradient leak"}
KEEP_SINK = {"zero_sink": True}  # the public code trains without a sink after a switch, and runs with the old one


def experiment(trained: Trained) -> Report:
    """Trained with each deviation, run as the public code runs (clean context; the sink kept where training had none)."""
    clock, many, clips = time.perf_counter(), trained.scale.resamples, trained.scale.attention_clips
    switches: dict[str, Scores] = {arm: switched(trained, Case(arm, keep_sink=KEEP_SINK.get(arm, False))) for arm in NAMES}
    drifts: dict[str, Scores] = {arm: lasting(trained, Case(arm), clips) for arm in NAMES}
    claims = []
    compare, mended = partial(claim, resamples=many), switches["long"]
    for arm, words in NAMES.items():
        if arm != "long":
            claims += [
                compare(f"{words}: less adherence in the first block after a switch", "less", switches[arm], mended, "adherence", at=0),
                compare(f"{words}: less identity kept through a switch", "less", switches[arm], mended, "identity"),
                compare(f"{words}: farther from the manifold after {clips} clips", "more", drifts[arm], drifts["long"], "distance", at=-1),
            ]
    panels = [
        Panel("New attribute after the switch", "frames after the switch", "share right",
              [line(words, switches[arm]["adherence"], step=BLOCK, first=BLOCK, resamples=many) for arm, words in NAMES.items()]),
        Panel("Distance to the manifold", "frame", "distance / norm",
              [line(words, drifts[arm]["distance"], step=CLIP, first=CLIP, resamples=many) for arm, words in NAMES.items()]),
    ]  # fmt: skip
    return Report(
        name="d_legacy",
        title="Deviations of the public code, one at a time",
        question="What do a zero sink after a switch, noise on the context (sigma 0.00498) and a gradient through the context cost?",
        setting=setting(
            trained,
            f"{SWITCH + AFTER} frames with a switch at {SWITCH}, and {clips * CLIP} frames without",
            **{words: ARMS[arm].description for arm, words in NAMES.items()},
        ),
        tables=[
            Table("Switch", SWITCH_COLUMNS, {words: switch_cells(switches[arm], resamples=many) for arm, words in NAMES.items()}),
            Table("Drift", DRIFT_COLUMNS, {words: drift_cells(drifts[arm], resamples=many) for arm, words in NAMES.items()}),
        ],
        claims=claims,
        panels=panels,
        seconds=time.perf_counter() - clock,
        training_seconds=trained.seconds(),
    )


if __name__ == "__main__":
    sys.exit(main({"d_legacy": experiment}))
