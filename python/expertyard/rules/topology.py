# SPDX-License-Identifier: Apache-2.0
"""mistral.rs' topology: a YAML map of layer ranges and /regexes/ to `device` and `isq`.

Keys: `START-END` (END not included), a bare layer number, or `/regex/` searched in weight names.
Among ranges the higher end wins, the later one on a tie; among regexes the later one; a regex beats
every range. A layer takes its experts along; a regex that matches only experts moves only those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError, RuleError
from expertyard.formats import get_format
from expertyard.rules import yaml_lines
from expertyard.rules.devices import device_name
from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec, Module
from expertyard.spec.tree import expert_names

# isq types -> the nearest of our formats (fewer bits round up)
ISQ = {
    "q2k": "int4", "q3k": "int4", "q4k": "int4", "q4_0": "int4", "q4_1": "int4", "hqq4": "int4",
    "afq2": "int4", "afq3": "int4", "afq4": "int4", "2": "int4", "3": "int4", "4": "int4",
    "q5_0": "int8", "q5_1": "int8", "q5k": "int8", "q6k": "int8", "q8_0": "int8", "q8_1": "int8",
    "q8k": "int8", "hqq8": "int8", "afq6": "int8", "afq8": "int8", "5": "int8", "6": "int8",
    "8": "int8", "f8e4m3": "fp8", "f8q8": "int8", "mxfp4": "mxfp4",
}  # fmt: skip
_FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Entry:
    """One key of the map. A range has `pattern` None."""

    where: str
    line: int
    key: str
    first: int
    end: int
    pattern: re.Pattern[str] | None
    device: str
    format: str


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins of a topology file, text or dict."""
    if isinstance(value, dict):
        import yaml

        text, name = yaml.safe_dump(value, sort_keys=False), "<text>"
    elif isinstance(value, str | Path):
        text, name = yaml_lines.read_text(value)
    else:
        raise RuleError(f"--topology: expected a file, YAML text or a dict, got {value!r}.")
    findings: list[Finding] = []
    entries = _entries(yaml_lines.load(text, name), name, findings)
    formatted = [entry for entry in entries if entry.format]
    if formatted:
        note = "isq is for the routed experts only; the rest of a layer stays in --dense-format."
        findings.append(Finding("note", "foreign-rule", note, name, formatted[0].line))
    ranges = sorted((e for e in entries if e.pattern is None), key=lambda e: e.end)
    patterns = [entry for entry in reversed(entries) if entry.pattern is not None]
    layers, formats, findings_of_ranges = _ranges(ranges, spec, name)
    follow = {layer: pin for layer, pin in layers.items() if spec.layers[layer].is_moe}
    pins = Pins(
        source=f"--topology {name}",
        layers=layers,
        follow=follow,
        formats=formats,
        devices=tuple(dict.fromkeys(entry.device for entry in entries if entry.device)),
        findings=(*findings, *findings_of_ranges),
        needs_gpu=True,
    )
    return _patterns(patterns, spec, pins, name) if patterns else pins


def _entries(document: Any, name: str, findings: list[Finding]) -> list[Entry]:
    if not isinstance(document, yaml_lines.Mapping):
        raise RuleError(f"{name}:1: expected a map of layer ranges or /regexes/.")
    entries = []
    for key, value in document.items():
        line = document.lines[key]
        if value is None:
            value = yaml_lines.Mapping()
            value.lines = {}
        if not isinstance(value, yaml_lines.Mapping):
            raise RuleError(
                f"{name}:{line}: {key}: expected isq and device below it, got {value!r}."
            )
        for field in value:
            if field not in ("isq", "device"):
                text = f"{key}: unknown key {field!r}. Known: isq, device."
                findings.append(Finding("error", "unknown-key", text, name, value.lines[field]))
        where = f"{Path(name).name if name != '<text>' else 'topology'}:{line}"
        entry = Entry(where, line, str(key), 0, 0, None, _device(value, name), _isq(value, name))
        entries.append(_keyed(entry, key, name, line))
    if not entries:
        raise RuleError(f"{name}: no ranges in it.")
    return entries


