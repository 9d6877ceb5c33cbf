"""Imports point down the floors of the tree only; siblings on a floor do not import each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    {"types", "config", "settings", "files"},
    {"ops", "parallel", "video", "provenance"},
    {"models", "cache", "checkpoints"},
    {"engine"},
    {"generation", "miniature"},
    {"programs"},
    {"training", "serving", "evaluation", "doctor", "convert"},
    {"live"},
    {"__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in (ROOT / "longlive").rglob("*.py") if path != ROOT / "longlive" / "__init__.py")


def imported(source: str) -> set[str]:
    """Parts of the package that a module imports anywhere, also inside functions: "ops", "models" …"""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("longlive.")}


def climbs(part: str, source: str) -> list[str]:
    """What a module of `part` imports although it may not: its own floor or above, itself excepted."""
    return sorted(name for name in imported(source) - {part} if FLOOR.get(name, 99) >= FLOOR[part])


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "longlive").parts[0].removesuffix(".py")


def test_imports_point_down():
    assert not [f"{path} stands on no floor" for path in FILES if part_of(path) not in FLOOR]
    climbing = {path: climbs(part_of(path), path.read_text(encoding="utf-8")) for path in FILES}
    assert not [f"{path.relative_to(ROOT)} imports {', '.join(above)}" for path, above in climbing.items() if above]


def test_the_test_notices():
    assert climbs("models", "from longlive.cache.ring import RingCache") == ["cache"]
    assert climbs("ops", "def f():\n    import longlive.generation.pipeline") == ["generation"]
    assert climbs("cache", "from longlive import generation") == ["generation"]
    assert climbs("generation", "from longlive.generation.cues import Cue\nfrom longlive import video\nimport torch") == []
    assert climbs("training", "from longlive.stranger import x") == ["stranger"]


def test_no_drawer_for_everything():
    assert not {"utils", "common", "misc", "helpers", "base", "manager"} & {
        part for path in FILES for part in (*path.relative_to(ROOT).parts, path.stem)
    }


def test_functions_and_files_are_short():
    """A longer file says so in its docstring."""
    folders = ("longlive", "experiments", "scripts", "benchmarks")
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for name in folders for path in (ROOT / name).rglob("*.py")}
    assert trees
    for path, tree in trees.items():
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length <= 350 or "long file" in (ast.get_docstring(tree) or "").lower(), f"{path}: {length} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name} has more than 60 lines"
