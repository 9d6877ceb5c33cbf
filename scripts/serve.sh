#!/usr/bin/env bash
# Serves live sessions, setting up what is missing first, and prints the URL to open. Arguments go to longlive.serving; --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" -m longlive.serving "$@"
