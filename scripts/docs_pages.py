"""Hooks of MkDocs (mkdocs.yml): pages of the site that are not files of docs/.

The README is the home page; CONTRIBUTING, CHANGELOG and the benchmarks' results are pages too; and every package gets a
reference page that shows the docstrings of its modules. Links are rewritten from the repository's layout to the site's.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def reference() -> dict[str, str]:
    """Page of the site -> its Markdown: an overview, one page per package, and one for the modules beside the packages."""
    package = ROOT / "longlive"
    pages = {"reference/longlive.md": reference_page("longlive", [path for path in package.glob("*.py") if path.stem != "__init__"])}
    rows = ["| [longlive](longlive.md) | settings, types, files and video: what every package may use |"]
    for init in sorted(package.rglob("__init__.py"))[1:]:
        name = ".".join(init.parent.relative_to(ROOT).parts)
        file = f"{name.removeprefix('longlive.')}.md"
        pages[f"reference/{file}"] = reference_page(name, [path for path in init.parent.glob("*.py") if path.stem[0] != "_"])
        rows.append(f"| [{name}]({file}) | {about(name)} |")
    overview = "\n".join(["# Reference", "", "Built from the docstrings.", "", "| package | what it holds |", "| --- | --- |", *rows])
    return {"reference/index.md": overview + "\n", **pages}


def about(package: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))) or ""


def reference_page(package: str, modules: list[Path]) -> str:
    shown = [f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in sorted(modules)]
    return "\n\n".join([f"# {package}", about(package), *shown]) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = list(reference())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for target, content in reference().items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    here = next((source for source, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")

    def rewritten(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        known = PAGES.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(known) is None and (ROOT / inside).exists():
            return f"{text} (`{inside}`)"  # a file of the repository that is no page, as LICENSE
        return f"{image}[{text}]({posixpath.relpath(known, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)
