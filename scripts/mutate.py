"""Mutation testing of the core: `python scripts/mutate.py [files…]`. A change of the code that no test notices is printed as a diff.

Every operator, comparison, constant, condition, statement, argument and slice bound of a file is changed, one at a time, and the tests
listed for the file run until one fails: first those that execute the changed line, then the others, quick ones first. Nothing is
written: the changed source takes the file's place when a forked interpreter, in which torch is already loaded, imports it.

A long file, because it imports nothing of the package that it changes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import importlib.machinery
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "longlive/ops/attention.py": "unit/test_attention.py",
    "longlive/ops/flow_matching.py": "unit/test_flow_matching.py",
    "longlive/ops/rope.py": "unit/test_ops.py",
    "longlive/cache/memory.py": "unit/test_cache.py unit/test_rollout.py",
    "longlive/cache/window.py": "unit/test_cache.py unit/test_rollout.py",
    "longlive/cache/ring.py": "unit/test_cache.py unit/test_rollout.py",
    "longlive/cache/history.py": "unit/test_cache.py unit/test_clips.py unit/test_rollout.py",
    "longlive/models/wan.py": "unit/test_wan.py parity/test_transformer_diffusers.py unit/test_rollout.py",
    "longlive/generation/rollout.py": "unit/test_rollout.py unit/test_cache.py unit/test_clips.py",
    "longlive/generation/solver.py": "unit/test_rollout.py",
    "longlive/generation/transition.py": "unit/test_rollout.py",
    "longlive/training/clips.py": "unit/test_clips.py",
    "longlive/training/dmd.py": "unit/test_dmd.py",
}  # the tests of a file, relative to tests/
EQUIVALENT = {
    (
        "starts = torch.tensor(slots, dtype=torch.long).to(device, non_blocking=True) * tokens",
        f"starts = torch.tensor(slots, dtype=torch.long).to(device, {argument}) * tokens",
    ): "only how long the host waits for a GPU"
    for argument in ("", "non_blocking=False")
} | {
    (
        "n = torch.randint(NUM_TIMESTEPS, (clip.shape[0], 1), generator=generator).float()",
        "n = torch.randint(NUM_TIMESTEPS, (clip.shape[0], 1), generator=generator)",
    ): "the division that follows gives float32; the annotation of `timesteps` wants it before",
    (
        "self._length, self._switches = 0, list[int]()  # of the current video",
        "pass  # of the current video",
    ): "both are set when a video begins or is loaded, before they are read",
}  # (line, changed line): why no test could notice

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
REMOVED_METHODS = {"abs", "clamp", "clone", "contiguous", "detach", "double", "flatten", "float", "sqrt", "square", "to"}
QUIETLY = [
    "-q",
    "-x",
    "--no-header",
    "--tb=line",
    "-knot one_graph",  # torch.compile gives other graphs when Python code is traced
    *(f"-pno:{name}" for name in ("cacheprovider", "xdist", "unraisableexception", "threadexception")),
]
ADDED_SECONDS = 60  # a mutant may take this much longer than ten times its tests


class Mutant(NamedTuple):
    """A piece of a file (offsets in bytes) and what takes its place."""

    line: int
    start: int
    stop: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]


Node = ast.expr | ast.stmt | ast.keyword
"""A node that stands at a place in the source."""


class Mutator(ast.NodeVisitor):
    """Collects the mutants of a module. Not changed: annotations, strings, messages of exceptions and logs, assertions, protocols."""

    def __init__(self, source: bytes) -> None:
        self.source, self.mutants = source, []
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.visit(ast.parse(source))

    def span(self, node: Node) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None  # of parsed code they never are
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: Node) -> str:
        start, stop = self.span(node)
        return self.source[start:stop].decode()

    def add(self, node: Node, text: str, span: tuple[int, int] | None = None) -> None:
        mutant = Mutant(node.lineno, *(span or self.span(node)), text)
        with contextlib.suppress(SyntaxError):  # for example an argument that must not be dropped
            ast.parse(mutant.apply(self.source))
            self.mutants.append(mutant)

    def between(self, left: Node, right: Node, operator: ast.AST) -> None:
        """Exchange the operator that stands between two nodes."""
        if type(operator) in OPERATORS:
            old, new = OPERATORS[type(operator)]
            start, stop = self.span(left)[1], self.span(right)[0]
            found = re.search(re.escape(old).replace(r"\ ", r"\s+"), self.source[start:stop].decode())
            assert found is not None
            self.add(left, new, (start + found.start(), start + found.end()))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.between(node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, node.op)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            self.between(left, right, operator)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.add(node, self.text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, str(2 * node.value or 1.0))

    def negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp) and not (isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in (
            ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)):  # fmt: skip
            self.add(test, f"(not ({self.text(test)}))")

    def visit_If(self, node: ast.If | ast.IfExp | ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    visit_IfExp = visit_While = visit_If

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self.add(bound, "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self.text(node.func).startswith(("log.", "logging.")):
            return
        own = node.args[:]
        if isinstance(node.func, ast.Attribute) and node.func.attr in REMOVED_METHODS:
            self.add(node, self.text(node.func.value))
        if (
            len(own) > 1
            and not self.text(node.func).endswith((".transpose", "min", "max"))
            and not any(isinstance(one, ast.Starred) for one in own[:2])
            and self.text(own[0]) != self.text(own[1])
        ):
            first, second = self.span(own[0]), self.span(own[1])
            middle = self.source[first[1] : second[0]].decode()
            self.add(node, self.text(own[1]) + middle + self.text(own[0]), (first[0], second[1]))
        for argument in [*own[-1:], *(keyword for keyword in node.keywords if keyword.arg)]:
            start, stop = self.span(argument)
            comma = re.match(rb"\s*,\s*", self.source[stop:])
            stop += len(comma[0]) if comma else 0
            if not isinstance(argument, ast.GeneratorExp):
                self.add(argument, "", (start, stop))
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is None:
                self.add(item.context_expr, "__import__('contextlib').nullcontext()")
        self.generic_visit(node)

    def drop(self, node: ast.stmt) -> None:
        self.add(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not self.text(node.value).startswith("log."):
            self.drop(node)
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            self.drop(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.drop(node)
        self.between(node.target, node.value, node.op)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            if self.text(decorator).startswith("torch."):
                start, stop = self.span(decorator)
                self.add(decorator, "", (start - 1, stop))
        for part in (node.args, *node.body):
            self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not any(self.text(base) == "Protocol" for base in node.bases):
            for statement in node.body:
                self.visit(statement)

    visit_Raise = visit_Break = visit_Continue = drop

    def ignore(self, node: ast.AST) -> None:
        pass

    visit_Assert = visit_JoinedStr = ignore


class Traced:
    """A pytest plugin that writes down which lines of a file each test executes, and how long it takes."""

    def __init__(self, file: str) -> None:
        self.file, self.tests = file, {}

    @staticmethod
    def caches() -> list:
        """What `lru_cache` made of functions of the package."""
        modules = [module for name, module in sys.modules.items() if name.startswith("longlive")]
        return [thing for module in modules for thing in vars(module).values() if isinstance(thing, type(lru_cache(int)))]

    def pytest_runtest_protocol(self, item, nextitem):
        lines, started = set(), time.process_time()
        for cached in self.caches():  # or only the first test would be seen to execute it
            cached.cache_clear()

        def local(frame, event, argument):
            lines.add(frame.f_lineno)
            return local

        def enter(frame, event, argument):
            return local(frame, event, argument) if frame.f_code.co_filename == self.file else None

        from _pytest.runner import runtestprotocol

        threading.settrace(enter)
        sys.settrace(enter)
        try:
            runtestprotocol(item, nextitem=nextitem)
        finally:
            sys.settrace(None)
            threading.settrace(None)
        self.tests[item.nodeid] = (time.process_time() - started, sorted(lines))
        return True


def run_pytest(arguments: list[str], plugins: list, output: IO[str]) -> int:
    import pytest

    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return int(pytest.main([*QUIETLY, *arguments], plugins))


def preload(tests: list[str]) -> None:
    """Load what the tests import, and forget what of it is ours, so that a child loads that alone."""
    run_pytest(["--collect-only", *tests], [], io.StringIO())
    ours = [str(ROOT / folder) for folder in ("longlive", "tests", "experiments", "benchmarks", "scripts")]
    for name, module in list(sys.modules.items()):
        if name != "__main__" and (getattr(module, "__file__", None) or "").startswith(tuple(ours)):
            del sys.modules[name]
    gc.freeze()  # or every child would look through all of it for garbage


def replace_source(file: Path, source: bytes) -> None:
    """Whatever imports `file` from now on gets `source`."""
    stats, data = importlib.machinery.SourceFileLoader.path_stats, importlib.machinery.SourceFileLoader.get_data

    def path_stats(self, path):
        if Path(path) == file:
            raise OSError("its bytecode is not that of this source")
        return stats(self, path)

    importlib.machinery.SourceFileLoader.path_stats = path_stats
    importlib.machinery.SourceFileLoader.get_data = lambda self, path: source if Path(path) == file else data(self, path)


def in_children(actions: list[Callable[[], int]], jobs: int, timeout: float) -> list[int | None]:
    """The exit status of each action in a forked process of its own, `jobs` at a time; None when it did not end in time."""
    results: list[int | None] = [None] * len(actions)
    waiting, running = list(enumerate(actions))[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, action = waiting.pop()
            process = os.fork()
            if process == 0:
                status = 99
                try:
                    os.setsid()
                    status = action()
                finally:
                    os._exit(status)
            running[process] = number, time.monotonic() + timeout
        time.sleep(0.02)
        for process, (number, end) in list(running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                results[number] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
            else:
                continue
            del running[process]
    return results


def trace(file: Path, tests: list[str]) -> dict[str, tuple[float, list[int]]]:
    """Seconds and lines of every test that executes `file`. Raises RuntimeError when a test fails without any change."""
    with tempfile.NamedTemporaryFile("w+") as result, tempfile.NamedTemporaryFile("w+") as said:

        def action() -> int:
            traced = Traced(str(file))
            status = run_pytest(tests, [traced], said)
            json.dump(traced.tests, result)
            result.flush()
            said.flush()
            return status

        if in_children([action], 1, 3600) != [0]:
            said.seek(0)
            raise RuntimeError(f"the tests of {file} fail as they are:\n{said.read()}")
        result.seek(0)
        return {name: (seconds, lines) for name, (seconds, lines) in json.load(result).items() if lines}


def run_mutant(file: Path, source: bytes, mutant: Mutant, tests: list[str]) -> int:
    """0 when every test passes although `file` is changed; for a child process."""
    replace_source(file, mutant.apply(source))
    with open(os.devnull, "w") as nothing:
        return run_pytest(tests, [], nothing)


def difference(source: bytes, mutant: Mutant) -> tuple[str, str]:
    """The lines that change, without indentation, before and after."""
    before, after = source.decode().splitlines(), mutant.apply(source).decode().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    removed, added = ("\n".join(line[2:].strip() for line in changed if line[0] == sign) for sign in "-+")
    return removed, added


def quickest(tests: dict[str, tuple[float, list[int]]], line: int, seconds: float) -> list[str]:
    """The tests that execute a line, quick ones first, as many as fit into `seconds`; a line of no test is executed at import."""
    concerned = [name for name in tests if line in tests[name][1]] or list(tests)
    concerned.sort(key=lambda name: tests[name][0])
    total = list(accumulate(tests[name][0] for name in concerned))
    return [name for name, until in zip(concerned, total) if until <= seconds] or concerned[:1]


def mutate(name: str, *, jobs: int, lines: range | None, every: int, seconds: float) -> tuple[int, int]:
    """How many mutants of a file are noticed, and how many were tried; prints the others."""
    file = ROOT / name
    source = file.read_bytes()
    tests = trace(file, [f"tests/{test}" for test in TESTS[name].split()])
    mutants = [m for m in Mutator(source).mutants if (lines is None or m.line in lines) and difference(source, m) not in EQUIVALENT]
    mutants = mutants[::every]
    actions = [partial(run_mutant, file, source, mutant, quickest(tests, mutant.line, seconds)) for mutant in mutants]
    statuses = in_children(actions, jobs, ADDED_SECONDS + 10 * seconds)
    survivors = [mutant for mutant, status in zip(mutants, statuses) if status == 0]
    for mutant in survivors:
        before, after = difference(source, mutant)
        print(f"{name}:{mutant.line}\n  - {before}\n  + {after}")
    print(f"{name}: {len(mutants) - len(survivors)} of {len(mutants)} mutants noticed", flush=True)
    return len(mutants) - len(survivors), len(mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE[:FIRST-LAST]", help="of the core, with lines if not all; none: the whole core")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    parser.add_argument("--every", type=int, default=1, help="try only every so many-th mutant, for an estimate")
    parser.add_argument("--seconds", type=float, default=20, help="of tests a mutant, quick ones first")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    preload(sorted({f"tests/{test}" for tests in TESTS.values() for test in tests.split()}))
    counts = []
    for name, _, lines in (file.partition(":") for file in options.files or TESTS):
        first, _, last = lines.partition("-")
        chosen = range(int(first), int(last or first) + 1) if lines else None
        counts.append(mutate(name, jobs=options.jobs, lines=chosen, every=options.every, seconds=options.seconds))
    noticed, total = (sum(numbers) for numbers in zip(*counts))
    print(f"{noticed} of {total} mutants noticed, {noticed / total:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
