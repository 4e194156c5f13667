# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's `-ot REGEX=DEVICE[,REGEX=DEVICE...]`, `--cpu-moe` and `--n-cpu-moe N`.

Patterns are searched in GGUF names (blk.3.ffn_up_exps.weight); the first override that matches a
tensor wins, in the order of the command line. Split at commas outside brackets and braces, at the
last "=" of a part, blanks around parts stripped: so `{1,2}` and lookaheads work as people mean
them. What no override matches is the planner's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertyard.errors import RuleError
from expertyard.rules.devices import device_name, is_gpu
from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec
from expertyard.spec.gguf import OUTSIDE, layer_tensors

CPU_MOE = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
MAX_LAYERS = 10_000


@dataclass
class Override:
    """One pattern and its device; `hits` counts the tensors that it won."""

    pattern: re.Pattern[str]
    device: str
    why: str
    quiet: bool = False  # made from --n-cpu-moe: layers without experts are no mistake
    hits: int = field(default=0, compare=False)


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins of a list of overrides; "--cpu-moe" and "--n-cpu-moe=N" may stand among them."""
    overrides = parse(value, spec.num_layers)
    layers: dict[int, Pin] = {}
    near: dict[int, Pin] = {}
    experts: dict[int, tuple[Pin, ...]] = {}
    modules: dict[str, Pin] = {}
    split: dict[str, list[int]] = {}
    torn: list[int] = []
    for number in range(spec.num_layers):
        won: dict[str, list[Override | None]] = {}
        for name, part in layer_tensors(spec, number):
            won.setdefault(part, []).append(_first(overrides, name))
        routed = won.pop("experts", [])
        won.pop("expert biases", None)
        if any(routed):
            pin, whole = _together(routed)
            experts[number] = (pin,)
            if not whole:
                torn.append(number)
        home, odd = _home(won)
        if home is not None:
            layers[number] = home
        elif number in experts and is_gpu(experts[number][0].device):
            pin = experts[number][0]
            near[number] = Pin(pin.device, f"{pin.why} (with its experts)")
        for other in odd:
            split.setdefault(other.why, []).append(number)
    outside = {module.part: module.name for module in spec.tree if module.layer is None}
    for name, part in OUTSIDE.items():
        override = _first(overrides, name)
        if override is not None and part in outside:
            modules[outside[part]] = Pin(override.device, override.why)
    return Pins(
        source="-ot",
        layers=layers,
        near=near,
        experts=experts,
        modules=modules,
        devices=tuple(dict.fromkeys(o.device for o in overrides)),
        findings=(*_findings(overrides, spec, torn, split), *_clamped(overrides, spec)),
        needs_gpu=True,
    )


def _first(overrides: list[Override], name: str) -> Override | None:
    for override in overrides:
        if override.pattern.search(name):
            override.hits += 1
            return override
    return None


def _together(won: list[Override | None]) -> tuple[Pin, bool]:
    """One place for the gate, up and down tensors of a layer's experts, and whether all agree.

    An expert is computed in one piece: where overrides tear it apart it goes to the CPU, because
    the GPU that was to have a part of it may not have room for all of it.
    """
    found = [override for override in won if override is not None]
    if len(found) == len(won) and len({o.device for o in found}) == 1:
        return Pin(found[0].device, found[0].why), True
    first = next((o for o in found if o.device == "cpu"), found[0])
    return Pin("cpu", first.why), False


def _home(
    won: dict[str, list[Override | None]],
) -> tuple[Pin | None, list[Override]]:
    """(pin of the layer or None, overrides that want a part of it elsewhere).

    Most tensors of the attention decide; where most are left to the planner, so is the layer.
    """
    named = won.get("attention", [])
    attention = [override for override in named if override]
    rest = [o for part, found in won.items() if part != "attention" for o in found if o]
    home: Pin | None = None
    device = (
        Counter(o.device if o else None for o in named).most_common(1)[0][0] if attention else None
    )
    if device is not None:
        home = Pin(device, next(o.why for o in attention if o.device == device))
    elif not attention and rest and len({o.device for o in rest}) == 1 and is_gpu(rest[0].device):
        home = Pin(rest[0].device, rest[0].why)
    there = home.device if home else ""
    odd = {o.why: o for o in (*attention, *rest) if o.device != there}
    return home, list(odd.values())


def _findings(
    overrides: list[Override], spec: ModelSpec, torn: list[int], split: dict[str, list[int]]
) -> list[Finding]:
    found = []
    for number, override in enumerate(overrides):
        if override.hits or override.quiet:
            continue
        names = [n for i in range(spec.num_layers) for n, _ in layer_tensors(spec, i)]
        names += OUTSIDE
        hits = [name for name in names if override.pattern.search(name)]
        if hits:
            first = next(o for o in overrides[:number] if o.pattern.search(hits[0]))
            text = f"{override.why} never applies: {first.why} comes first. Put it before that."
            found.append(Finding("warning", "shadowed-rule", text))
        else:
            text = (
                f"{override.why} matches no tensor of {spec.name}; names are GGUF's, such as "
                "blk.3.ffn_up_exps.weight."
            )
            found.append(Finding("warning", "dead-rule", text))
    if torn:
        text = (
            f"-ot puts gate, up and down of the experts of layers {format_ids(torn)} on different "
            "devices; an expert stays in one piece, so these are on the CPU."
        )
        found.append(Finding("warning", "split-experts", text))
    for why, layers in split.items():
        text = (
            f"{why} moves parts of layers {format_ids(layers)} away from their attention; a layer "
            "stays together, so only its experts move."
        )
        found.append(Finding("note", "split-layer", text))
    return found


def _clamped(overrides: list[Override], spec: ModelSpec) -> list[Finding]:
    """--n-cpu-moe above the model's layers means all of them."""
    asked = {o.why for o in overrides if o.quiet and int(o.why.split()[-1]) > spec.num_layers}
    said = f"{spec.name} has {spec.num_layers} layers, so all experts are on the CPU."
    return [Finding("note", "clamped", f"{why}: {said}") for why in sorted(asked)]


