"""Settings from a YAML file and the command line into a dataclass of `longlive.config`. Knows nothing about what they mean."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")


def load(
    schema: type[Schema],
    path: str | Path | None = None,
    dotlist: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Schema:
    """The settings of `schema` (a dataclass): its defaults, overridden by a YAML file, `key=value` words and `flags` (taken literally).

    Raises ValueError, with one line that names the setting, for an unknown key, a wrong type or a missing value.
    """
    where = str(path)
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        layers.append((where, _resolve_paths(schema, _read_yaml(Path(path)), Path(path).parent)))
    for word in dotlist:
        key, equals, _ = word.partition("=")
        if not key or not equals:
            raise ValueError(f"{word!r} is not a setting; write key=value (and quote what contains spaces)")
        try:
            layers.append(("the command line", OmegaConf.to_container(OmegaConf.from_dotlist([word]))))  # type: ignore[arg-type]
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r} cannot be read as key=value: {_one_line(error)}") from error
    escaped = {key: value.replace("${", r"\${") if isinstance(value, str) else value for key, value in (flags or {}).items()}
    layers.append(("the command line", escaped))

    for source, layer in layers:
        for key in _keys(layer, schema):
            _check_key(key, schema, source)
    defaults = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(defaults, *(layer for _, layer in layers))
    except (OmegaConfBaseException, TypeError):  # TypeError: an element of a list that has a whole value
        _merge_one_by_one(defaults, layers)
        raise
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"setting {error.full_key}: {_one_line(error)}") from error


class Setting(NamedTuple):
    """A setting as its class declares it: dotted name, type, default, and the comment beside it."""

    name: str
    kind: str
    default: str
    text: str


def settings_of(schema: type) -> list[Setting]:
    """The settings of a dataclass of `longlive.config`, those of its sections after them; texts are the comments of its source."""
    lines = inspect.getsource(schema).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    found, sections = [], []
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name, kind = node.target.id, _nested(schema).get(node.target.id)
        if dataclasses.is_dataclass(kind):
            sections += [setting._replace(name=f"{name}.{setting.name}") for setting in settings_of(kind)]  # type: ignore[arg-type]
            continue
        (field,) = [field for field in dataclasses.fields(schema) if field.name == name]
        default = "" if field.default is None else str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        text = lines[(node.end_lineno or 1) - 1].partition("  # ")[2]
        found.append(Setting(name, ast.unparse(node.annotation), default, text))
    return found + sections


def described(schema: type, *, width: int = 100) -> str:
    """All settings of a dataclass for the end of a program's --help."""
    paragraphs = []
    for setting in settings_of(schema):
        about = "; ".join(filter(None, (setting.text, f"default {setting.default}" if setting.default else "", setting.kind)))
        paragraphs.append(textwrap.fill(about, width, initial_indent="    ", subsequent_indent="    "))
        paragraphs[-1] = f"  {setting.name}\n{paragraphs[-1]}"
    return "\n".join(["settings (key=value):", *paragraphs])


def _merge_one_by_one(merged: Any, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises ValueError for the first setting that cannot be merged. Slow: every merge copies all settings."""
    for source, layer in layers:
        for key, value in layer.items():
            try:
                merged = OmegaConf.merge(merged, {key: value})
            except TypeError as error:
                raise ValueError(f"{source}: setting {key}: {value} has the wrong type") from error
            except OmegaConfBaseException as error:
                problem = _one_line(error) if error.full_key else f"{value} has the wrong type"
                raise ValueError(f"{source}: setting {error.full_key or key}: {problem}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        others = difflib.get_close_matches(path.name, sorted(item.name for item in path.parent.glob("*.yaml")), 3, 0.3)
        raise ValueError(f"no configuration at {path}" + (f"; in {path.parent} there is {', '.join(others)}" if others else ""))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a YAML file of settings: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a YAML file of settings: it holds a list")
    return content  # type: ignore[return-value]


def _resolve_paths(schema: Any, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a YAML file in `folder`, with the paths marked `RELATIVE_TO_FILE` resolved."""
    files = {field.name for field in dataclasses.fields(schema) if field.metadata.get("relative_to_file")}
    resolved = {}
    for key, value in content.items():
        kind = _nested(schema).get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            value = _resolve_paths(kind, value, folder)
        resolved[key] = str(folder / value) if key in files and isinstance(value, str) else value
    return resolved


@lru_cache
def _nested(schema: Any) -> dict[str, Any]:
    """The type of each setting of a schema; a section's type is a schema itself."""
    defaults = OmegaConf.structured(schema)
    return {key: OmegaConf.get_type(defaults, key) for key in defaults}


def _keys(layer: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings in a layer, dotted for those of sections."""
    for key, value in layer.items():
        kind = _nested(schema).get(key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
            yield from _keys(value, kind, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _valid(schema: Any, prefix: str = "") -> list[str]:
    names = []
    for key, kind in _nested(schema).items():
        names += [f"{prefix}{key}", *(_valid(kind, f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else ())]
    return names


def _check_key(key: str, schema: Any, source: str) -> None:
    valid = _valid(schema)
    if key in valid:
        return
    nearest = difflib.get_close_matches(key, valid, 1, 0.0)
    raise ValueError(f"{source}: there is no setting {key!r}; did you mean {nearest[0]!r}?")


def _one_line(error: Exception) -> str:
    """The message of an error without the context lines that OmegaConf and YAML add."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]
