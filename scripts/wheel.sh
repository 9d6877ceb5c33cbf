#!/usr/bin/env bash
# Builds the wheel and tries it in an empty environment outside the repository: every command's help, the doctor, a video of the miniature.
# What the wheel requires is taken from the environment that is used here, so that nothing large is installed again; that the wheel names
# all of it is checked. WHEEL=FOLDER keeps the wheel there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
root="$PWD"
"$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "setuptools>=77"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT

mkdir "$place/source" "$place/elsewhere"
cp -r longlive configs pyproject.toml setup.py README.md LICENSE "$place/source" # leftovers of earlier builds stay here
"$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$place/wheels" "$place/source"
wheel="$(ls "$place"/wheels/*.whl)"
if [[ -n "${WHEEL:-}" ]]; then
    mkdir -p "$WHEEL"
    cp "$wheel" "$WHEEL"
fi

packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$PYTHON" -m venv --without-pip "$place/empty"
python="$place/empty/bin/python"
"$PYTHON" -m pip --python "$python" install --quiet --disable-pip-version-check --no-deps "$wheel"
packages "$PYTHON" > "$(packages "$python")/reused.pth" # after the wheel's own folder, and without what is installed there as editable

cd "$place/elsewhere"
unset PYTHONPATH
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$python" "$root/scripts/check_requirements.py"
"$python" - <<'PYTHON' # in one process, since each would load torch
import contextlib, io
from longlive.__main__ import COMMANDS, main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert said.getvalue().startswith(f"usage: longlive {command}"), command
PYTHON
"$place/empty/bin/longlive" generate --prompt "a red circle moving right on a white background" --seconds 1
ls outputs/a-red-circle-moving-right-on-a-white-background-seed0-*.mp4
echo "the wheel works: $(basename "$wheel")"