def parse(value: Any, num_layers: int = MAX_LAYERS) -> list[Override]:
    """Overrides in order. Raises RuleError that quotes the part."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise RuleError(f"-ot: expected 'REGEX=DEVICE,...' or a list of such, got {value!r}.")
    overrides: list[Override] = []
    for item in value:
        word = item.strip()
        if word == "--cpu-moe":
            overrides.append(Override(re.compile(CPU_MOE), "cpu", word))
        elif word.startswith("--n-cpu-moe"):
            overrides += _n_cpu_moe(word.partition("=")[2], num_layers)
        else:
            overrides += [_override(part) for part in split_parts(item)]
    if not overrides:
        raise RuleError("-ot: expected 'REGEX=DEVICE,...', got nothing.")
    return overrides


def _n_cpu_moe(text: str, num_layers: int) -> list[Override]:
    """Blocks 0 to N-1, counted with the dense ones, as llama.cpp does."""
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise RuleError(f"--n-cpu-moe: expected a whole number from 0, got {text!r}.")
    why = f"--n-cpu-moe {int(text)}"
    pattern = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
    number = min(int(text), num_layers)
    made = [Override(re.compile(pattern.format(i)), "cpu", why, quiet=True) for i in range(number)]
    return made or [Override(re.compile(r"(?!)"), "cpu", why, quiet=True)]


def split_parts(text: str) -> list[str]:
    """Parts of one argument: split at commas outside (), [] and {}; a trailing one is harmless."""
    parts, depth, start, escaped = [], 0, 0, False
    for i, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth = max(depth - 1, 0)
        elif char == "," and depth == 0 and ("=" in text[start:i] or not text[start:i].strip()):
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _override(part: str) -> Override:
    pattern, equals, target = part.rpartition("=")
    pattern, target = pattern.strip(), target.strip()
    if not equals or not pattern:
        raise RuleError(f"-ot: expected REGEX=DEVICE, got {part!r}.")
    on_host = re.fullmatch(r"(?i)\w+_host|cpu_\w+", target)  # pinned or repacked, but the CPU's
    device = "cpu" if on_host else device_name(target)
    if device is None:
        raise RuleError(
            f"-ot: {part!r}: {target!r} is no device; expected CPU, CUDA0, CUDA1, ... (cpu, "
            f"cuda:0)."
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RuleError(f"-ot: {pattern!r} is no regular expression: {error}.") from None
    return Override(compiled, device, f"-ot {part}")
