#!/usr/bin/env bash
# A benchmark from prompts to table: generates its videos, measures and scores them. The same command continues a run that was stopped.
#   bash scripts/vbench.sh vbench evaluation/longlive --config configs/inference.yaml     # SUITE FOLDER [arguments of prepare]
#   bash scripts/vbench.sh miniature evaluation/miniature                                 # minutes on a laptop
#   bash scripts/vbench.sh compare A B                                                    # any command of python -m longlive.evaluation
# GPUS: number of GPUs that generate the videos (default: all). RUN: arguments of `run`, for example RUN="--static-filter --device cuda".
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh"
evaluation=(-m longlive.evaluation)
case "${1:-}" in
    "" | -* | prepare | run | score | compare | measure | rewrite) exec "$PYTHON" "${evaluation[@]}" "$@" ;;
esac
suite="$1"
folder="${2:?a folder for videos and results, as in: bash scripts/vbench.sh $suite evaluation/mine}"
shift 2
if [[ "$suite" == vbench || "$suite" == long || "$suite" == interactive || "$suite" == switch ]]; then
    bash "$here/setup_vbench.sh" > /dev/null
fi
gpus="${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
if ((gpus > 1)) && [[ " $* " != *" --videos"* ]]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "${evaluation[@]}" prepare "$suite" --output "$folder" "$@"
else
    "$PYTHON" "${evaluation[@]}" prepare "$suite" --output "$folder" "$@"
fi
measured=0
"$PYTHON" "${evaluation[@]}" run "$folder" ${RUN:-} || measured=$?
if ((measured > 1)); then
    exit "$measured"
fi
"$PYTHON" "${evaluation[@]}" score "$folder"
exit "$measured"
