#!/usr/bin/env bash
# Measures everything that has to be known of a GPU in 8 minutes: bash scripts/gpu_suite.sh OUT
# One JSON line per step in OUT/results.jsonl, written as soon as the step is done; at the end a table, OUT/table.md.
# OUT --small: the same steps with small shapes, for a machine without a GPU. OUT --table: only the table, of a run that was cut, too.
# More: bash scripts/gpu_suite.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$here/../benchmarks/gpu_suite.py" "$@"
