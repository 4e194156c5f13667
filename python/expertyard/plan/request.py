# SPDX-License-Identifier: Apache-2.0
"""What the user asks for: one field per flag of `expertyard plan`, and per keyword of
ExpertsConfig.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from expertyard.errors import ConfigError
from expertyard.formats import get_format
from expertyard.memory import parse_memory, parse_size
from expertyard.rules import GRAMMARS
from expertyard.rules.devices import device_name

MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class Request:
    """A placement request. Everything optional; several inputs together must not contradict.

    rules             KTransformers rules: a file's path, YAML text, or the list itself
    layers            "0:16;1:16", ["0:16", "1:16"], 16 or "16"
    memory            {"cuda:0": "22GiB", "cpu": "100GiB"} or the same as text: what may be used
    mb_resrv_per_gpu  MiB kept free per GPU: 512, [512, 1024], {0: 512}
    format            weight format of the routed experts
    dense_format      of everything else
    context, batch    tokens and sequences that the KV cache must hold
    bandwidth         bytes/s that a device reads: {"cuda:0": 900e9, "cpu": "60GB"}
    priority          devices in the order in which they are filled: ["cuda:1", "cuda:0"]
    """

    rules: Any = None
    layers: Any = None
    memory: Mapping[Any, Any] | str | None = None
    mb_resrv_per_gpu: Any = None
    format: str = "bf16"
    dense_format: str = "bf16"
    context: int = 4096
    batch: int = 1
    bandwidth: Mapping[Any, Any] | str | None = None
    priority: Any = None

    def __post_init__(self) -> None:
        get_format(self.format)
        get_format(self.dense_format)
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

    def inputs(self) -> dict[str, Any]:
        """The placement inputs that are given, by field."""
        given = {field: getattr(self, field, None) for field in GRAMMARS}
        return {
            field: value
            for field, value in given.items()
            if value is not None and value is not False
        }

    def memory_bytes(self) -> dict[str, int] | None:
        return None if self.memory is None else parse_memory(self.memory)

    def bandwidths(self) -> dict[str, float]:
        """Bytes/s per device, as far as given."""
        if self.bandwidth is None:
            return {}
        pairs: list[tuple[Any, Any]]
        if isinstance(self.bandwidth, str):
            pairs = [tuple(part.partition("=")[::2]) for part in self.bandwidth.split(",")]  # type: ignore[misc]
        else:
            pairs = list(self.bandwidth.items())
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
        names = self.priority.split(",") if isinstance(self.priority, str) else list(self.priority)
        devices = [device_name(name) for name in names]
        if None in devices:
            wrong = names[devices.index(None)]
            raise ConfigError(f"priority: expected devices such as cuda:1,cuda:0; got {wrong!r}.")
        return tuple(device for device in devices if device is not None)
