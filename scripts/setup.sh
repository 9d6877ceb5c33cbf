#!/usr/bin/env bash
# Makes ready what the programs need and sets PYTHON; sourced by the other scripts, or run alone: bash scripts/setup.sh
#
# A Python that has everything already is used as it is: $LONGLIVE_PYTHON, or that of the active environment.
# Otherwise .venv is made here (with $LONGLIVE_PYTHON, else the first Python >= 3.10 found) and filled from requirements.lock,
# again only when that file or pyproject.toml changes. Which build of torch comes (CUDA, CPU) is pip's own choice for the machine.
set -euo pipefail
LONGLIVE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

has_everything() {  # every import the programs need, and pytest; looks for modules without loading them
    new_enough "$1" && "$1" - "$LONGLIVE_ROOT" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, importlib.util, sys
modules = "torch diffusers transformers accelerate peft omegaconf einops jaxtyping av safetensors ftfy sentencepiece tokenizers tqdm PIL numpy psutil pytest fastapi uvicorn websockets prometheus_client matplotlib"
missing = [name for name in modules.split() if importlib.util.find_spec(name) is None]
version = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
sys.exit(bool(missing) or version < (2, 8))
PYTHON
}

find_python() {
    local candidate
    for candidate in ${LONGLIVE_PYTHON:+"$LONGLIVE_PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
        if [[ -n "${LONGLIVE_PYTHON:-}" ]]; then
            echo "error: LONGLIVE_PYTHON=$LONGLIVE_PYTHON is not a Python 3.10 or newer ($("$candidate" --version 2>&1 || true))." >&2
            return 1
        fi
    done
    echo "error: LongLive needs Python 3.10 or newer; found $(python3 --version 2>&1 || echo none). Install one, or name it: LONGLIVE_PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

set_up() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -n "${LONGLIVE_PYTHON:-}" ]] && has_everything "$LONGLIVE_PYTHON"; then
        PYTHON="$LONGLIVE_PYTHON"
        return
    fi
    if [[ -n "$active" && -x "$active/bin/python" ]] && has_everything "$active/bin/python"; then
        PYTHON="$active/bin/python"
        return
    fi

    local venv="$LONGLIVE_ROOT/.venv"
    PYTHON="$venv/bin/python"
    local stamp="$venv/.longlive-installed"
    local wanted
    wanted="$(cat "$LONGLIVE_ROOT/requirements.lock" "$LONGLIVE_ROOT/pyproject.toml" | cksum)"
    if [[ -x "$PYTHON" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    local base
    base="$(find_python)" || exit 1
    if [[ ! -x "$PYTHON" ]] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        echo "setup: making $venv with $("$base" --version)" >&2
        "$base" -m venv --clear "$venv" || {
            echo "error: $base cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." >&2
            exit 1
        }
    fi
    local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
    echo "setup: installing torch, then the rest of requirements.lock (a few minutes, once)" >&2
    "${pip[@]}" --constraint "$LONGLIVE_ROOT/requirements.lock" torch
    "${pip[@]}" --requirement "$LONGLIVE_ROOT/requirements.lock"
    "${pip[@]}" --no-deps --no-build-isolation --editable "$LONGLIVE_ROOT"
    echo "$wanted" > "$stamp"
}

set_up
export PYTHON
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    echo "$PYTHON"
fi
