"""Prompt switch: KV-recache, cache kept, cache cleared (paper: table 4). `python -m experiments.a_switch [--quick]`."""

from __future__ import annotations

import sys
import time
from functools import partial

import torch

from experiments.arms import LENGTHS, Trained
from experiments.command import main
from experiments.measure import AFTER, SWITCH, SWITCH_COLUMNS, Case, Scores, claim, latency_claim, line, setting, switch_cells, switched
from experiments.metrics import estimate, image_jump
from experiments.report import Claim, Report, Table
from experiments.state_model import BLOCK, CLIP
from experiments.videos import switch_pairs
from longlive.evaluation.charts import Panel
from longlive.types import Latents

MODES = {"recache": "joint", "kept": "none", "cleared": "clear"}
OWN = {"recache": "long", "kept": "long_kept", "cleared": "long_cleared"}
FIRST_CLIP = slice(0, CLIP // BLOCK)  # after the switch
TITLES = {"recache": "trained with switches and recache", "own": "each trained with its own mode", "none": "never trained on a switch"}
NAMES = {"recache": "recache", "kept": "cache kept", "cleared": "cache cleared"}


def experiment(trained: Trained) -> Report:
    """Each mode with a network trained with recache, with one trained with that mode, and with one trained without switches."""
    clock, many = time.perf_counter(), trained.scale.resamples
    before = [pair.before for pair in switch_pairs(trained.scale.videos)]
    scores: dict[tuple[str, str], Scores] = {}
    jumps: dict[str, list[torch.Tensor]] = {}
    for training, arms in (("recache", dict.fromkeys(MODES, "long")), ("own", OWN), ("none", dict.fromkeys(MODES, "short"))):
        for mode, recache in MODES.items():
            if training == "own" and mode == "recache":
                continue

            def look(video: Latents, label: str = f"{training}/{mode}") -> None:
                jumps.setdefault(label, []).append(image_jump(video, before, SWITCH))

            scores[training, mode] = switched(trained, Case(arms[mode], recache), look)  # type: ignore[arg-type]
    scores["own", "recache"] = scores["recache", "recache"]
    jumps["own/recache"] = jumps["recache/recache"]

    tables = []
    for training, title in TITLES.items():
        rows = {
            NAMES[mode]: [
                *switch_cells(scores[training, mode], resamples=many),
                estimate(torch.stack(jumps[f"{training}/{mode}"]), resamples=many),
            ]
            for mode in MODES
        }
        tables.append(Table(title[0].upper() + title[1:], [*SWITCH_COLUMNS, "image change at the switch / before"], rows))
    tables.append(_by_attribute(scores, trained))
    panels = [
        Panel(
            f"New attribute: {title}",
            "frames after the switch",
            "share right",
            [line(NAMES[mode], scores[training, mode]["adherence"], step=BLOCK, first=BLOCK, resamples=many) for mode in MODES],
            (0.0, 1.0),
        )
        for training, title in TITLES.items()
    ]
    return Report(
        name="a_switch",
        title="Prompt switch: recache, cache kept, cache cleared",
        question="Paper (table 4): recache follows the new prompt as fast as an empty cache, and keeps the picture as well as a full one.",
        setting=setting(
            trained,
            f"{SWITCH + AFTER} frames, at {SWITCH} one attribute changes, each of the four equally often",
            long=f"trained on videos of {' and '.join(map(str, LENGTHS))} frames with a switch where a clip begins; the sink is refreshed",
        ),
        tables=tables,
        claims=_claims(scores, many),
        panels=panels,
        seconds=time.perf_counter() - clock,
        training_seconds=trained.seconds(),
    )


def _claims(scores: dict[tuple[str, str], Scores], resamples: int) -> list[Claim]:
    """The paper's claims about the three modes, trained with recache and each in its own mode."""
    claims = []
    compare, wait = partial(claim, resamples=resamples), partial(latency_claim, resamples=resamples)
    for training, where in (("recache", "trained with recache"), ("own", "each trained with its own mode")):
        recache, kept, cleared = (scores[training, mode] for mode in MODES)
        claims += [
            compare(f"{where}: recache adheres more than cache kept in the first block", "more", recache, kept, "adherence", at=0),
            compare(f"{where}: recache adheres more than cache kept in the first clip", "more", recache, kept, "adherence", at=FIRST_CLIP),
            wait(f"{where}: recache has a shorter latency than cache kept", "less", recache, kept),
            wait(f"{where}: recache has the latency of cache cleared", "equal", recache, cleared, margin=BLOCK),
            compare(f"{where}: recache keeps more identity than cache cleared", "more", recache, cleared, "identity", margin=0.05),
            compare(f"{where}: recache keeps as much identity as cache kept", "equal", recache, kept, "identity", margin=0.02),
            compare(f"{where}: recache jumps less than cache cleared", "less", recache, cleared, "jump", margin=0.1),
            compare(f"{where}: recache flickers less than cache cleared", "less", recache, cleared, "flicker", margin=0.05),
            compare(f"{where}: recache flickers as much as cache kept", "equal", recache, kept, "flicker", margin=0.05),
        ]
    trained_for, not_trained_for = scores["recache", "recache"], scores["none", "recache"]
    statement = "recache: training on switches makes the first clip adhere more"
    claims.append(compare(statement, "more", trained_for, not_trained_for, "adherence", at=FIRST_CLIP))
    return claims


def _by_attribute(scores: dict[tuple[str, str], Scores], trained: Trained) -> Table:
    """First-block adherence by the attribute that changes, trained with recache."""
    pairs = switch_pairs(trained.scale.videos)
    attributes = list(dict.fromkeys(pair.attribute for pair in pairs))
    rows = {}
    for mode in MODES:
        values = scores["recache", mode]["adherence"][..., 0]
        chosen = [[v for v, pair in enumerate(pairs) if pair.attribute == name] for name in attributes]
        rows[NAMES[mode]] = [estimate(values[:, which], resamples=trained.scale.resamples) for which in chosen]
    return Table("First block after the switch, by the attribute that changes (trained with recache)", attributes, rows)


if __name__ == "__main__":
    sys.exit(main({"a_switch": experiment}))
