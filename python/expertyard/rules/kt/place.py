# SPDX-License-Identifier: Apache-2.0
"""From winning rules to pins, and what the devices of different rules say about each other.

Where a layer's attention lives: the rule of its self_attn, else of what is in it, else of the
layer; else where `transfer_map` has brought the hidden states; else the experts' `out_device`.
Otherwise nobody said so, and the planner decides (the original puts it on cuda:0 without a word).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from expertyard.rules.devices import is_gpu
from expertyard.rules.kt.file import Rule
from expertyard.rules.kt.match import Matches, speaks_of_experts
from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec, Module

# parts of a layer in the order in which they speak for it
_SPEAKERS = ("attention", "layer", "norm", "router", "shared", "mlp", "block")
_PARTS = {
    "attention": "self_attn", "experts": "experts", "router": "router", "shared": "shared experts",
    "mlp": "dense MLP", "norm": "norms",
}  # fmt: skip
_EXAMPLE = r"'\.experts$'"


@dataclass
class _Layer:
    """Winning rules of one layer, by part; only rules that name a device."""

    rules: dict[str, list[tuple[Module, Rule]]] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)


def place(rules: list[Rule], spec: ModelSpec, found: Matches, findings: list[Finding]) -> Pins:
    layers = [_Layer() for _ in range(spec.num_layers)]
    modules: dict[str, Pin] = {}
    mover: Rule | None = None
    for index, module in enumerate(spec.tree):
        rule = found.modules.get(index)
        if rule is not None and rule.transfer_map and mover is None:
            mover = rule
        if module.layer is None:
            if rule is not None and rule.device and (module.shapes or module.part == "rotary"):
                modules[module.name] = Pin(rule.device, rule.where)
            continue
        layer = layers[module.layer]
        if module.shapes or module.part == "experts":
            layer.parts.add(module.part)
        if rule is not None and rule.device and not module.legacy:
            layer.rules.setdefault(module.part, []).append((module, rule))

    spoken = {i: pin for i, layer in enumerate(layers) if (pin := _spoken(layer)) is not None}
    pins = dict(spoken)
    if mover is not None:
        _follow_transfers(spec, mover, pins)
    _follow_outputs(layers, pins)
    experts = {
        i: found_pins
        for i, layer in enumerate(layers)
        if (found_pins := _experts(i, layer, found, pins.get(i)))
    }
    formats = {
        i: rule.format
        for i, layer in enumerate(layers)
        for _, rule in layer.rules.get("experts", ())
        if rule.format
    }
    findings += _split_layers(layers, pins)
    findings += _out_mismatches(layers, pins)
    if mover is not None:
        findings += _transfer_mismatches(spec, mover, spoken)
    several = len({pin.device for pin in pins.values() if is_gpu(pin.device)}) > 1
    findings += _uncovered(spec, layers, found, rules[0].file, several)
    return Pins(
        source=f"--rules {rules[0].file}",
        layers=pins,
        experts=experts,
        modules=modules,
        formats=formats,
        devices=tuple(dict.fromkeys(_named(rules))),
        findings=tuple(findings),
        needs_gpu=True,
    )


def _named(rules: list[Rule]) -> Iterable[str]:
    for rule in rules:
        yield from (device for device in (rule.device, rule.out_device) if device)
        yield from (device for _, device in rule.transfer_map)


def _spoken(layer: _Layer) -> Pin | None:
    for part in _SPEAKERS:
        for _, rule in layer.rules.get(part, ()):
            return Pin(rule.device, rule.where)
    return None


def _follow_transfers(spec: ModelSpec, mover: Rule, pins: dict[int, Pin]) -> None:
    """Layers that no rule speaks for are where the transfer_map has brought the hidden states."""
    moves = dict(mover.transfer_map)
    why = f"{mover.where} (transfer_map)"
    first = pins.get(0, Pin("cuda:0", why))
    device = first.device
    for layer in range(spec.num_layers):
        device = moves.get(layer, device)
        pins.setdefault(layer, Pin(device, why))


def _follow_outputs(layers: list[_Layer], pins: dict[int, Pin]) -> None:
    for number, layer in enumerate(layers):
        for _, rule in layer.rules.get("experts", ()):
            if rule.out_device:
                pins.setdefault(number, Pin(rule.out_device, f"{rule.where} (out_device)"))


def _experts(number: int, layer: _Layer, found: Matches, home: Pin | None) -> tuple[Pin, ...]:
    """Pins of a layer's experts: single experts that have a rule of their own, then the rest."""
    groups: dict[int, list[int]] = {}
    by_number: dict[int, Rule] = {}
    for expert, rule in found.experts.get(number, {}).items():
        groups.setdefault(rule.number, []).append(expert)
        by_number[rule.number] = rule
    pins = [_expert_pin(by_number[n], home, tuple(ids)) for n, ids in groups.items()]
    for _, rule in layer.rules.get("experts", ()):
        pins.append(_expert_pin(rule, home, None))
    return tuple(pins)


