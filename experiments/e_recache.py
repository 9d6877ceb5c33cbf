"""Sink refreshed or kept, recache joint or block by block. `python -m experiments.e_recache`."""

from __future__ import annotations

import sys
import time
from functools import partial

from experiments.arms import Trained
from experiments.command import main
from experiments.measure import AFTER, SWITCH, SWITCH_COLUMNS, Case, Scores, claim, line, setting, switch_cells, switched
from experiments.report import Report, Table
from experiments.state_model import BLOCK
from longlive.evaluation.charts import Panel

CASES: dict[str, Case] = {
    "joint, refreshed": Case("long"),
    "joint, kept": Case("long", keep_sink=True),
    "causal, refreshed": Case("long", "causal"),
    "causal, kept": Case("long", "causal", keep_sink=True),
}
OWN: dict[str, Case] = {
    "joint, refreshed": Case("long"),
    "joint, kept": Case("long_keep_sink", keep_sink=True),
    "causal, refreshed": Case("long_causal", "causal"),
}


def experiment(trained: Trained) -> Report:
    """All four variants with one network, and three of them with networks trained for them."""
    clock, many = time.perf_counter(), trained.scale.resamples
    one: dict[str, Scores] = {name: switched(trained, case) for name, case in CASES.items()}
    own: dict[str, Scores] = {
        name: one[name] if case == CASES["joint, refreshed"] else switched(trained, case) for name, case in OWN.items()
    }
    claims = []
    compare = partial(claim, resamples=many)
    for where, scores in (("one network", one), ("each trained so", own)):
        joint, kept, causal = (scores[name] for name in OWN)
        claims += [
            compare(f"{where}: a kept sink adheres as a refreshed one, first block", "equal", kept, joint, "adherence", at=0, margin=0.03),
            compare(f"{where}: a kept sink keeps as much identity as a refreshed one", "equal", kept, joint, "identity", margin=0.02),
            compare(f"{where}: block-causal recache adheres as joint, first block", "equal", causal, joint, "adherence", at=0, margin=0.03),
            compare(f"{where}: block-causal recache keeps as much identity as joint", "equal", causal, joint, "identity", margin=0.02),
            compare(f"{where}: block-causal recache flickers as joint", "equal", causal, joint, "flicker", margin=0.05),
        ]
    panels = [
        Panel(f"New attribute: {where}", "frames after the switch", "share right",
              [line(name, found["adherence"], step=BLOCK, first=BLOCK, resamples=many) for name, found in scores.items()])
        for where, scores in (("one network, trained jointly and refreshed", one), ("each trained so", own))
    ]  # fmt: skip
    return Report(
        name="e_recache",
        title="Sink refreshed or kept, recache joint or block-causal",
        question="New here: does it matter what a recache does with the sink, and whether the frames pass together or block by block?",
        setting=setting(trained, f"{SWITCH + AFTER} frames, at {SWITCH} one attribute changes"),
        tables=[
            Table(
                "One network, trained with joint recache and the sink refreshed",
                SWITCH_COLUMNS,
                {name: switch_cells(found, resamples=many) for name, found in one.items()},
            ),
            Table("Each trained so", SWITCH_COLUMNS, {name: switch_cells(found, resamples=many) for name, found in own.items()}),
        ],
        claims=claims,
        panels=panels,
        seconds=time.perf_counter() - clock,
        training_seconds=trained.seconds(),
    )


if __name__ == "__main__":
    sys.exit(main({"e_recache": experiment}))
