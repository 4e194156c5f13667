# SPDX-License-Identifier: Apache-2.0
"""A KTransformers rule file, read and checked rule by rule; nothing is matched here.

Wrong structure is a RuleError. Names that nobody knows (keys, classes, operators) are findings:
the original ignores a mistyped keyword without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError, RuleError
from expertyard.formats import get_format
from expertyard.rules import yaml_lines
from expertyard.rules.devices import device_name, local_kind
from expertyard.rules.kt import names
from expertyard.rules.pins import Finding


@dataclass(frozen=True)
class Rule:
    """One rule. Classes and operators are last components; devices are ours ('' = not given)."""

    number: int
    file: str
    line: int
    pattern: re.Pattern[str] | None
    match_class: str
    replace_class: str
    recursive: bool
    device: str
    prefill_device: str
    out_device: str
    op: str
    prefill_op: str
    format: str
    transfer_map: tuple[tuple[int, str], ...]
    transfer_line: int

    @property
    def where(self) -> str:
        return (
            f"{Path(self.file).name}:{self.line}" if self.file != "<text>" else f"rules:{self.line}"
        )

    @property
    def is_experts(self) -> bool:
        return self.replace_class in names.EXPERTS_CLASSES

    @property
    def what(self) -> str:
        """The rule's condition, for messages."""
        parts = [f'"{self.pattern.pattern}"'] if self.pattern else []
        return " and ".join(parts + ([f"class {self.match_class}"] if self.match_class else []))


def read_rules(source: Any, known_classes: Iterable[str]) -> tuple[list[Rule], list[Finding]]:
    """Rules of a file, of YAML text, or of a list as YAML gives it."""
    if isinstance(source, list):
        # through text, so that a list from Python is checked by the same code and has lines
        import yaml

        text, name = yaml.safe_dump(source, sort_keys=False), "<text>"
    elif isinstance(source, str | Path):
        text, name = yaml_lines.read_text(source)
    else:
        raise RuleError(f"--rules: expected a file, YAML text or a list of rules, got {source!r}.")
    document = yaml_lines.load(text, name)
    if document is None:
        raise RuleError(f"{name}: no rules in it.")
    if not isinstance(document, yaml_lines.Items):
        raise RuleError(
            f"{name}:1: expected a list of rules (each begins with '- match:'), "
            f"got {_kind(document)}."
        )
    reader = _Reader(name, frozenset(known_classes))
    rules = [reader.rule(i + 1, item, document.lines[i]) for i, item in enumerate(document)]
    if not rules:
        raise RuleError(f"{name}: no rules in it.")
    return rules, reader.findings


def _kind(value: Any) -> str:
    if isinstance(value, yaml_lines.Mapping):
        return "a mapping"
    return "a list" if isinstance(value, yaml_lines.Items) else repr(value)