def _expert_pin(rule: Rule, home: Pin | None, ids: tuple[int, ...] | None) -> Pin:
    """out_device is where the layer is: elsewhere the result would be of no use."""
    return Pin(
        rule.device,
        rule.where,
        op=rule.op,
        prefill_op=rule.prefill_op,
        prefill_device=rule.prefill_device if rule.prefill_device != rule.device else "",
        out_device=home.device if home else rule.out_device,
        format=rule.format,
        ids=ids,
    )


def _split_layers(layers: list[_Layer], pins: dict[int, Pin]) -> list[Finding]:
    """Parts of a layer that rules put elsewhere than its attention; one finding a rule."""
    odd: dict[int, tuple[Rule, set[int], str]] = {}
    for number, layer in enumerate(layers):
        for part, won in layer.rules.items():
            if part in ("experts", "rotary", "list"):
                continue
            for module, rule in won:
                if rule.device != pins[number].device:
                    _, seen, _ = odd.setdefault(rule.number, (rule, set(), module.name))
                    seen.add(number)
    return [
        Finding(
            "warning",
            "split-layer",
            f"rule {rule.number} puts {name} on {rule.device}, but the attention of layers "
            f"{format_ids(seen)} is on {pins[min(seen)].device} ({pins[min(seen)].why}); a layer "
            f"stays "
            "together, so these follow the attention.",
            rule.file,
            rule.line,
        )
        for rule, seen, name in odd.values()
    ]


def _out_mismatches(layers: list[_Layer], pins: dict[int, Pin]) -> list[Finding]:
    odd: dict[int, tuple[Rule, set[int]]] = {}
    for number, layer in enumerate(layers):
        for _, rule in layer.rules.get("experts", ()):
            if rule.out_device and number in pins and rule.out_device != pins[number].device:
                odd.setdefault(rule.number, (rule, set()))[1].add(number)
    return [
        Finding(
            "warning",
            "out-device-mismatch",
            f"rule {rule.number}: out_device is {rule.out_device}, but layers {format_ids(seen)} "
            f"live on "
            f"{pins[min(seen)].device} ({pins[min(seen)].why}); the result goes there.",
            rule.file,
            rule.line,
        )
        for rule, seen in odd.values()
    ]


def _transfer_mismatches(spec: ModelSpec, mover: Rule, spoken: dict[int, Pin]) -> list[Finding]:
    """transfer_map against the devices that rules give the layers."""
    findings = []
    beyond = [layer for layer, _ in mover.transfer_map if layer >= spec.num_layers]
    if beyond:
        findings.append(
            Finding(
                "warning",
                "transfer-map-mismatch",
                f"transfer_map: layer {beyond[0]} is beyond {spec.name}'s {spec.num_layers} "
                f"layers.",
                mover.file,
                mover.transfer_line,
            )
        )
    moves = dict(mover.transfer_map)
    device = spoken[0].device if 0 in spoken else "cuda:0"
    wrong: dict[tuple[str, str], list[int]] = {}
    for layer in range(spec.num_layers):
        device = moves.get(layer, device)
        if layer in spoken and spoken[layer].device != device:
            wrong.setdefault((device, spoken[layer].device), []).append(layer)
    for (said, actual), layers in wrong.items():
        findings.append(
            Finding(
                "warning",
                "transfer-map-mismatch",
                f"transfer_map has the hidden states of layers {format_ids(layers)} on {said}, but "
                f"their attention is on {actual} ({spoken[layers[0]].why}); the attention's device "
                "counts.",
                mover.file,
                mover.transfer_line,
            )
        )
    return findings


