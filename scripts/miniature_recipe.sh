#!/usr/bin/env bash
# Trains the miniature from nothing: every stage of the recipe, in runs/miniature (or RUNS=…). docs/miniature.md has the times.
# Stopped and started again it goes on where it was. Further arguments go to every stage: key=value of longlive/config.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
RUNS="${RUNS:-runs/miniature}"

stage() {  # name, settings that differ from its configuration
    local name="$1"
    shift
    echo "== $name"
    "$PYTHON" train.py --config "configs/miniature/$name.yaml" run="$RUNS/$name" "$@"
}

earlier=(language="$RUNS/language/export" autoencoder="$RUNS/autoencoder/export")

stage language "$@"
stage autoencoder "$@"
stage teacher "${earlier[@]/#/teacher.}" "$@"
stage causal_init "${earlier[@]/#/causal_init.}" causal_init.initial="$RUNS/teacher/export" "$@"

mkdir -p "$RUNS/components"
cp -r "$RUNS/language/export/." "$RUNS/autoencoder/export/." "$RUNS/components/"
if [[ ! -f "$RUNS/prompts/switch_prompts.txt" ]]; then
    "$PYTHON" -m longlive.miniature.prompt_pairs --num 10000 --seed 0 --output "$RUNS/prompts"
fi
shared=(teacher="$RUNS/teacher/export" components="$RUNS/components" embeddings="$RUNS/embeddings" prompts="$RUNS/prompts/prompts.txt")
stage init init.generator="$RUNS/causal_init/export" "${shared[@]/#/init.}" "$@"
stage long long.generator="$RUNS/init/export" "${shared[@]/#/long.}" long.switch_prompts="$RUNS/prompts/switch_prompts.txt" "$@"

"$PYTHON" scripts/bundle_miniature.py --runs "$RUNS" --to "$RUNS/pipeline"
echo "the pipeline is in $RUNS/pipeline: python inference.py --model $RUNS/pipeline --prompt '…'"
