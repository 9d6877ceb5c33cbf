"""What the documentation names exists: files and headings of links, commands with their options and settings, exported names."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import longlive
from longlive.__main__ import COMMANDS
from longlive.config import InferenceConfig, TrainConfig
from longlive.evaluation import __main__ as evaluation
from longlive.programs import inference
from longlive.serving import __main__ as serving
from longlive.settings import load

ROOT = Path(__file__).parents[2]
NOT_OURS = {"site", "runs", "outputs", "evaluation", "build", "wan_models", "longlive_models", "node_modules"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not any(p in NOT_OURS or p[0] == "." for p in path.relative_to(ROOT).parts[:-1]))
PAGES = [*PAGES, *sorted((ROOT / ".github").rglob("*.md"))]
PACKAGES = [".".join(path.parent.relative_to(ROOT).parts) for path in sorted((ROOT / "longlive").rglob("__init__.py"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OTHER_PROGRAMS = {"hf", "git", "pip", "pre-commit"}  # not ours to check
INSTALLED_AS = {
    "generate": "inference.py",
    "live": "interactive_inference.py",
    "serve": "longlive.serving",
    "train": "train.py",
    "evaluate": "longlive.evaluation",
}
OPTIONS_IN_THE_SCRIPT = {"setup", "test", "lint", "docs", "mutation", "wheel"}  # shell scripts that read their own options


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    shown = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


def dead_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def test_links():
    assert {str(page.relative_to(ROOT)): dead for page in PAGES if (dead := dead_links(page))} == {}


def test_dead_links_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two` (three)\n[a](#one-two-three) [b](#four) [c](page.md) [d](gone.md) [e](page.md#four)\n```\n[f](gone)\n```\n"
    )
    assert dead_links(page) == ["#four", "gone.md", "page.md#four"]


def test_lines_are_wrapped():
    """At 120 columns; tables and code are not."""
    lines = [(str(page.relative_to(ROOT)), line) for page in PAGES for line in prose(page).splitlines()]
    assert [(page, line) for page, line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []


def test_packages_say_what_they_are_and_export_what_exists():
    modules = [importlib.import_module(name) for name in PACKAGES]
    assert [module.__name__ for module in modules if not module.__doc__] == [], "the site shows a package's docstring"
    exported = [(module, name) for module in modules for name in module.__dict__.get("__all__", ())]
    assert exported and [(module, name) for module, name in exported if getattr(module, name) is None] == []


def test_every_package_is_on_both_maps():
    readme, contributing = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    top = [name.split(".")[1] for name in PACKAGES if name.count(".") == 1]
    assert [
        name for name in top if f"`longlive/{name}`" not in readme or not re.search(rf"^[ \d] +{name}/ ", contributing, re.MULTILINE)
    ] == []


def test_exports_are_the_documented_ones():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    imported = re.findall(r"^from longlive import (.+)$", readme, re.MULTILINE)
    assert imported and {name.strip() for line in imported for name in line.split(",")} <= set(longlive.__all__)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [text for language, text in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")) if language == "python"]
    names: dict = {}
    exec(blocks[0], names)
    assert names["frames"].shape == (1, 165, 64, 64, 3) and (tmp_path / "timeline.json").is_file()
    with pytest.raises(FileNotFoundError, match="hf download"):  # the second needs the released files
        exec(blocks[1], names)


class Parsed(Exception):
    """The command line was read to its end; what follows would run the program."""


def parse_program(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments that a program reads from its command line; it goes no further. A program is a file or a module's name."""

    def stop(parse):
        def stopped(parser, argv=None, namespace=None):
            raise Parsed(parse(parser, argv, namespace))

        return stopped

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [program, *words])
        if program.endswith(".py"):
            patch.syspath_prepend(str((ROOT / program).parent))
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            patch.delitem(sys.modules, program, raising=False)  # imported by another test: it is run anew
            runpy.run_module(program, run_name="__main__")
    return parsed.value.args[0]


