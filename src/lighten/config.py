"""YAML settings, read strictly: every key is known, none stands twice, and an error names the line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lighten.errors import BadConfig

LIMIT = 1_000_000


class _Strict(yaml.SafeLoader):
    """Safe YAML without aliases (they can blow up) and without a key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise BadConfig(f"line {mark.line + 1}: aliases (*name) are not allowed.")
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as e:  # such as the date 2001-99-99
            raise BadConfig(f"line {node.start_mark.line + 1}: {node.value!r} cannot be read ({e}).") from e

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            line = key.start_mark.line + 1
            if isinstance(name, list | dict | set):
                raise BadConfig(f"line {line}: a key must be a plain word.")
            if name in seen:
                raise BadConfig(f"line {line}: key {name!r} stands twice (first in line {seen[name]}).")
            seen[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadConfig naming file, line and key; near names are suggested."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadConfig(f"{path} cannot be read ({e}).", "lighten init writes a commented example.") from e
    if len(text) > LIMIT:
        raise BadConfig(f"{path} is larger than 1 MB.", "That is no settings file.")
    try:
        values = yaml.load(text, _Strict)  # noqa: S506 - a SafeLoader subclass
        node: Any = yaml.compose(text, yaml.SafeLoader)
    except BadConfig as e:
        raise BadConfig(f"{path}, {e.what}", e.to_do) from None
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise BadConfig(f"{where}: {getattr(e, 'problem', None) or e}.") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadConfig(f"{path} holds a {type(values).__name__}, not `key: value` lines.")
    check_keys(values, known, str(path), {k.value: k.start_mark.line + 1 for k, _ in node.value})
    return values


def check_keys(values: dict[str, Any], known: Iterable[str], where: str, lines: dict[Any, int] | None = None) -> None:
    """Raises BadConfig for the first unknown key, with its line where that is known."""
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            line = f", line {lines[str(key)]}" if lines and str(key) in lines else ""
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}"
            raise BadConfig(f"{where}{line}: unknown key {key!r}.", hint)
