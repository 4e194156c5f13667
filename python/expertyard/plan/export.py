# SPDX-License-Identifier: Apache-2.0
"""A plan in the other grammars: kt, ord, ot, device_map. Reading the text back gives the same
places.

What a grammar cannot say is a PlanError that names the layer; nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from expertyard.errors import PlanError
from expertyard.plan.model import ExpertGroup, LayerPlan, Plan
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec
from expertyard.spec.gguf import OUTSIDE

KINDS = ("kt", "ord", "ot", "device_map")
_KT_OPS = {"cpu": "KExpertsCPU", "cuda": "KExpertsMarlin", "torch": "KExpertsTorch"}


def export(plan: Plan, spec: ModelSpec, kind: str) -> str:
    """The plan as text of that grammar. Raises PlanError for what it cannot express."""
    writers: dict[str, Callable[[Plan, ModelSpec], str]] = {
        "kt": _kt, "ord": _ord, "ot": _ot, "device_map": _device_map,
    }  # fmt: skip
    if kind not in writers:
        raise PlanError(f"export: expected one of {', '.join(KINDS)}; got {kind!r}.")
    return writers[kind](plan, spec)


def _runs(layers: Iterable[int]) -> str:
    """A regular expression for exactly these numbers: (2-15) is '([2-9]|1[0-5])'."""
    decades: dict[int, list[int]] = {}
    for number in sorted(set(layers)):
        decades.setdefault(number // 10, []).append(number % 10)
    alike: dict[str, list[int]] = {}
    for decade, digits in decades.items():
        alike.setdefault(_digits(digits), []).append(decade)
    parts = []
    for digits_class, found in alike.items():
        tens = [decade for decade in found if 1 <= decade <= 9]
        parts += [f"{decade or ''}{digits_class}" for decade in found if decade not in tens]
        if tens:
            parts.append(f"{_digits(tens)}{digits_class}")
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _digits(digits: list[int]) -> str:
    """[2, 3, 4, 7] -> '[2-47]'; a single digit is itself."""
    if len(digits) == 1:
        return str(digits[0])
    return f"[{format_ids(digits).replace(',', '')}]"


def _by_device(plan: Plan) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for layer in plan.layers:
        found.setdefault(layer.device, []).append(layer.layer)
    return found


def _experts_path(spec: ModelSpec) -> tuple[str, str]:
    """('model.layers.', '.mlp.experts') of this family."""
    name = next(m.name for m in spec.tree if m.part == "experts")
    before, _, after = name.partition("layers.")
    return f"{before}layers.", after[after.index(".") :]


def _device_word(device: str) -> str:
    """'cuda:0' -> 'CUDA0', as llama.cpp calls it."""
    return device.upper().replace(":", "")


def _kt(plan: Plan, spec: ModelSpec) -> str:
    """Rules for the experts first, then the layers, then what lies outside."""
    base, experts = _experts_path(spec)
    rules: list[str] = []
    if plan.transfers:
        moves = "".join(f"\n        {layer}: {device}" for layer, device in plan.transfers.items())
        mla = spec.arch is not None and spec.arch.is_mla
        model = "KDeepseekV2Model" if mla else "KQwen2MoeModel"
        rules.append(
            f'- match:\n    name: "^{_literal(base[: -len(".layers.")])}$"\n  replace:\n'
            f"    class: ktransformers.operators.models.{model}\n    kwargs:\n"
            f"      transfer_map:{moves}\n"
        )
    for group, ids, layers, recursive in _expert_rules(plan):
        name = f"^{_literal(base)}{_runs(layers)}{_literal(experts)}"
        name += "$" if ids is None else f"\\\\.{_runs(ids)}$"
        rules.append(_kt_experts(name, group, recursive))
    for device, layers in _by_device(plan).items():
        rules.append(_kt_default(f"^{_literal(base)}{_runs(layers)}\\\\.", device))
    for module, device in plan.modules.items():
        rules.append(_kt_default(f"^{_literal(module)}$", device))
    return "\n".join(rules)


def _literal(name: str) -> str:
    """A dotted name inside a double-quoted YAML regex."""
    return name.replace(".", "\\\\.")


def _expert_rules(plan: Plan) -> list[tuple[ExpertGroup, tuple[int, ...] | None, list[int], bool]]:
    """(what the group is, ids or None for all, its layers, whether single experts have rules)."""
    Key = tuple[ExpertGroup, tuple[int, ...] | None]
    single: dict[Key, list[int]] = {}
    split: dict[Key, list[int]] = {}
    whole: dict[Key, list[int]] = {}
    for layer in plan.layers:
        groups = layer.experts or ()
        for group in groups if len(groups) > 1 else ():
            single.setdefault((_kind(group), group.ids), []).append(layer.layer)
        if groups:
            largest = max(groups, key=lambda g: len(g.ids))
            target = whole if len(groups) == 1 else split
            target.setdefault((_kind(largest), None), []).append(layer.layer)
    return [
        (*key, layers, table is not whole)
        for table in (single, split, whole)
        for key, layers in table.items()
    ]


def _kind(group: ExpertGroup) -> ExpertGroup:
    """The group without its layer's own: ids, bytes, why."""
    return ExpertGroup(
        (), group.device, group.format, group.op, group.prefill_op, group.out_device, "",
        prefill_device=group.prefill_device,
    )  # fmt: skip


