#!/usr/bin/env bash
# Runs the tests, setting up what is missing first: the quick ones, or with --all the slow ones too (GPU ones where there is a GPU),
# or with --annotations those of the core, with the shapes of all its tensors checked against their annotations,
# or with --browser those of the page, in a Chromium that must be on the path, or with --vbench those with the real vbench, whose
# environment is made (several GB). Further arguments go to pytest.
# The quick ones and all run in as many processes as there are cores, at most four; other tests, or named ones, run in one (or: -n 4).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
# An active environment may have everything that the programs need and not what only the tests need.
"$PYTHON" -c 'import beartype, prompt_toolkit, pyte, xdist' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint requirements.lock beartype prompt_toolkit pyte pytest-xdist
select=(-m "not slow and not gpu and not browser and not vbench")
workers=$("$PYTHON" -c 'import os; print(min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 4))')
if [[ "${1:-}" == "--all" ]]; then
    shift
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        select=(-m "not browser and not vbench")
        workers=1 # one GPU is not shared
    else
        select=(-m "not gpu and not browser and not vbench")
    fi
elif [[ "${1:-}" == "--annotations" ]]; then
    shift
    export LONGLIVE_CHECK_ANNOTATIONS=1
    select=(-k "not one_graph" tests/parity/test_transformer_diffusers.py tests/unit/test_{attention,cache,clips,dmd,flow_matching,ops,rollout}.py)
    workers=1
elif [[ "${1:-}" == "--browser" ]]; then
    shift
    "$PYTHON" -c 'import playwright' 2>/dev/null || "$PYTHON" -m pip install --quiet --disable-pip-version-check "playwright>=1.40"
    select=(-m browser)
    workers=1
elif [[ "${1:-}" == "--vbench" ]]; then
    shift
    bash scripts/setup_vbench.sh > /dev/null
    select=(-m vbench)
    workers=1
fi
for word in "$@"; do # a worker takes ten seconds to start
    if [[ "$word" == tests/* || "$word" == -n* || "$word" == no:xdist || "$word" == -pno:xdist ]]; then
        workers=1
    fi
done
if ((workers > 1)); then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    select+=(-n "$workers" --dist worksteal)
fi
exec "$PYTHON" -m pytest -q "${select[@]}" "$@"
