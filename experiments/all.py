"""All experiments, one after another: `python -m experiments.all [--quick]`."""

from __future__ import annotations

import sys

from experiments import a_switch, b_attention, c_length, d_legacy, e_recache
from experiments.command import main

EXPERIMENTS = {
    "a_switch": a_switch.experiment,
    "b_attention": b_attention.experiment,
    "c_length": c_length.experiment,
    "e_recache": e_recache.experiment,
    "d_legacy": d_legacy.experiment,
}

if __name__ == "__main__":
    sys.exit(main(EXPERIMENTS))
