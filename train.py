"""Trains a stage: `python train.py --config configs/miniature/causal_init.yaml steps=4000`; started again, it resumes.

On several GPUs: `torchrun --nproc-per-node 8 train.py --config …`.
"""

import sys

from longlive.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:], prog="train.py"))
