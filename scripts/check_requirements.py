"""Does the installed package name everything that it imports? Run in the environment in which it is installed; scripts/wheel.sh does."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import longlive

ELSEWHERE = {"flash_attn_interface", "sageattention"}  # built from source by those who want them
OTHER_ENVIRONMENT = "vbench_worker.py"


def imported(folder: Path) -> dict[str, Path]:
    """Top-level modules that the files of a package import, each with one file that does."""
    names: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*.py") if path.name != OTHER_ENVIRONMENT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names[node.module.split(".")[0]] = path
    return names


def undeclared(folder: Path, required: set[str], owners: dict[str, list[str]]) -> dict[str, Path]:
    """Imports that are neither of Python itself nor of a required distribution; `owners`: distributions by the modules they install."""
    known = {*sys.stdlib_module_names, "longlive"} | ELSEWHERE
    normal = {name.lower().replace("_", "-") for name in required}
    return {
        name: path
        for name, path in imported(folder).items()
        if name not in known and not normal & {owner.lower().replace("_", "-") for owner in (*owners.get(name, ()), name)}
    }


def main() -> int:
    folder = Path(longlive.__file__).parent
    required = {re.split(r"[^A-Za-z0-9._-]", text)[0] for text in metadata.requires("longlive") or ()}
    installed = {str(name): list(names) for name, names in metadata.packages_distributions().items()}
    wrong = undeclared(folder, required, installed)
    for name, path in wrong.items():
        print(f"error: {path} imports {name}, which pyproject.toml does not require", file=sys.stderr)
    print(f"{folder}: {len(required)} requirements")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