def check_training(words: list[str], monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    named = any(word.partition("=")[0] == "--config" for word in words)
    arguments = parse_program("train.py", words if named else ["--config", config, *words], monkeypatch)
    ours = arguments.config.startswith("configs/")  # else one of the reader's own
    load(TrainConfig, ROOT / arguments.config if ours else None, arguments.settings)


def check_program(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises for options and settings that the program does not have, and for files of the repository that are not there."""
    monkeypatch.chdir(ROOT)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), f"{word} is not there"
    if "--help" in words:
        words = []
        assert (ROOT / program).is_file() or importlib.import_module(program)
    if program in ("inference.py", "interactive_inference.py"):
        default = ROOT / "configs" / "miniature" / program.replace(".py", ".yaml")
        inference.parse(words, description="", default_config=default)
    elif program == "longlive.serving":
        serving.parse(words)
    elif program == "longlive.evaluation":
        if words:
            load(InferenceConfig, None, vars(evaluation.parse(words)).get("settings", []))
    elif program == "train.py":
        check_training(words, monkeypatch, "configs/train_init.yaml")
    else:
        parse_program(program, words, monkeypatch)


def check_script(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a script of scripts/, which gives its arguments to a program."""
    script = ROOT / "scripts" / f"{name}.sh"
    assert script.is_file(), f"there is no {script}"
    if name in OPTIONS_IN_THE_SCRIPT:
        text = script.read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("-") and f"{word})" not in text and f'"{word}"' not in text] == []
    elif name == "vbench":
        suite = words[0] in evaluation.SUITES
        check_program("longlive.evaluation", ["prepare", words[0], "--output", *words[1:]] if suite else words, monkeypatch)
    elif name == "experiments":
        for each in [word for word in words if word[0] != "-"] or ["all"]:
            check_program(f"experiments.{each}", [word for word in words if word[0] == "-"], monkeypatch)
    elif name in ("train_init", "train_long"):
        check_training(words, monkeypatch, f"configs/{name}.yaml")
    elif name == "miniature_recipe":
        check_training(words, monkeypatch, "configs/miniature/language.yaml")
    else:
        check_program({"serve": "longlive.serving"}.get(name, f"{name}.py"), words, monkeypatch)


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
        words = words[1:]
    if not words or words[0] in OTHER_PROGRAMS:
        return
    if words[0] == "bash":
        where, name = words[1].split("/")
        assert where == "scripts", f"{words[1]} is not one of scripts/"
        check_script(name.removesuffix(".sh"), words[2:], monkeypatch)
    elif words[0] == "longlive":
        if words[1] in INSTALLED_AS:
            check_program(INSTALLED_AS[words[1]], words[2:], monkeypatch)
        else:
            assert words[1] in COMMANDS, f"longlive has no command {words[1]}"
            parse_program("longlive", [word for word in words[1:] if word != "--help"], monkeypatch)
    elif words[0].removesuffix("3") == "python" and words[1] == "-m":
        check_program(words[2], words[3:], monkeypatch)
    elif words[0].removesuffix("3") == "python":
        check_program(words[1], words[2:], monkeypatch)
    elif words[0] == "torchrun":
        at = next(number for number, word in enumerate(words) if word.endswith(".py"))
        check_program(words[at], words[at + 1 :], monkeypatch)
    else:
        raise ValueError(f"{words[0]} is no program that this test knows")


def commands(page: Path) -> list[str]:
    blocks = [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


MISTAKES = (AssertionError, ImportError, ValueError, SystemExit, pytest.fail.Exception)


def test_commands_of_the_documentation(monkeypatch):
    wrong = []
    for page in PAGES:
        for line in commands(page):
            try:
                check_command(line, monkeypatch)
            except MISTAKES as mistake:
                wrong.append((str(page.relative_to(ROOT)), line, str(mistake)))
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "bash scripts/no_such_script.sh",
        "bash scripts/inference.sh --sede 3",
        "bash scripts/inference.sh --config configs/no_such.yaml",
        "python inference.py secnds=3",
        "bash scripts/train_long.sh long.btach=1",
        "bash scripts/vbench.sh compare a",
        "bash scripts/vbench.sh vbench a secnds=3",
        "bash scripts/test.sh --most",
        "python -m experiments.recipe --no-such-option",
        "python -m longlive.miniature.no_such_module",
        "longlive convert --form a",
        "longlive generate secnds=3",
        "longlive sing",
        "curl example.com",
    ],
)
def test_commands_that_do_not_exist_are_noticed(line, monkeypatch):
    with pytest.raises(MISTAKES):
        check_command(line, monkeypatch)
