# SPDX-License-Identifier: Apache-2.0
"""What the user asks for: one field per flag of `expertyard plan`, and per keyword of
ExpertsConfig.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from expertyard.errors import ConfigError
from expertyard.formats import get_format
from expertyard.memory import parse_memory, parse_size
from expertyard.rules import GRAMMARS
from expertyard.rules.devices import device_name
from expertyard.rules.gpu_experts import Choice, check_strategy

if TYPE_CHECKING:
    from expertyard.rules.profile import Profile

MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class Request:
    """A placement request. Everything optional; several inputs together must not contradict.

    plan              a plan that was saved: the file's path, or its JSON as a dict
    rules             KTransformers rules: a file's path, YAML text, or the list itself
    layers            "0:16;1:16", ["0:16", "1:16"], 16 or "16"
    topology          mistral.rs' topology: a file's path, YAML text, or a dict
    override_tensor   llama.cpp's -ot: "REGEX=DEVICE,...", or a list of such
    cpu_moe           all routed experts on the CPU;  n_cpu_moe: those of the first N layers
    device_map        accelerate's: a dict, a JSON file's path, or "auto"
    gpu_experts       per MoE layer: 8, 0.25, "0-7,12", [0, 1], or {layer: ...}; the rest on the CPU
    strategy          which experts go first: uniform, frequency, front, back, trace; None:
                      uniform, but frequency where the planner chooses and a profile is given
    profile           popularity of experts, or a routing trace: a file's path or the data
    memory            {"cuda:0": "22GiB", "cpu": "100GiB"} or the same as text: what may be used
    mb_resrv_per_gpu  MiB kept free per GPU: 512, [512, 1024], {0: 512}
    format            weight format of the routed experts: bf16, int8, int4-g32-asym ...
    dense_format      of everything else
    context, batch    tokens and sequences that the KV cache must hold
    bandwidth         bytes/s that a device reads: {"cuda:0": 900e9, "cpu": "60GB"}
    priority          devices in the order in which they are filled: ["cuda:1", "cuda:0"]
    """

    rules: Any = None
    layers: Any = None
    topology: Any = None
    override_tensor: Any = None
    cpu_moe: bool = False
    n_cpu_moe: int | str | None = None
    device_map: Any = None
    gpu_experts: Any = None
    strategy: str | None = None
    profile: Any = None
    plan: Any = None
    memory: Mapping[Any, Any] | str | None = None
    mb_resrv_per_gpu: Any = None
    format: str = "bf16"
    dense_format: str = "bf16"
    context: int = 4096
    batch: int = 1
    bandwidth: Mapping[Any, Any] | str | None = None
    priority: Any = None

    def __post_init__(self) -> None:
        for name in ("format", "dense_format"):  # "int4-g128" is "int4"
            object.__setattr__(self, name, get_format(getattr(self, name)).name)
        check_strategy(self.strategy or "uniform", self.profile)
        if not isinstance(self.cpu_moe, bool):
            raise ConfigError(f"cpu_moe: expected True or False, got {self.cpu_moe!r}.")
        for name in ("context", "batch"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_CONTEXT:
                raise ConfigError(f"{name}: expected a whole number from 1, got {value!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """From keywords; an unknown one is a ConfigError with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                raise ConfigError(f"unknown option {key!r}.{hint}")
        return cls(**values)

    def inputs(self, profile: Profile | None = None) -> dict[str, Any]:
        """The placement inputs that are given, by field, as their grammars take them."""
        given = {field: getattr(self, field) for field in GRAMMARS}
        given = {field: value for field, value in given.items() if value is not None}
        overrides = self.overrides()
        if overrides is not None:
            given["override_tensor"] = overrides
        if "gpu_experts" in given:
            given["gpu_experts"] = Choice(self.gpu_experts, self.strategy or "uniform", profile)
        return given

    def overrides(self) -> Any:
        """-ot with --cpu-moe and --n-cpu-moe after it, as llama.cpp adds them."""
        added = ["--cpu-moe"] if self.cpu_moe else []
        if self.n_cpu_moe is not None:
            added.append(f"--n-cpu-moe={self.n_cpu_moe}")
        if not added or not isinstance(self.override_tensor, str | list | tuple | None):
            return self.override_tensor
        own = self.override_tensor
        return [*([own] if isinstance(own, str) else own or []), *added]

    def memory_bytes(self) -> dict[str, int] | None:
        return None if self.memory is None else parse_memory(self.memory)

    def bandwidths(self) -> dict[str, float]:
        """Bytes/s per device, as far as given."""
        if self.bandwidth is None:
            return {}
        pairs: list[tuple[Any, Any]]
        if isinstance(self.bandwidth, str):
            pairs = [tuple(part.partition("=")[::2]) for part in self.bandwidth.split(",")]  # type: ignore[misc]
        elif isinstance(self.bandwidth, Mapping):
            pairs = list(self.bandwidth.items())
        else:
            raise ConfigError(f"bandwidth: expected a mapping or text, got {self.bandwidth!r}.")
        found: dict[str, float] = {}
        for name, speed in pairs:
            device = device_name(name)
            if device is None:
                raise ConfigError(f"bandwidth: expected a device such as cuda:0, got {name!r}.")
            if isinstance(speed, str):
                speed = parse_size(speed.removesuffix("/s"), f"bandwidth of {device}")
            if (
                isinstance(speed, bool)
                or not isinstance(speed, int | float)
                or not 0 < speed < 1e18
            ):
                raise ConfigError(
                    f"bandwidth of {device}: expected bytes/s above 0, got {speed!r}."
                )
            found[device] = float(speed)
        return found

    def priorities(self) -> tuple[str, ...]:
        """Devices to fill first, in that order."""
        if self.priority is None:
            return ()
        names = self.priority.split(",") if isinstance(self.priority, str) else self.priority
        if not isinstance(names, list | tuple):
            raise ConfigError(f"priority: expected a list of devices, got {names!r}.")
        devices = [device_name(name) for name in names]
        if None in devices:
            wrong = names[devices.index(None)]
            raise ConfigError(f"priority: expected devices such as cuda:1,cuda:0; got {wrong!r}.")
        return tuple(device for device in devices if device is not None)