def _keyed(entry: Entry, key: Any, name: str, line: int) -> Entry:
    text = str(key).strip()
    if isinstance(key, bool):
        raise RuleError(
            f"{name}:{line}: expected START-END, a layer number or /regex/, got {key!r}."
        )
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        try:
            return replace(entry, pattern=re.compile(text[1:-1]))
        except (re.error, RecursionError, OverflowError) as error:
            raise RuleError(f"{name}:{line}: {text} is no regular expression: {error}.") from None
    match = re.fullmatch(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?", text)
    if match is None:
        raise RuleError(
            f"{name}:{line}: expected START-END, a layer number or /regex/, got {text!r}."
        )
    first = int(match[1])
    end = int(match[2]) if match[2] else first + 1
    if end <= first:
        raise RuleError(
            f"{name}:{line}: the end of {text!r} must be above its start; it is not included."
        )
    return replace(entry, first=first, end=end)


def _device(value: yaml_lines.Mapping, name: str) -> str:
    given = value.get("device")
    if given is None:
        return ""
    device = device_name(given) if isinstance(given, str) else None
    if device is None:
        raise RuleError(
            f"{name}:{value.lines['device']}: device: expected cpu, cuda[0] or cuda:0, got "
            f"{given!r}."
        )
    return device


def _isq(value: yaml_lines.Mapping, name: str) -> str:
    given = value.get("isq")
    if given is None:
        return ""
    fmt = ISQ.get(str(given).lower())
    if fmt is not None:
        return fmt
    try:
        return get_format(given).name
    except ConfigError:
        raise RuleError(
            f"{name}:{value.lines['isq']}: isq: unknown type {given!r}; known are our formats and "
            f"{', '.join(ISQ)}."
        ) from None


def _ranges(
    ranges: list[Entry], spec: ModelSpec, name: str
) -> tuple[dict[int, Pin], dict[int, str], list[Finding]]:
    """Later in `ranges` wins. Each of device and isq is taken from the last range that covers."""
    layers: dict[int, Pin] = {}
    formats: dict[int, str] = {}
    owner: dict[int, Entry] = {}
    findings = []
    for entry in ranges:
        if entry.end > spec.num_layers:
            text = (
                f"{entry.key} ends at layer {entry.end - 1}, but {spec.name} has {spec.num_layers} "
                "layers; the range is cut."
            )
            code = "clamped" if entry.first < spec.num_layers else "dead-rule"
            findings.append(Finding("warning", code, text, name, entry.line))
        for layer in range(entry.first, min(entry.end, spec.num_layers)):
            owner[layer] = entry
            layers.pop(layer, None)
            formats.pop(layer, None)
            if entry.device:
                layers[layer] = Pin(entry.device, entry.where)
            if entry.format:
                formats[layer] = entry.format
    owners = {id(entry) for entry in owner.values()}
    for entry in ranges:
        if id(entry) not in owners and entry.first < spec.num_layers:
            winner = owner[entry.first]
            text = f"{entry.key} never applies: {winner.key} ({winner.where}) ends higher or later."
            findings.append(Finding("warning", "shadowed-rule", text, name, entry.line))
    uncovered = [i for i in range(spec.num_layers) if i not in owner]
    between = [i for i in uncovered if owner and i < max(owner)]
    if between:
        text = f"no range has layers {format_ids(between)}; the planner places them."
        findings.append(Finding("note", "uncovered-module", text, name))
    uncovered = [i for i in uncovered if i not in between]
    if ranges and owner and uncovered and uncovered[0] > max(owner):
        last = next(e for e in reversed(ranges) if owner.get(max(owner)) is e)
        text = (
            f"the ranges stop at layer {max(owner)}, but {spec.name} has {spec.num_layers} layers: "
            f"the planner places layers {format_ids(uncovered)}."
        )
        findings.append(Finding("warning", "short-range", text, name, last.line))
    return layers, formats, findings


def _patterns(patterns: list[Entry], spec: ModelSpec, pins: Pins, name: str) -> Pins:
    """Regexes, the winning (last) one first: they move layers, modules outside them, or experts."""
    layers, modules = dict(pins.layers), dict(pins.modules)
    experts: dict[int, tuple[Pin, ...]] = {}
    formats = dict(pins.formats)
    hits: dict[int, int] = dict.fromkeys(map(id, patterns), 0)

    def first(names: tuple[str, ...]) -> Entry | None:
        for entry in patterns:
            if any(entry.pattern.search(n) for n in names):  # type: ignore[union-attr]
                hits[id(entry)] += 1
                return entry
        return None

    split: dict[int, list[int]] = {}
    for module in spec.tree:
        if module.part == "experts" and module.layer is not None:
            groups = _expert_entries(first, spec, module)
            found = [
                Pin(entry.device, entry.where, format=entry.format, ids=ids)
                for entry, ids in groups
                if entry.device
            ]
            if found:
                experts[module.layer] = tuple(found)
            for entry, ids in groups:
                if entry.format and ids is None:
                    formats[module.layer] = entry.format
        if not module.shapes:
            continue
        winner = first(tuple(f"{n}.weight" for n in module.names))
        if winner is None or not winner.device:
            continue
        pin = Pin(winner.device, winner.where)
        if module.layer is None:
            modules[module.name] = pin
        elif module.part == "attention":
            layers[module.layer] = pin
        else:
            split.setdefault(id(winner), []).append(module.layer)
    findings = list(pins.findings)
    for entry in reversed(patterns):
        if not hits[id(entry)]:
            if _matches_any(entry, spec):
                code, text = "shadowed-rule", f"{entry.key} never applies: later regexes win."
            else:
                code, text = "dead-rule", f"{entry.key} matches no weight of {spec.name}."
            findings.append(Finding("warning", code, text, name, entry.line))
        elsewhere = [
            i
            for i in split.get(id(entry), [])
            if i not in layers or layers[i].device != entry.device
        ]
        if elsewhere:
            text = (
                f"{entry.key} moves parts of layers {format_ids(elsewhere)} away from their "
                "attention; a layer stays together, so only experts move."
            )
            findings.append(Finding("note", "split-layer", text, name, entry.line))
    return replace(
        pins,
        layers=layers,
        experts=experts,
        modules=modules,
        formats=formats,
        findings=tuple(findings),
    )


def _matches_any(entry: Entry, spec: ModelSpec) -> bool:
    """Whether the regex matches a weight of the model at all, whoever wins it."""
    assert entry.pattern is not None and spec.arch is not None
    projections = spec.arch.family.projections
    for module in spec.tree:
        names = [f"{n}.weight" for n in module.names] if module.shapes else []
        if module.part == "experts" and module.layer is not None:
            names += [f"{n}.{part}" for n in module.names for part in _FUSED]
            shape = spec.layers[module.layer].experts
            for expert in range(shape.num_experts if shape else 0):
                every = expert_names(module, expert)
                names += [f"{n}.{part}.weight" for n in every for part in projections]
        if any(map(entry.pattern.search, names)):
            return True
    return False


def _expert_entries(
    first: Any, spec: ModelSpec, module: Module
) -> list[tuple[Entry, tuple[int, ...] | None]]:
    """Which regex moves which experts of a layer: as fused tensors, else expert by expert."""
    assert module.layer is not None and spec.arch is not None
    fused = tuple(f"{n}.{p}" for n in module.names for p in _FUSED)
    whole = first(fused)
    if whole is not None:
        return [(whole, None)]
    shape = spec.layers[module.layer].experts
    groups: dict[int, tuple[Entry, list[int]]] = {}
    projections = spec.arch.family.projections
    for expert in range(shape.num_experts if shape else 0):
        names = expert_names(module, expert)
        entry = first(tuple(f"{n}.{p}.weight" for n in names for p in projections))
        if entry is not None:
            groups.setdefault(id(entry), (entry, []))[1].append(expert)
    all_of_them = shape.num_experts if shape else 0
    return [
        (entry, None if len(ids) == all_of_them else tuple(ids)) for entry, ids in groups.values()
    ]
