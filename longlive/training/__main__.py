"""Trains a stage: `python train.py --config configs/miniature/causal_init.yaml steps=4000`; started again, it resumes.

On several GPUs: `torchrun --nproc-per-node 8 train.py --config …`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from longlive.config import TrainConfig
from longlive.files import owned
from longlive.parallel.world import World, choose_device, get_world, joined
from longlive.programs.configs import find_config
from longlive.programs.status import exit_status
from longlive.settings import described, load
from longlive.training.stages import build
from longlive.training.trainer import Terminated, train

SINGLE_PROCESS = ("language", "autoencoder", "tiny_decoder", "teacher", "causal_init")  # stages of the miniature

log = logging.getLogger("longlive")


def run(config: TrainConfig, world: World) -> None:
    ode = config.stage == "causal_init" and config.causal_init.objective == "ode"
    if world.size > 1 and config.stage in SINGLE_PROCESS and not ode:
        raise ValueError(f"stage {config.stage} trains in one process, not {world.size}; start it without torchrun")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)  # for libraries; we draw from generators of our own
    device = choose_device(config.device, world)
    with owned(config.run) if world.is_main else nullcontext(), joined(world, device):
        built = build(config, world, device)
        train(
            built.stage,
            tuning=built.tuning,
            base=built.base,
            run=Path(config.run),
            name=config.stage,
            steps=config.steps,
            save_every=config.save_every,
            validate_every=config.validate_every,
            log_every=config.log_every,
            settings=dataclasses.asdict(config),
            loss_spike_factor=config.loss_spike_factor,
            keep_checkpoints=config.keep_checkpoints,
            keep_best=config.keep_best,
            wandb=config.wandb,
            project=config.wandb_project,
        )


def main(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=described(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", required=True)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting below, e.g. causal_init.clip_batch=8")
    arguments = parser.parse_intermixed_args(words)
    arguments.config = find_config(arguments.config)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)

    def command() -> int:
        try:
            run(load(TrainConfig, arguments.config, arguments.settings), get_world())
        except Terminated as ending:
            log.warning("%s", ending)
            return 143
        return 0

    return exit_status(command, interrupted="interrupted; the same command resumes at the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
