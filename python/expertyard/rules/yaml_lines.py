# SPDX-License-Identifier: Apache-2.0
"""YAML with line numbers: mappings and lists remember the line of every key. No tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from expertyard.errors import RuleError

MAX_BYTES = 16 << 20
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Mapping(dict[Any, Any]):
    """A dict with `line` of its start and `lines` of its keys, both counted from 1."""

    line: int
    lines: dict[Any, int]


class Items(list[Any]):
    """A list with `line` of its start and `lines` of its items."""

    line: int
    lines: list[int]


def read_text(source: str | Path) -> tuple[str, str]:
    """(text, name for messages) of a file's path, or of YAML given as text (has a line break or ':
    ').
    """
    if isinstance(source, str) and (
        "\n" in source or ": " in source or source.lstrip()[:1] in "[{-"
    ):
        return source, "<text>"
    path = Path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RuleError(f"{path}: expected rules of some kilobytes, got a huge file.")
        return path.read_text(encoding="utf-8-sig"), str(path)
    except FileNotFoundError:
        raise RuleError(f"{path}: no such file.") from None
    except OSError as error:
        raise RuleError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError:
        raise RuleError(f"{path}: not a UTF-8 text file.") from None


def load(text: str, name: str) -> Any:
    """The YAML document as dicts, lists and scalars. Raises RuleError with file and line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _build(loader, node, name, {})
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RuleError(f"{name}:{line}: not YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise RuleError(f"{name}: not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise RuleError(f"{name}: not YAML: nested too deeply.") from None
    except ValueError as error:
        raise RuleError(f"{name}: not YAML: {error}.") from None


def _build(loader: Any, node: Any, name: str, done: dict[int, Any]) -> Any:
    if id(node) in done:
        value = done[id(node)]
        if value is _BUILDING:
            raise RuleError(f"{name}:{node.start_mark.line + 1}: an anchor that contains itself.")
        return value
    done[id(node)] = _BUILDING
    line = node.start_mark.line + 1
    result: Any
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # merge keys (<<)
        result = Mapping()
        result.line, result.lines = line, {}
        for key_node, value_node in node.value:
            key = _build(loader, key_node, name, done)
            at = key_node.start_mark.line + 1
            if isinstance(key, Mapping | Items):
                raise RuleError(f"{name}:{at}: a key must be a word or a number.")
            if key in result and result.lines[key] != at:
                raise RuleError(
                    f"{name}:{at}: key {key!r} is given twice; first in line {result.lines[key]}."
                )
            result[key] = _build(loader, value_node, name, done)
            result.lines[key] = at
    elif isinstance(node, yaml.SequenceNode):
        result = Items()
        result.line, result.lines = line, []
        for item in node.value:
            result.append(_build(loader, item, name, done))
            result.lines.append(item.start_mark.line + 1)
    else:
        result = loader.construct_object(node)
    done[id(node)] = result
    return result


_BUILDING = object()
