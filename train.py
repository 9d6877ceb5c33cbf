"""Trains a stage: `python train.py --config configs/miniature/causal_init.yaml steps=4000`; started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch

from longlive.config import TrainConfig, load
from longlive.training.stages import build
from longlive.training.trainer import train

log = logging.getLogger("longlive")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", required=True)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of longlive/config.py, e.g. causal_init.clip_batch=8")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = load(TrainConfig, arguments.config, arguments.settings)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        train(
            build(config),
            run=Path(config.run),
            name=config.stage,
            steps=config.steps,
            save_every=config.save_every,
            validate_every=config.validate_every,
            log_every=config.log_every,
            settings=dataclasses.asdict(config),
        )
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    except FloatingPointError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.warning("interrupted; the last checkpoint is in %s, start again to go on", config.run)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
