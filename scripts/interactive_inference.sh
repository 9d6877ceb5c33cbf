#!/usr/bin/env bash
# Makes a video whose prompt changes on the way, setting up what is missing first. Arguments go to interactive_inference.py; --help lists them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh"
exec "$PYTHON" "$here/../interactive_inference.py" "$@"
