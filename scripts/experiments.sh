#!/usr/bin/env bash
# Measures the paper's claims in the state world, setting up what is missing first: all experiments, or those named (a_switch b_attention …).
# Options go to each; --quick takes seconds and only shows that it runs. Networks are trained once, into runs/experiments, and kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
names=()
while [[ $# -gt 0 && "$1" != -* ]]; do
    names+=("$1")
    shift
done
for name in "${names[@]:-all}"; do
    "$PYTHON" -m "experiments.$name" "$@"
done
