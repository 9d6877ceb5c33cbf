#!/usr/bin/env bash
# Makes the environment in which the real vbench runs (.venv-vbench, or $LONGLIVE_VBENCH) from requirements/vbench.txt; prints its Python.
#
# LONGLIVE_VBENCH_PYTHON: a Python 3.10, 3.11 or 3.12 to make it with (3.11 is what it was tried with).
# VBENCH_TORCH: other versions, as "torch==2.7.1 torchvision==0.22.1", for GPUs that the pinned build does not know.
# VBENCH_PIP_ARGS: further arguments for pip, as an index of CPU builds.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${LONGLIVE_VBENCH:-$root/.venv-vbench}"
requirements="$root/requirements/vbench.txt"
stamp="$venv/.longlive-installed"
wanted="$(cksum < "$requirements") ${VBENCH_TORCH:-}"

if [[ -x "$venv/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "$venv/bin/python"
    exit
fi

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
base=""
for candidate in ${LONGLIVE_VBENCH_PYTHON:+"$LONGLIVE_VBENCH_PYTHON"} python3.11 python3.10 python3.12 python3; do
    if fits "$candidate"; then
        base="$candidate"
        break
    fi
done
if [[ -z "$base" ]]; then
    echo "error: vbench needs Python 3.10, 3.11 or 3.12; install one, or name it: LONGLIVE_VBENCH_PYTHON=/path/to/python3.11 bash $0" >&2
    exit 1
fi

if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv" 2>/dev/null || echo file)" ]]; then
    echo "error: $venv is there and is no virtual environment; choose an empty folder for LONGLIVE_VBENCH" >&2
    exit 1
fi
echo "setup: making $venv with $("$base" --version); torch and what it brings are several GB (once)" >&2
"$base" -m venv --clear "$venv" || {
    echo "error: $base cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." >&2
    exit 1
}
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${VBENCH_PIP_ARGS:-})
chosen="$(mktemp)"
trap 'rm -f "$chosen"' EXIT
if [[ -n "${VBENCH_TORCH:-}" ]]; then
    grep -v -E '^(torch|torchvision)==' "$requirements" > "$chosen"
    tr ' ' '\n' <<< "$VBENCH_TORCH" >> "$chosen"
else
    cp "$requirements" "$chosen"
fi
# what some packages are built with must be there first: they import it without saying so
"${pip[@]}" --constraint "$chosen" setuptools wheel numpy cython
"${pip[@]}" --no-build-isolation --requirement "$chosen"
"$venv/bin/python" -c 'import vbench.temporal_flickering' > /dev/null
echo "$wanted" > "$stamp"
echo "$venv/bin/python"
