#!/usr/bin/env bash
# Runs the tests, setting up what is missing first: the quick ones, or with --all the slow ones too (GPU ones where there is a GPU).
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
select=(-m "not slow and not gpu")
if [[ "${1:-}" == "--all" ]]; then
    shift
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        select=()
    else
        select=(-m "not gpu")
    fi
fi
exec "$PYTHON" -m pytest -q ${select[@]+"${select[@]}"} "$@"