class _Reader:
    """Reads rules of one file and collects what is odd about them."""

    def __init__(self, file: str, match_classes: frozenset[str]) -> None:
        self.file = file
        self.match_classes = match_classes
        self.findings: list[Finding] = []

    def error(self, line: int, message: str) -> RuleError:
        return RuleError(f"{self.file}:{line}: {message}")

    def find(self, severity: str, code: str, line: int, message: str) -> None:
        self.findings.append(Finding(severity, code, message, self.file, line))

    def keys(self, value: yaml_lines.Mapping, known: tuple[str, ...], what: str) -> None:
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                self.find(
                    "error", "unknown-key", value.lines[key], f"{what}: unknown key {key!r}.{hint}"
                )

    def mapping(self, value: Any, line: int, what: str) -> yaml_lines.Mapping:
        if not isinstance(value, yaml_lines.Mapping):
            raise self.error(line, f"{what}: expected a mapping, got {_kind(value)}.")
        return value

    def rule(self, number: int, item: Any, line: int) -> Rule:
        what = f"rule {number}"
        rule = self.mapping(item, line, what)
        self.keys(rule, names.TOP_KEYS, what)
        pattern, match_class = self.match(rule, line, what)
        if "replace" not in rule:
            raise self.error(line, f"{what}: 'replace' is missing; it says what the match becomes.")
        at = rule.lines["replace"]
        replace = self.mapping(rule["replace"], at, f"{what}: replace")
        self.keys(replace, names.REPLACE_KEYS, f"{what}: replace")
        replace_class = self.replace_class(replace, at, what)
        kwargs = replace.get("kwargs")
        if kwargs is None:
            kwargs = yaml_lines.Mapping()
            kwargs.lines = {}
        kwargs = self.mapping(kwargs, replace.lines.get("kwargs", at), f"{what}: kwargs")
        self.keys(kwargs, names.KWARGS, f"{what}: kwargs")
        recursive = rule.get("recursive", True)
        if not isinstance(recursive, bool):
            raise self.error(
                rule.lines["recursive"],
                f"{what}: recursive: expected True or False, got {recursive!r}.",
            )
        named = str(kwargs.get("generate_op")).rsplit(".", 1)[-1]
        experts = replace_class in names.EXPERTS_CLASSES or named in names.EXPERTS_OPS
        device = self.device(kwargs, "generate_device", what)
        device = device or self.device(kwargs, "device", what)
        op = self.op(kwargs, "generate_op", what, experts)
        if experts and not device:
            device = "cuda:0" if op == "cuda" else "cpu"  # KTransformersExperts' own default
        if op in ("cpu", "cuda") and op != local_kind(device):
            text = f"{what}: {kwargs['generate_op']} does not run on {device}; its own is used."
            self.find("error", "op-device-mismatch", kwargs.lines["generate_op"], text)
            op = ""
        return Rule(
            number=number,
            file=self.file,
            line=line,
            pattern=pattern,
            match_class=match_class,
            replace_class=replace_class,
            recursive=recursive,
            device=device,
            prefill_device=self.device(kwargs, "prefill_device", what),
            out_device=self.device(kwargs, "out_device", what),
            op=op,
            prefill_op=self.op(kwargs, "prefill_op", what, experts),
            format=self.format(kwargs, what),
            transfer_map=self.transfer_map(kwargs, what),
            transfer_line=kwargs.lines.get("transfer_map", line),
        )

    def match(
        self, rule: yaml_lines.Mapping, line: int, what: str
    ) -> tuple[re.Pattern[str] | None, str]:
        if "match" not in rule:
            raise self.error(
                line, f"{what}: 'match' is missing; it says which modules the rule is for."
            )
        at = rule.lines["match"]
        match = self.mapping(rule["match"], at, f"{what}: match")
        self.keys(match, names.MATCH_KEYS, f"{what}: match")
        name, cls = match.get("name"), match.get("class")
        if name is None and cls is None:
            raise self.error(at, f"{what}: match: expected 'name', 'class' or both, got neither.")
        pattern = None
        if name is not None:
            at = match.lines["name"]
            if not isinstance(name, str):
                raise self.error(
                    at, f"{what}: match.name: expected a regular expression, got {name!r}."
                )
            try:
                pattern = re.compile(name)
            except (re.error, RecursionError, OverflowError) as error:
                raise self.error(
                    at, f"{what}: match.name: {name!r} is no regular expression: {error}."
                ) from None
        if cls is None:
            return pattern, ""
        at = match.lines["class"]
        if not isinstance(cls, str) or not cls.strip():
            raise self.error(at, f"{what}: match.class: expected a class name, got {cls!r}.")
        last = cls.strip().rsplit(".", 1)[-1]
        known = (
            self.match_classes
            | names.OTHER_MATCH_CLASSES
            | names.EXPERTS_CLASSES
            | names.FOREIGN_CLASSES
        )
        if last not in known:
            near = difflib.get_close_matches(last, sorted(known), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            self.find(
                "warning", "unknown-class", at, f"{what}: no model has a class {last!r}.{hint}"
            )
        return pattern, last

    def replace_class(self, replace: yaml_lines.Mapping, at: int, what: str) -> str:
        cls = replace.get("class", "default")
        at = replace.lines.get("class", at)
        if not isinstance(cls, str) or not cls.strip():
            raise self.error(at, f"{what}: replace.class: expected a class name, got {cls!r}.")
        last = cls.strip().rsplit(".", 1)[-1]
        if last == "default" or last in names.EXPERTS_CLASSES:
            return last
        if last in names.FOREIGN_CLASSES:
            self.find(
                "note",
                "foreign-rule",
                at,
                f"{what}: {last} is not ours: its devices are honoured, its implementation is the "
                "model's own.",
            )
            return last
        near = difflib.get_close_matches(
            last, sorted(names.EXPERTS_CLASSES | names.FOREIGN_CLASSES), 1
        )
        hint = f" Did you mean {near[0]!r}?" if near else ""
        self.find(
            "error",
            "unknown-class",
            at,
            f"{what}: unknown class {last!r}: only its devices are honoured.{hint}",
        )
        return last

    def device(self, kwargs: yaml_lines.Mapping, key: str, what: str) -> str:
        value = kwargs.get(key)
        if value is None:
            return ""
        device = device_name(value) if isinstance(value, str) else None
        if device is None:
            raise self.error(
                kwargs.lines[key],
                f"{what}: {key}: expected a device such as cuda:0 or cpu, got {value!r}.",
            )
        return device

    def op(self, kwargs: yaml_lines.Mapping, key: str, what: str, experts: bool) -> str:
        """Our operator for the rule's; '' when not given, null or the string "None"."""
        value = kwargs.get(key)
        if value is None or value == "None":
            return ""
        at = kwargs.lines[key]
        if not isinstance(value, str):
            raise self.error(at, f"{what}: {key}: expected an operator's name, got {value!r}.")
        last = value.strip().rsplit(".", 1)[-1]
        known = sorted(names.EXPERTS_OPS) if experts else sorted(names.LINEAR_OPS)
        if last in known:
            return names.EXPERTS_OPS[last] if experts else ""
        near = difflib.get_close_matches(last, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
        of = "experts" if experts else "linear"
        self.find(
            "error" if experts else "warning",
            "unknown-op",
            at,
            f"{what}: {key}: unknown {of} operator {last!r}; the device's own is used.{hint}",
        )
        return ""

    def format(self, kwargs: yaml_lines.Mapping, what: str) -> str:
        value = kwargs.get("format")
        if value is None:
            return ""
        try:
            return get_format(value if isinstance(value, str) else repr(value)).name
        except ConfigError as error:
            raise self.error(kwargs.lines["format"], f"{what}: {error}") from None

    def transfer_map(self, kwargs: yaml_lines.Mapping, what: str) -> tuple[tuple[int, str], ...]:
        value = kwargs.get("transfer_map")
        if value is None:
            return ()
        moves = self.mapping(value, kwargs.lines["transfer_map"], f"{what}: transfer_map")
        found: dict[int, str] = {}
        for key, target in moves.items():
            at = moves.lines[key]
            layer = int(key) if isinstance(key, str) and re.fullmatch(r"\d{1,6}", key) else key
            if type(layer) is not int or layer < 0:
                raise self.error(at, f"{what}: transfer_map: expected a layer number, got {key!r}.")
            device = device_name(target) if isinstance(target, str) else None
            if device is None:
                raise self.error(
                    at,
                    f"{what}: transfer_map: expected a device for layer {layer}, got {target!r}.",
                )
            found[layer] = device
        return tuple(sorted(found.items()))
