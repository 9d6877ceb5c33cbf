"""Each claim of the paper measured in the state world, against an exact teacher: `python -m experiments.all`; see docs/experiments."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
