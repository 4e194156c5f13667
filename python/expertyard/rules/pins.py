# SPDX-License-Identifier: Apache-2.0
"""What a placement input comes down to: pins. Every grammar is read into this; the plan obeys it.

A pin says where one thing lives and who said so. Layer pins place attention and hidden states,
expert pins the routed experts of a layer (`ids` None = all of them), module pins what lies outside
the layers. `follow` and `near` pins are weak: experts that go with their layer, and layers that go
with their experts, unless someone says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HOME = "home"  # as a pin's device: the GPU of the layer, whichever the planner makes that


@dataclass(frozen=True)
class Finding:
    """Something worth saying about an input or a plan. severity: error, warning or note."""

    severity: str
    code: str
    message: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file and self.line else ""
        where = where or (f"{self.file}: " if self.file else "")
        return f"{self.severity}: {where}{self.message} [{self.code}]"


@dataclass(frozen=True)
class Pin:
    """One thing's place. Empty op, out_device and format mean: whatever suits the device."""

    device: str
    why: str
    op: str = ""
    prefill_op: str = ""
    prefill_device: str = ""
    out_device: str = ""
    format: str = ""
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pins:
    """All that one input says, its own precedence already applied: nothing here overlaps."""

    source: str
    layers: Mapping[int, Pin] = field(default_factory=dict)
    experts: Mapping[int, tuple[Pin, ...]] = field(default_factory=dict)
    follow: Mapping[int, Pin] = field(default_factory=dict)
    near: Mapping[int, Pin] = field(default_factory=dict)
    modules: Mapping[str, Pin] = field(default_factory=dict)
    formats: Mapping[int, str] = field(default_factory=dict)  # of a layer's routed experts
    devices: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    needs_gpu: bool = (
        False  # what is not pinned belongs on a GPU, so one is assumed without --memory
    )
