# SPDX-License-Identifier: Apache-2.0
"""Which routed experts go to a GPU: a number or share per MoE layer, or their ids; the rest on the
CPU.

8 = eight a layer (0: none), 0.25 or "25%" = a quarter, "0-7,12" = these ids in every layer, and in
Python {layer: number or ids}. The strategy says which: uniform (the same number in each layer),
frequency (the most read of all layers together, by --profile), front or back (whole layers from one
end), trace (as frequency, and the trace is replayed). A GPU expert lives on its layer's GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertyard.errors import ConfigError, RuleError
from expertyard.rules.pins import HOME, Finding, Pin, Pins
from expertyard.rules.ranges import parse_ids
from expertyard.spec import ModelSpec

if TYPE_CHECKING:
    from expertyard.rules.profile import Profile

FLAG = "--gpu-experts"
STRATEGIES = ("uniform", "frequency", "front", "back", "trace")


@dataclass(frozen=True)
class Choice:
    """The value of --gpu-experts with what it depends on."""

    experts: Any
    strategy: str = "uniform"
    profile: Profile | None = None


def check_strategy(strategy: Any, profile: Any) -> None:
    """Raises ConfigError for an unknown strategy and for one that lacks its profile."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    if strategy in ("frequency", "trace") and profile is None:
        raise ConfigError(f"strategy {strategy} needs --profile FILE.")


def read(value: Choice, spec: ModelSpec) -> Pins:
    """Pins of every MoE layer's experts. Raises RuleError for ids that are not there."""
    findings: list[Finding] = []
    chosen = _chosen(value, spec, findings)
    why = f"{FLAG} {value.experts}" if not isinstance(value.experts, Mapping) else FLAG
    if not isinstance(value.experts, Mapping) and value.strategy != "uniform":
        why += f" ({value.strategy})"
    pins = {
        layer: (Pin(HOME, why, ids=tuple(sorted(chosen.get(layer, ())))), Pin("cpu", why))
        for layer in spec.moe_layers
    }
    return Pins(
        source=why,
        experts=pins,
        devices=("cpu",),
        findings=tuple(findings),
        needs_gpu=any(chosen.values()),
    )


def _chosen(value: Choice, spec: ModelSpec, findings: list[Finding]) -> dict[int, Sequence[int]]:
    experts = value.experts
    if isinstance(experts, Mapping):
        return _by_layer(experts, spec, findings)
    if isinstance(experts, list | tuple):
        return {layer: _ids(experts, layer, spec) for layer in spec.moe_layers}
    if isinstance(experts, str) and re.search(r"[,-]", experts.strip().lstrip("-")):
        ids = parse_ids(experts, FLAG)
        return {layer: _ids(ids, layer, spec) for layer in spec.moe_layers}
    numbers = {layer: _number(experts, layer, spec, findings) for layer in spec.moe_layers}
    return _pick(numbers, value, spec)


def _by_layer(
    table: Mapping[Any, Any], spec: ModelSpec, findings: list[Finding]
) -> dict[int, Sequence[int]]:
    chosen: dict[int, Sequence[int]] = {}
    for key, wanted in table.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(layer) is not int or layer not in spec.moe_layers:
            raise RuleError(f"{FLAG}: {key!r} is no MoE layer of {spec.name}.")
        if isinstance(wanted, list | tuple):
            chosen[layer] = _ids(wanted, layer, spec)
        elif isinstance(wanted, str) and re.search(r"[,-]", wanted):
            chosen[layer] = _ids(parse_ids(wanted, FLAG), layer, spec)
        else:
            chosen[layer] = range(_number(wanted, layer, spec, findings))
    return chosen


def _num_experts(layer: int, spec: ModelSpec) -> int:
    shape = spec.layers[layer].experts
    assert shape is not None
    return shape.num_experts


def _ids(ids: Sequence[Any], layer: int, spec: ModelSpec) -> tuple[int, ...]:
    number = _num_experts(layer, spec)
    for expert in ids:
        if type(expert) is not int or not 0 <= expert < number:
            raise RuleError(
                f"{FLAG}: expert {expert!r} out of range [0, {number}) in layer {layer}."
            )
    return tuple(sorted(set(ids)))


def _number(value: Any, layer: int, spec: ModelSpec, findings: list[Finding]) -> int:
    """Experts of one layer: a count, or a share of them rounded to the nearest."""
    number = _num_experts(layer, spec)
    text = str(value).strip()
    share = None
    if re.fullmatch(r"\d{1,3}(\.\d+)?%", text):
        share = float(text[:-1]) / 100
    elif re.fullmatch(r"\d*\.\d+|\d+\.\d*", text):
        share = float(text)
    if isinstance(value, bool) or (share is None and re.fullmatch(r"\d{1,9}", text) is None):
        raise RuleError(
            f"{FLAG}: expected a number (8), a share (0.25, 25%) or ids (0-7,12); got {value!r}."
        )
    if share is not None:
        if share > 1:
            raise RuleError(f"{FLAG}: a share is at most 1 (or 100%), got {text}.")
        return round(share * number)
    if int(text) > number:
        if not findings:
            said = f"{FLAG} {text}: a layer has {number} experts, so all of them go to the GPU."
            findings.append(Finding("warning", "clamped", said))
        return number
    return int(text)


def _pick(numbers: Mapping[int, int], value: Choice, spec: ModelSpec) -> dict[int, Sequence[int]]:
    """Experts of each layer by the strategy; `numbers` is how many each has in an even share."""
    weights = value.profile.weights if value.profile else {}
    if value.strategy == "uniform":
        return {layer: _most(weights.get(layer), number) for layer, number in numbers.items()}
    total = sum(numbers.values())
    if value.strategy in ("front", "back"):
        order = list(numbers) if value.strategy == "front" else list(reversed(numbers))
        chosen: dict[int, Sequence[int]] = {}
        for layer in order:
            take = min(total, _num_experts(layer, spec))
            chosen[layer] = _most(weights.get(layer), take)
            total -= take
        return chosen
    ranked = sorted(
        ((-w, layer, e) for layer in numbers for e, w in enumerate(_weights(weights, layer, spec))),
    )
    picked: dict[int, list[int]] = {}
    for _, layer, expert in ranked[:total]:
        picked.setdefault(layer, []).append(expert)
    return {layer: tuple(ids) for layer, ids in picked.items()}


def _weights(
    weights: Mapping[int, Sequence[float]], layer: int, spec: ModelSpec
) -> Sequence[float]:
    shape = spec.layers[layer].experts
    assert shape is not None
    return weights.get(layer) or (shape.top_k / shape.num_experts,) * shape.num_experts


def _most(weights: Sequence[float] | None, number: int) -> Sequence[int]:
    """The most popular experts of one layer; the first ones when nothing is known."""
    if weights is None:
        return range(number)
    order = sorted(range(len(weights)), key=lambda e: (-weights[e], e))
    return tuple(sorted(order[:number]))