def _kt_experts(name: str, group: ExpertGroup, recursive: bool) -> str:
    lines = [
        f'- match:\n    name: "{name}"',
        "  replace:\n    class: ktransformers.operators.experts.KTransformersExperts\n    kwargs:",
        f"      generate_device: {group.device}",
        f"      generate_op: {_KT_OPS[group.op]}",
        f"      prefill_op: {_KT_OPS[group.prefill_op]}",
        f"      out_device: {group.out_device}",
        f"      format: {group.format}",
    ]
    if group.prefill_device:
        lines.insert(-2, f"      prefill_device: {group.prefill_device}")
    if not recursive:
        lines.append("  recursive: False")
    return "\n".join(lines) + "\n"


def _kt_default(name: str, device: str) -> str:
    return (
        f'- match:\n    name: "{name}"\n  replace:\n    class: default\n    kwargs:\n'
        f"      generate_device: {device}\n      prefill_device: {device}\n"
    )


def _ord(plan: Plan, spec: ModelSpec) -> str:
    """Whole layers in runs of GPUs, each GPU once, the CPU last."""
    entries: list[tuple[str, int]] = []
    for layer in plan.layers:
        apart = {g.device for g in layer.experts or ()} - {layer.device}
        if apart:
            raise PlanError(
                f"ORD:NUM moves whole layers, but layer {layer.layer} is on {layer.device} and has "
                f"experts on {', '.join(sorted(apart))}."
            )
        if entries and entries[-1][0] == layer.device:
            entries[-1] = (layer.device, entries[-1][1] + 1)
        else:
            entries.append((layer.device, 1))
    if entries[-1][0] == "cpu":
        entries.pop()
    for device, _ in entries:
        if not device.startswith("cuda:") or [d for d, _ in entries].count(device) > 1:
            raise PlanError(f"ORD:NUM takes GPUs one after another; {device} does not fit that.")
    return ";".join(f"{device[5:]}:{number}" for device, number in entries) or "0:0"


def _ot(plan: Plan, spec: ModelSpec) -> str:
    """Experts that are not with their layer, then whole layers, then what lies outside."""
    away: dict[str, list[int]] = {}
    for layer in plan.layers:
        devices = {group.device for group in layer.experts or ()}
        if len(devices) > 1:
            raise PlanError(
                f"-ot moves a layer's experts together, but those of layer {layer.layer} are on "
                f"{', '.join(sorted(devices))}."
            )
        if devices and devices != {layer.device}:
            away.setdefault(devices.pop(), []).append(layer.layer)
    parts = [
        rf"blk\.{_runs(layers)}\.ffn_(up|down|gate)_exps={_device_word(device)}"
        for device, layers in away.items()
    ]
    parts += [
        rf"blk\.{_runs(layers)}\.={_device_word(device)}"
        for device, layers in _by_device(plan).items()
    ]
    outside = {m.name: m.part for m in spec.tree if m.layer is None}
    tensors = {part: name for name, part in OUTSIDE.items()}
    for module, device in plan.modules.items():
        tensor = tensors.get(outside.get(module, ""))
        if tensor is not None:
            parts.append(f"^{tensor.replace('.', chr(92) + '.')}={_device_word(device)}")
    return ",".join(parts)


def _device_map(plan: Plan, spec: ModelSpec) -> str:
    """Modules, layers, experts that are not with their layer, and single experts."""
    base, experts = _experts_path(spec)
    table: dict[str, str] = dict(plan.modules)
    for layer in plan.layers:
        name = f"{base}{layer.layer}"
        table[name] = layer.device
        if layer.experts:
            table.update(_expert_names(f"{name}{experts}", layer))
    return json.dumps(table, indent=1)


def _expert_names(name: str, layer: LayerPlan) -> dict[str, str]:
    groups = layer.experts or ()
    largest = max(groups, key=lambda g: len(g.ids))
    table = {} if largest.device == layer.device else {name: largest.device}
    for group in groups:
        if group.device != largest.device:
            table.update({f"{name}.{expert}": group.device for expert in group.ids})
    return table
