# SPDX-License-Identifier: Apache-2.0
"""Placement inputs. One file a grammar; each has `read(value, spec) -> Pins` and its own
precedence.

Adding one: a file here with that function, a line in GRAMMARS, a field of the same name in
plan.Request. Nothing else knows the grammars.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from expertyard.rules.pins import Finding, Pin, Pins
from expertyard.spec import ModelSpec

__all__ = ["GRAMMARS", "Finding", "Pin", "Pins", "read_pins"]

# field of Request -> the file here that reads it
GRAMMARS = {
    "plan": "saved_plan",
    "rules": "kt",
    "layers": "ord_num",
    "topology": "topology",
    "override_tensor": "override_tensor",
    "device_map": "device_map",
    "gpu_experts": "gpu_experts",
}


def read_pins(field: str, value: Any, spec: ModelSpec) -> Pins:
    """Reads one input. Raises RuleError (file, line, rule) for what is wrong with it."""
    module = import_module(f"expertyard.rules.{GRAMMARS[field]}")
    pins = module.read(value, spec)
    assert isinstance(pins, Pins)
    return pins
