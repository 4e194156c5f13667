# SPDX-License-Identifier: Apache-2.0
"""Short questions to a plan, for the tests of placement inputs."""

from typing import Any

from expertyard import ModelSpec, Request, make_plan
from expertyard.plan import Plan


def plan(model: str, **request: Any) -> Plan:
    return make_plan(ModelSpec.from_family(model), Request(**request))


def homes(made: Plan) -> list[str]:
    """Device of each layer."""
    return [layer.device for layer in made.layers]


def experts(made: Plan, layer: int) -> dict[str, list[int]]:
    """Device -> expert ids of one layer."""
    found: dict[str, list[int]] = {}
    for group in made.layers[layer].experts or ():
        found.setdefault(group.device, []).extend(group.ids)
    return {device: sorted(ids) for device, ids in found.items()}


def whole(made: Plan, layer: int) -> str:
    """The one device of a layer's experts."""
    (device,) = experts(made, layer)
    return device


def codes(made: Plan, *severities: str) -> list[str]:
    """Codes of the findings, all or of those severities."""
    return [f.code for f in made.findings if not severities or f.severity in severities]
