# SPDX-License-Identifier: Apache-2.0
"""`ORD:NUM;...`: NUM layers for GPU ORD, in list order; the remainder goes to the CPU (mistral.rs).

"0:16;1:16", ["0:16", "1:16"], 16, "16" and ["16"]: a bare number means GPU 0. Experts go with their
layer unless another input places them. One entry larger than the model is cut to it (a finding);
several that sum to more are an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from expertyard.errors import RuleError
from expertyard.rules.devices import MAX_ORDINAL
from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.spec import ModelSpec

FLAG = "--layers"


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins for every layer of the model. Raises RuleError that quotes the entry."""
    entries = parse(value)
    findings: list[Finding] = []
    total = sum(number for _, number in entries)
    if total > spec.num_layers:
        if len(entries) > 1:
            raise RuleError(
                f"{FLAG} {_show(value)!r}: the entries sum to {total} layers, but {spec.name} has "
                f"{spec.num_layers}. Lower one of them."
            )
        findings.append(
            Finding(
                "warning",
                "clamped",
                f"{FLAG} {_show(value)!r} asks for {total} layers; {spec.name} has "
                f"{spec.num_layers}, so all of them go there.",
            )
        )
        entries = [(entries[0][0], spec.num_layers)]
    layers: dict[int, Pin] = {}
    for ordinal, number in entries:
        pin = Pin(f"cuda:{ordinal}", f"{FLAG} {ordinal}:{number}")
        for _ in range(number):
            layers[len(layers)] = pin
    rest = Pin("cpu", f"{FLAG} (remainder)")
    for layer in range(len(layers), spec.num_layers):
        layers[layer] = rest
    return Pins(
        source=f"{FLAG} {_show(value)}",
        layers=layers,
        follow=layers,
        devices=(*(f"cuda:{ordinal}" for ordinal, _ in entries), "cpu"),
        findings=tuple(findings),
    )


def parse(value: Any) -> list[tuple[int, int]]:
    """[(ordinal, layers), ...] in list order."""
    if isinstance(value, bool) or not isinstance(value, int | str | Sequence):
        raise RuleError(
            f"{FLAG}: expected 'ORD:NUM;...', a list of 'ORD:NUM', or a number; got {value!r}."
        )
    if isinstance(value, int):
        parts = [str(value)]
    elif isinstance(value, str):
        parts = value.split(";")
    else:
        parts = [str(part) for part in value]
    if not parts or all(not part.strip() for part in parts):
        raise RuleError(f"{FLAG}: expected 'ORD:NUM;...' or a number, got nothing.")
    if not parts[-1].strip():
        parts.pop()  # a trailing separator is harmless
    if len(parts) == 1 and ":" not in parts[0]:
        return [(0, _number(parts[0], parts[0], "the number of layers"))]
    entries: list[tuple[int, int]] = []
    for part in parts:
        ordinal, colon, number = part.partition(":")
        if not colon or ":" in number:
            raise RuleError(f"{FLAG}: expected ORD:NUM such as 0:16, got {part!r}.")
        entry = (_number(ordinal, part, "ORD"), _number(number, part, "NUM"))
        if entry[0] > MAX_ORDINAL:
            raise RuleError(f"{FLAG}: {part!r}: no machine has a GPU {entry[0]}.")
        if entry[0] in (seen for seen, _ in entries):
            raise RuleError(f"{FLAG}: GPU {entry[0]} is named twice; {part!r} is the second time.")
        entries.append(entry)
    return entries


def _number(text: str, entry: str, what: str) -> int:
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) is None:
        raise RuleError(
            f"{FLAG}: {entry!r}: {what}: expected a whole number, got {text.strip()!r}."
        )
    return int(text.strip())


def _show(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else ";".join(map(str, value))
        if not isinstance(value, int)
        else str(value)
    )
