# SPDX-License-Identifier: Apache-2.0
"""accelerate's device_map: module names to devices; the most specific name wins.

A dict, a JSON file of one, or "auto" (nothing is pinned; `memory` is accelerate's max_memory).
"" is the whole model. A layer takes its experts along unless a longer name places them. Here "cpu"
means computed on the CPU, not only stored there; "disk" is the CPU with the checkpoint mapped.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertyard.errors import RuleError
from expertyard.rules.devices import device_name
from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.rules.ranges import format_ids
from expertyard.spec import ModelSpec, Module
from expertyard.spec.tree import expert_names

FLAG = "--device-map"
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def read(value: Any, spec: ModelSpec) -> Pins:
    """Pins of a device map. Raises RuleError for values that are no devices and for uncovered
    parts.
    """
    if isinstance(value, str) and value in AUTOMATIC:
        findings = () if value == "auto" else (_same_as_auto(value),)
        return Pins(source=f"{FLAG} {value}", findings=findings, needs_gpu=True)
    table, name = _table(value)
    if isinstance(table, str):
        return read(table, spec)
    places = {str(key): _place(key, target, name) for key, target in table.items()}
    if not places:
        raise RuleError(f"{name}: expected names and devices, got nothing.")
    return _Map(places, name, spec).pins()


def _same_as_auto(value: str) -> Finding:
    text = f"{FLAG} {value}: planned as auto: dense parts first, then experts by value."
    return Finding("note", "foreign-rule", text)


def _table(value: Any) -> tuple[Any, str]:
    """(mapping or 'auto', name for messages)."""
    if isinstance(value, Mapping):
        return value, FLAG
    value = _word(value)
    single = device_name(value) if isinstance(value, int | str) else None
    if single is not None and not (isinstance(value, str) and Path(value).is_file()):
        return {"": single}, FLAG
    if not isinstance(value, str | Path):
        raise RuleError(f"{FLAG}: expected a dict, a JSON file, a device or auto; got {value!r}.")
    path = Path(value)
    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        near = difflib.get_close_matches(str(value), AUTOMATIC, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RuleError(f"{FLAG} {path}: no such file.{hint}") from None
    except OSError as error:
        raise RuleError(f"{path}: cannot be read ({error.strerror}).") from None
    except RuleError as error:
        raise RuleError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise RuleError(f"{path}: not JSON.") from None
    if not isinstance(table, dict) and table not in AUTOMATIC:
        raise RuleError(f"{path}: expected an object of module names and devices.")
    return table, str(path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise RuleError(f"{key!r} is given twice.")
        table[key] = value
    return table


def _word(target: Any) -> Any:
    """A torch.device as text; it is not imported for that."""
    return str(target) if type(target).__name__ == "device" else target


def _place(key: Any, target: Any, name: str) -> str:
    if not isinstance(key, str):
        raise RuleError(f"{name}: expected module names as keys, got {key!r}.")
    target = _word(target)
    if isinstance(target, str) and target.strip().isdecimal():
        target = int(target.strip())
    device = "cpu" if target == "disk" else device_name(target)
    if device is None:
        raise RuleError(
            f"{name}: {key!r}: expected a device such as 0, cuda:0 or cpu, got {target!r}."
        )
    return device


class _Map:
    """One device map against one model."""

    def __init__(self, places: dict[str, str], name: str, spec: ModelSpec) -> None:
        self.places = places
        self.name = name
        self.spec = spec
        self.used: set[str] = set()
        self.torn: set[int] = set()  # layers with experts whose parts are on several devices

    def find(self, names: tuple[str, ...]) -> str | None:
        """The longest key that is one of the names or a parent of one."""
        best: str | None = None
        for name in names:
            while True:
                if name in self.places and (best is None or len(name) > len(best)):
                    best = name
                if not name:
                    break
                name = name.rpartition(".")[0]
        if best is not None:
            self.used.add(best)
        return best

    def pin(self, key: str) -> Pin:
        return Pin(self.places[key], f"{Path(self.name).name} {key!r}")

    def pins(self) -> Pins:
        layers: dict[int, Pin] = {}
        follow: dict[int, Pin] = {}
        experts: dict[int, tuple[Pin, ...]] = {}
        modules: dict[str, Pin] = {}
        uncovered: list[str] = []
        split: dict[str, list[int]] = {}
        for module in self.spec.tree:
            if module.part == "experts" and module.layer is not None:
                self.experts(module, follow, experts, uncovered)
                continue
            if not module.shapes:
                continue
            key = self.find(tuple(f"{name}.weight" for name in module.names))
            if key is None:
                uncovered.append(module.name)
            elif module.layer is None:
                modules[module.name] = self.pin(key)
            elif module.part == "attention":
                layers.setdefault(module.layer, self.pin(key))
            home = layers.get(module.layer) if module.layer is not None else None
            if key is not None and home is not None and self.places[key] != home.device:
                split.setdefault(key, []).append(module.layer or 0)
        if uncovered:
            more = f" and {len(uncovered) - 1} more" if len(uncovered) > 1 else ""
            raise RuleError(
                f"{self.name}: no device for {uncovered[0]}{more}. Add it, or '' for all the rest."
            )
        return Pins(
            source=f"{FLAG} {self.name}",
            layers=layers,
            follow=follow,
            experts=experts,
            modules=modules,
            devices=tuple(dict.fromkeys(self.places.values())),
            findings=tuple(self.findings(split)),
        )

    def experts(
        self,
        module: Module,
        follow: dict[int, Pin],
        pinned: dict[int, tuple[Pin, ...]],
        uncovered: list[str],
    ) -> None:
        """Experts by the longest name: single ones, all of a layer, or along with the layer."""
        assert module.layer is not None
        shape = self.spec.layers[module.layer].experts
        number = shape.num_experts if shape else 0
        fused = [[f"{n}.{part}" for n in module.names] for part in ("gate_up_proj", "down_proj")]
        key = self.together(fused, module.layer)
        below = tuple(f"{name}." for name in module.names)
        single: dict[str, list[int]] = {}
        if any(k.startswith(below) and k[k.rindex("experts.") + 8 :][:1].isdecimal()
               for k in self.places):  # fmt: skip
            for expert in range(number):
                own = self.together(self.parts(module, expert), module.layer)
                if own is not None and own != key:
                    single.setdefault(own, []).append(expert)
        groups = [replace(self.pin(k), ids=tuple(ids)) for k, ids in single.items()]
        covered = sum(map(len, single.values()))
        if key is None and covered < number:
            uncovered.append(module.name)
        elif key is not None and key.startswith(module.names):
            groups.append(self.pin(key))
        elif key is not None:
            follow[module.layer] = self.pin(key)
        if groups:
            pinned[module.layer] = tuple(groups)

    def parts(self, module: Module, expert: int) -> list[list[str]]:
        """Names of one expert's three projections."""
        assert self.spec.arch is not None
        names = expert_names(module, expert)
        return [[f"{name}.{part}" for name in names] for part in self.spec.arch.family.projections]

    def together(self, parts: list[list[str]], layer: int) -> str | None:
        """The key that places all parts of an expert. Where they are torn apart, one that says
        CPU, else the first.
        """
        keys = [self.find(tuple(names)) for names in parts]
        named = [key for key in keys if key is not None]
        if not named:
            return None
        if len({self.places[key] for key in named}) > 1:
            self.torn.add(layer)
        return next((key for key in named if self.places[key] == "cpu"), max(named, key=len))

    def findings(self, split: dict[str, list[int]]) -> list[Finding]:
        found = []
        names = [name for module in self.spec.tree for name in module.names]
        known = set(names)
        for key in self.places:
            if key in self.used:
                continue
            if key in known or any(name.startswith(f"{key}.") for name in known):
                continue  # a parent whose children all have names of their own, or no weights
            near = difflib.get_close_matches(key, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            text = f"{key!r} is no module of {self.spec.name}.{hint}"
            found.append(Finding("warning", "unknown-key", text, self.name))
        if self.torn:
            text = (
                f"parts of experts of layers {format_ids(self.torn)} are on several devices; an "
                "expert stays in one piece, on the CPU if a part of it is there."
            )
            found.append(Finding("warning", "split-experts", text, self.name))
        for key, layers in split.items():
            text = (
                f"{key!r} moves parts of layers {format_ids(layers)} away from their attention; a "
                "layer stays together, so only its experts move."
            )
            found.append(Finding("note", "split-layer", text, self.name))
        return found
