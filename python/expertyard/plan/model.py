# SPDX-License-Identifier: Apache-2.0
"""The plan: where every layer and every expert lives, in what format, run by what, and why. Frozen.

It is what every placement input compiles to and what loading obeys. `to_json` and `from_json` are
the documented schema (docs/placement.md); bytes are integers everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from expertyard.errors import PlanError, RuleError
from expertyard.rules.pins import Finding
from expertyard.rules.ranges import format_ids, parse_ids

SCHEMA = 1


@dataclass(frozen=True)
class ExpertGroup:
    """Experts of one layer that share a fate. `out_device` is where their result is wanted.

    prefill_device  where calls of many tokens are computed; "": where prefill_op says
    """

    ids: tuple[int, ...]
    device: str
    format: str
    op: str
    prefill_op: str
    out_device: str
    why: str
    bytes: int = 0
    prefill_device: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: `device` has its attention, everything dense, and the hidden states."""

    layer: int
    device: str
    dense_format: str
    why: str
    experts: tuple[ExpertGroup, ...] | None = None  # None: a dense layer
    bytes: int = 0  # of the dense part and its KV cache

    def expert_group(self, expert: int) -> ExpertGroup:
        """The group that holds this expert."""
        for group in self.experts or ():
            if expert in group.ids:
                return group
        raise PlanError(f"layer {self.layer}: the plan has no expert {expert}.")


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of one device by kind. `capacity` 0: nobody said how much there is."""

    capacity: int = 0
    weights: int = 0  # dense parts, embeddings, biases
    experts: int = 0  # routed experts' matrices
    kv: int = 0
    workspace: int = 0
    reserved: int = 0
    free: int = 0
    read_per_token: int = 0  # bytes read for one decoded token at full context, on average
    bandwidth: int = 0  # bytes/s that the estimate of tokens/s uses

    @property
    def used(self) -> int:
        return self.weights + self.experts + self.kv + self.workspace


@dataclass(frozen=True)
class Plan:
    """A whole placement. `transfers`: layer -> device that hidden states move to before it."""

    model: str
    num_layers: int
    layers: tuple[LayerPlan, ...]
    transfers: Mapping[int, str]
    devices: Mapping[str, DeviceUse]
    findings: tuple[Finding, ...] = ()
    modules: Mapping[str, str] = field(
        default_factory=dict
    )  # what lies outside the layers -> device

    @property
    def seconds_per_token(self) -> float:
        """Time to read what one decoded token needs, device after device; 0 if bandwidths are
        unknown.
        """
        return sum(
            use.read_per_token / use.bandwidth for use in self.devices.values() if use.bandwidth
        )

    def check(self) -> Plan:
        """Itself; raises RuleError if a finding is an error. What runs a plan calls this first."""
        errors = [str(finding) for finding in self.findings if finding.severity == "error"]
        if errors:
            raise RuleError("\n".join(errors))
        return self

    def to_json(self) -> dict[str, Any]:
        """The schema of docs/placement.md, as plain dicts and lists."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "num_layers": self.num_layers,
            "layers": [_layer_to_json(layer) for layer in self.layers],
            "transfers": {str(layer): device for layer, device in self.transfers.items()},
            "devices": {name: _flat(use) for name, use in self.devices.items()},
            "modules": dict(self.modules),
            "findings": [_flat(finding) for finding in self.findings],
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan of a dict in that schema. Raises PlanError that names the key that is wrong."""
        return _Loader("plan").plan(data)

    def save(self, path: str | Path) -> None:
        """Writes the JSON. Raises PlanError when the file cannot be written."""
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path}: cannot be written ({error.strerror}).") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan of a file that `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error.strerror}).") from None
        except (ValueError, RecursionError):
            raise PlanError(f"{path}: not JSON.") from None
        return _Loader(str(path)).plan(data)

    def table(self) -> Any:
        """The plan as a rich renderable."""
        from expertyard.plan.table import render

        return render(self)


def _flat(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    data = _flat(layer)
    if layer.experts is None:
        del data["experts"]
    else:
        data["experts"] = [{**_flat(g), "ids": format_ids(g.ids)} for g in layer.experts]
        for group in data["experts"]:
            if not group["prefill_device"]:
                del group["prefill_device"]
    return data


class _Loader:
    """Reads the schema back; every complaint names the place."""

    def __init__(self, source: str) -> None:
        self.source = source

    def plan(self, data: Any) -> Plan:
        top = self.mapping(data, "the plan")
        if top.get("schema") != SCHEMA:
            raise PlanError(f"{self.source}: schema: expected {SCHEMA}, got {top.get('schema')!r}.")
        layers = tuple(self.layer(item, i) for i, item in enumerate(self.items(top, "layers")))
        num_layers = self.get(top, "num_layers", int, "the plan")
        if len(layers) != num_layers:
            raise PlanError(
                f"{self.source}: num_layers is {num_layers}, but {len(layers)} layers are there."
            )
        transfers = self.mapping(top.get("transfers", {}), "transfers")
        devices = self.mapping(top.get("devices", {}), "devices")
        try:
            moves = {int(layer): str(device) for layer, device in transfers.items()}
        except ValueError:
            raise PlanError(f"{self.source}: transfers: expected layer numbers as keys.") from None
        return Plan(
            model=self.get(top, "model", str, "the plan"),
            num_layers=num_layers,
            layers=layers,
            transfers=moves,
            devices={
                name: self.flat(DeviceUse, self.mapping(use, f"devices.{name}"), f"devices.{name}")
                for name, use in devices.items()
            },
            findings=tuple(
                self.flat(Finding, self.mapping(item, "findings"), "findings")
                for item in self.items(top, "findings", optional=True)
            ),
            modules={
                str(k): str(v) for k, v in self.mapping(top.get("modules", {}), "modules").items()
            },
        )

    def layer(self, item: Any, number: int) -> LayerPlan:
        where = f"layers[{number}]"
        data = self.mapping(item, where)
        if data.get("layer") != number:
            raise PlanError(
                f"{self.source}: {where}: layer: expected {number}, got {data.get('layer')!r}."
            )
        experts = None
        if data.get("experts") is not None:
            experts = tuple(self.group(group, where) for group in self.items(data, "experts"))
        return LayerPlan(
            layer=number,
            device=self.get(data, "device", str, where),
            dense_format=self.get(data, "dense_format", str, where),
            why=self.get(data, "why", str, where),
            experts=experts,
            bytes=self.get(data, "bytes", int, where) if "bytes" in data else 0,
        )

    def group(self, item: Any, where: str) -> ExpertGroup:
        data = dict(self.mapping(item, f"{where}.experts"))
        try:
            data["ids"] = parse_ids(
                self.get(data, "ids", str, f"{where}.experts"), f"{where}.experts.ids"
            )
        except RuleError as error:
            raise PlanError(f"{self.source}: {error}") from None
        group: ExpertGroup = self.flat(ExpertGroup, data, f"{where}.experts")
        return group

    def flat(self, cls: Any, data: Mapping[str, Any], where: str) -> Any:
        values = {}
        for f in fields(cls):
            if f.name in data:
                kind = {"int": int, "str": str}.get(str(f.type))
                values[f.name] = self.get(data, f.name, kind, where) if kind else data[f.name]
        try:
            return cls(**values)
        except TypeError:
            missing = [f.name for f in fields(cls) if f.name not in values]
            raise PlanError(f"{self.source}: {where}: {', '.join(missing)} missing.") from None

    def get(self, data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
        value = data.get(key)
        if type(value) is not kind:
            raise PlanError(
                f"{self.source}: {where}: {key}: expected {kind.__name__}, got {value!r}."
            )
        return value

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise PlanError(
                f"{self.source}: {where}: expected an object, got {type(value).__name__}."
            )
        return value

    def items(self, data: Mapping[str, Any], key: str, optional: bool = False) -> list[Any]:
        value = data.get(key, [] if optional else None)
        if not isinstance(value, list):
            raise PlanError(f"{self.source}: {key}: expected a list, got {type(value).__name__}.")
        return value
