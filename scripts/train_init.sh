#!/usr/bin/env bash
# The first training stage (configs/train_init.yaml, or --config …) on all GPUs of this machine, setting up what is missing first.
# Several machines: NNODES=8 NODE_RANK=0 MASTER_ADDR=… on each. Arguments go to train.py: --config YAML key=value …
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/launch_training.sh"
launch_training "$here/../configs/train_init.yaml" "$@"
