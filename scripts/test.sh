#!/usr/bin/env bash
# Runs the tests, setting up what is missing first: the quick ones, or with --all the slow ones too (GPU ones where there is a GPU),
# or with --annotations those of the core, with the shapes of all its tensors checked against their annotations,
# or with --browser those of the page, in a Chromium that must be on the path, or with --vbench those with the real vbench, whose
# environment is made (several GB). Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
# An active environment may have everything that the programs need and not what only the tests need.
"$PYTHON" -c 'import beartype, xdist' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint requirements.lock beartype pytest-xdist
select=(-m "not slow and not gpu and not browser and not vbench")
if [[ "${1:-}" == "--all" ]]; then
    shift
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        select=(-m "not browser and not vbench")
    else
        select=(-m "not gpu and not browser and not vbench")
    fi
elif [[ "${1:-}" == "--annotations" ]]; then
    shift
    export LONGLIVE_CHECK_ANNOTATIONS=1
    select=(-k "not one_graph" tests/parity/test_transformer_diffusers.py tests/unit/test_{attention,cache,clips,dmd,flow_matching,ops,rollout}.py)
elif [[ "${1:-}" == "--browser" ]]; then
    shift
    "$PYTHON" -c 'import playwright' 2>/dev/null || "$PYTHON" -m pip install --quiet --disable-pip-version-check "playwright>=1.40"
    select=(-m browser)
elif [[ "${1:-}" == "--vbench" ]]; then
    shift
    bash scripts/setup_vbench.sh > /dev/null
    select=(-m vbench)
fi
exec "$PYTHON" -m pytest -q ${select[@]+"${select[@]}"} "$@"
