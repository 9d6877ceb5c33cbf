#!/usr/bin/env bash
# Makes videos from prompts, setting up what is missing first. Arguments go to inference.py; --help lists them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh"
exec "$PYTHON" "$here/../inference.py" "$@"
