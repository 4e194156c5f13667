# SPDX-License-Identifier: Apache-2.0
"""A plan that `expertyard plan --save` wrote, as an input: everything is where it was.

Devices, formats and operators are taken; bytes are counted anew for the model at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertyard.errors import ConfigError, RuleError
from expertyard.formats import get_format
from expertyard.rules.devices import device_name
from expertyard.rules.pins import Pin, Pins
from expertyard.rules.ranges import parse_ids
from expertyard.spec import ModelSpec

FLAG = "--plan"
SCHEMA = 1


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins of a plan's file, or of its JSON as a dict. Raises RuleError naming the layer."""
    data, name = _load(value)
    if data.get("schema") != SCHEMA:
        raise RuleError(f"{name}: schema: expected {SCHEMA}, got {data.get('schema')!r}.")
    rows = data.get("layers")
    if not isinstance(rows, list) or len(rows) != spec.num_layers:
        number = len(rows) if isinstance(rows, list) else 0
        raise RuleError(
            f"{name}: this plan is for {number} layers of {data.get('model')!r}, but {spec.name} "
            f"has "
            f"{spec.num_layers}."
        )
    layers: dict[int, Pin] = {}
    experts: dict[int, tuple[Pin, ...]] = {}
    for layer, row in enumerate(rows):
        where = f"{name}: layer {layer}"
        layers[layer] = _pin(row, where)
        groups = row.get("experts")
        if not isinstance(groups, list | None) or (groups is None) == spec.layers[layer].is_moe:
            raise RuleError(
                f"{where}: experts do not agree with {spec.name}, whose layer is another."
            )
        if groups is not None:
            experts[layer] = _groups(groups, where, spec, layer)
    modules = data.get("modules", {})
    if not isinstance(modules, dict):
        raise RuleError(f"{name}: modules: expected an object, got {modules!r}.")
    outside = {key: _pin({"device": device}, f"{name}: {key}") for key, device in modules.items()}
    every = [*layers.values(), *outside.values(), *(pin for row in experts.values() for pin in row)]
    return Pins(
        source=f"{FLAG} {name}",
        layers=layers,
        experts=experts,
        modules=outside,
        devices=tuple(dict.fromkeys(pin.device for pin in every)),
    )


def _load(value: Any) -> tuple[Mapping[str, Any], str]:
    if isinstance(value, Mapping):
        return value, FLAG
    if not isinstance(value, str | Path):
        raise RuleError(f"{FLAG}: expected a file that --save wrote, got {value!r}.")
    path = Path(value)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RuleError(f"{FLAG} {path}: no such file.") from None
    except OSError as error:
        raise RuleError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise RuleError(f"{path}: not JSON.") from None
    if not isinstance(data, dict):
        raise RuleError(f"{path}: expected a plan that --save wrote.")
    return data, str(path)


def _pin(row: Any, where: str) -> Pin:
    device = device_name(row.get("device")) if isinstance(row, dict) else None
    if device is None:
        raise RuleError(f"{where}: expected an object with a device, got {row!r}.")
    why = row.get("why")
    return Pin(device, why if isinstance(why, str) and why else f"{FLAG} file")


def _groups(groups: list[Any], where: str, spec: ModelSpec, layer: int) -> tuple[Pin, ...]:
    pins = []
    seen: list[int] = []
    for group in groups:
        pin = _pin(group, where)
        try:
            ids = parse_ids(str(group.get("ids")), f"{where}: ids")
            fmt = get_format(group.get("format", "bf16")).name
        except ConfigError as error:
            raise RuleError(f"{where}: {error}") from None
        ops = {key: group.get(key, "") for key in ("op", "prefill_op")}
        for key, op in ops.items():
            if op not in ("", "cpu", "cuda", "torch"):
                raise RuleError(f"{where}: {key}: expected cpu, cuda or torch, got {op!r}.")
        wanted = group.get("prefill_device", "")
        prefill_device = device_name(wanted) if wanted else ""
        if prefill_device is None:
            raise RuleError(f"{where}: prefill_device: expected a device, got {wanted!r}.")
        seen += ids
        pins.append(replace(pin, ids=ids, format=fmt, prefill_device=prefill_device, **ops))
    shape = spec.layers[layer].experts
    if sorted(seen) != list(range(shape.num_experts if shape else 0)):
        number = shape.num_experts if shape else 0
        raise RuleError(f"{where}: expected each of {number} experts once.")
    return tuple(pins)
