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

exported() {  # the export of a stage: after its best validation, if it kept that one
    if [[ -d "$RUNS/$1/best" ]]; then echo "$RUNS/$1/best"; else echo "$RUNS/$1/export"; fi
}

earlier=(language="$RUNS/language/export" autoencoder="$RUNS/autoencoder/export")

stage language "$@"
stage autoencoder "$@"
stage teacher "${earlier[@]/#/teacher.}" "$@"
stage causal_init "${earlier[@]/#/causal_init.}" causal_init.initial="$(exported teacher)" "$@"

mkdir -p "$RUNS/components"
cp -r "$RUNS/language/export/." "$RUNS/autoencoder/export/." "$RUNS/components/"
if [[ ! -f "$RUNS/prompts/prompts.jsonl" ]]; then  # backgrounds change most: they are the hardest to switch
    "$PYTHON" -m longlive.miniature.prompt_pairs --num 10000 --seed 0 --output "$RUNS/prompts" \
        --switches 3 --weights background=3 shape=2 --held-out 150
fi
shared=(teacher="$(exported teacher)" components="$RUNS/components" embeddings="$RUNS/embeddings" prompts="$RUNS/prompts/prompts.jsonl")
stage init init.generator="$(exported causal_init)" "${shared[@]/#/init.}" "$@"
stage long long.generator="$(exported init)" long.critic="$(exported init)/critic" "${shared[@]/#/long.}" "$@"

"$PYTHON" scripts/bundle_miniature.py --runs "$RUNS" --to "$RUNS/pipeline"
echo "the pipeline is in $RUNS/pipeline: python inference.py --model $RUNS/pipeline --prompt '…'"