def _uncovered(
    spec: ModelSpec, layers: list[_Layer], found: Matches, file: str, several: bool
) -> list[Finding]:
    """Parts that rules place in some layers only, and what several GPUs leave unplaced."""
    partly: dict[tuple[int, ...], list[str]] = {}
    nowhere: list[str] = []
    last: dict[tuple[int, ...], Rule] = {}
    for part, name in _PARTS.items():
        having = [i for i, layer in enumerate(layers) if part in layer.parts]
        own = _meant(found) if part == "experts" else set()
        covered = {i for i in having if _is_for(layers[i], part) or i in own}
        missing = tuple(i for i in having if i not in covered)
        if missing and covered:
            partly.setdefault(missing, []).append(name)
            won = layers[max(covered)].rules.get(part)
            if won:
                last.setdefault(missing, won[-1][1])
        elif missing and (part == "experts" or several):
            nowhere.append(name)
    findings = [
        _partly(spec, layers, missing, parts, last.get(missing), file)
        for missing, parts in partly.items()
    ]
    if several:
        nowhere += [
            module.name
            for index, module in enumerate(spec.tree)
            if module.layer is None and module.shapes and index not in found.modules
        ]
    if nowhere:
        every = [i for i, layer in enumerate(layers) if "experts" in layer.parts]
        text = (
            f"no rule places {', '.join(nowhere)} in any layer; {_default(nowhere, layers, every)}"
        )
        findings.append(Finding("warning", "uncovered-module", text, file))
    return findings


def _meant(found: Matches) -> set[int]:
    """Layers where single experts have rules that speak of experts, not of all linear layers."""
    return {
        layer
        for layer, won in found.experts.items()
        if any(speaks_of_experts(rule) for rule in won.values())
    }


def _is_for(layer: _Layer, part: str) -> bool:
    """Whether a rule places the part. A rule for everything in the layer does not place experts.

    The original would run such experts, which no operator was made for, as plain modules.
    """
    won = layer.rules.get(part, ())
    if part != "experts":
        return bool(won)
    return any(rule.is_experts or speaks_of_experts(rule) for _, rule in won)


def _default(parts: list[str], layers: list[_Layer], missing: Iterable[int]) -> str:
    """Where things go that no rule places."""
    if "experts" in parts:
        taken = {rule for i in missing for _, rule in layers[i].rules.get("experts", ())}
        if taken:
            rule = min(taken, key=lambda rule: rule.number)
            return (
                f"rule {rule.number} ({rule.where}), which is not about experts, takes them to "
                f"{rule.device}. Say it with a rule for {_EXAMPLE}."
            )
        return (
            "experts go where rules for what is in them say, else where the planner puts them; "
            "everything else goes with its layer."
        )
    return "they go with their layer."


def _partly(
    spec: ModelSpec,
    layers: list[_Layer],
    missing: tuple[int, ...],
    parts: list[str],
    rule: Rule | None,
    file: str,
) -> Finding:
    """One finding for parts that lack a rule in the same layers; at the end of the model it is a
    short range.
    """
    what = f"{', '.join(parts)} of layers {format_ids(missing)}"
    line = rule.line if rule else 0
    start = missing[0]
    if missing == tuple(range(start, spec.num_layers)):
        text = (
            f"the rules stop at layer {start - 1}, but {spec.name} has {spec.num_layers} layers: "
            f"no rule places {what}; {_default(parts, layers, missing)}"
        )
        return Finding("warning", "short-range", text, file, line)
    text = f"no rule places {what}; {_default(parts, layers, missing)}"
    return Finding("warning", "uncovered-module", text, file, line)
