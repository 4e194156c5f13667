# SPDX-License-Identifier: Apache-2.0
"""Several inputs into one set of pins. Where two of them disagree, an error names both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expertyard.errors import PlanError
from expertyard.rules.pins import HOME, Finding, Pin, Pins
from expertyard.spec import ModelSpec


@dataclass(frozen=True)
class Merged:
    """Everything that is pinned. `experts`: layer -> expert -> pin; what is missing is free.

    `near`: layers that are better where these pins say, where there is room.
    """

    layers: Mapping[int, Pin] = field(default_factory=dict)
    experts: Mapping[int, Mapping[int, Pin]] = field(default_factory=dict)
    near: Mapping[int, Pin] = field(default_factory=dict)
    modules: Mapping[str, Pin] = field(default_factory=dict)
    formats: Mapping[int, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    needs_gpu: bool = False


def merge(spec: ModelSpec, inputs: list[Pins]) -> Merged:
    """One set of pins. Raises PlanError when two inputs want different devices for one thing."""
    layers: dict[int, Pin] = {}
    modules: dict[str, Pin] = {}
    experts: dict[int, dict[int, Pin]] = {}
    for pins in inputs:
        for layer, pin in pins.layers.items():
            layers[layer] = _agree(layers.get(layer), pin, f"layer {layer}")
        for name, pin in pins.modules.items():
            modules[name] = _agree(modules.get(name), pin, name)
        for layer, groups in pins.experts.items():
            here = experts.setdefault(layer, {})
            for expert, pin in _spread(spec, layer, groups).items():
                here[expert] = _agree(here.get(expert), pin, f"layer {layer}, expert {expert}")
    near: dict[int, Pin] = {}
    for pins in inputs:
        for layer, pin in pins.near.items():
            if layer not in layers:
                near.setdefault(layer, pin)
        for layer, pin in pins.follow.items():
            shape = spec.layers[layer].experts
            here = experts.setdefault(layer, {})
            for expert in range(shape.num_experts if shape else 0):
                here.setdefault(expert, pin)
    return Merged(
        layers=layers,
        experts=experts,
        near=near,
        modules=modules,
        formats={layer: fmt for pins in reversed(inputs) for layer, fmt in pins.formats.items()},
        devices=tuple(dict.fromkeys(device for pins in inputs for device in pins.devices)),
        findings=tuple(finding for pins in inputs for finding in pins.findings),
        needs_gpu=any(pins.needs_gpu for pins in inputs),
    )


def _agree(old: Pin | None, new: Pin, what: str) -> Pin:
    if old is not None and old.device != new.device:
        raise PlanError(
            f"{what}: {old.why} puts it on {_name(old)}, {new.why} on {_name(new)}. "
            "Take it out of one of them."
        )
    return old or new


def _name(pin: Pin) -> str:
    return "its layer's GPU" if pin.device == HOME else pin.device


def _spread(spec: ModelSpec, layer: int, groups: tuple[Pin, ...]) -> dict[int, Pin]:
    """Expert -> pin of one input; the first group that has an expert counts."""
    shape = spec.layers[layer].experts
    number = shape.num_experts if shape else 0
    found: dict[int, Pin] = {}
    for pin in groups:
        for expert in range(number) if pin.ids is None else pin.ids:
            found.setdefault(expert, pin)
    return found
