#!/usr/bin/env bash
# Builds the documentation (guides, and a reference from the docstrings) into site/; a broken link is an error. Open site/index.html.
# --serve shows it at http://127.0.0.1:8001 and builds again when a file changes.
#
# The tools live in an environment of their own (.venv-docs, or $LONGLIVE_DOCS), made from requirements/docs.txt when that changes;
# the package itself need not be installed. Once it is there, building needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${LONGLIVE_DOCS:-.venv-docs}"
stamp="$venv/.longlive-installed"
wanted="$(cksum < requirements/docs.txt)"
if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    base="${LONGLIVE_PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: the documentation needs Python 3.10 or newer; name one: LONGLIVE_PYTHON=/path/to/python3.11 bash $0" >&2
        exit 1
    }
    if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" ]]; then
        echo "error: $venv exists and is no virtual environment; choose another folder for LONGLIVE_DOCS" >&2
        exit 1
    fi
    echo "setup: making $venv (once)" >&2
    "$base" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements/docs.txt
    echo "$wanted" > "$stamp"
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH" NO_MKDOCS_2_WARNING=1  # ruff lays out the signatures
if [[ "${1:-}" == "--serve" ]]; then
    exec "$venv/bin/python" -m mkdocs serve --dev-addr 127.0.0.1:8001
fi
"$venv/bin/python" -m mkdocs build --strict --quiet "$@"
if grep -rlE '<(script|link|img|iframe)[^>]* (src|href)="(https?:)?//' site --include=*.html; then
    echo "error: the pages above load something from another host; the site must work offline" >&2
    exit 1
fi
echo "site/index.html"
