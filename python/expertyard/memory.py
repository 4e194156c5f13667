# SPDX-License-Identifier: Apache-2.0
"""Memory: sizes as people write them, and what a model needs besides its weights.

What is counted, in bytes, for `context` tokens and `batch` sequences:
  KV cache   batch x min(context, window) x kv_elements x 2, per layer, on the layer's device
  workspace  of each device that computes, for a prefill chunk of C = batch x min(context, 1024)
             tokens: hidden states and projections of one layer (8 x C x H x 2), the experts'
             intermediates (top_k x (3I + H) x 4 for at most 256 tokens at a time), and where the
             head is one row of logits a sequence (batch x vocab x 4)
  reserve    per GPU, for context and fragmentation: max(2 %, 512 MiB), or what the user says
The weights themselves are the spec's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from expertyard.errors import ConfigError
from expertyard.rules.devices import device_name, device_order, is_gpu
from expertyard.spec import ModelSpec

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNLIMITED = 1 << 60  # "large enough": more than any machine has
PREFILL_CHUNK = 1024
EXPERT_SLICE = 256
RESERVE_SHARE = 0.02
RESERVE_LEAST = 512 * MiB
BANDWIDTH = {"cpu": 60e9, "gpu": 900e9}  # bytes/s assumed where the user gives none

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB, "k": KiB, "m": MiB, "g": GiB, "t": TiB,
}  # fmt: skip


def parse_size(text: object, what: str = "size") -> int:
    """'24GiB' -> bytes. GiB and G are powers of two, GB of ten; a bare number is bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        size = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None or isinstance(text, bool):
            raise ConfigError(
                f"{what}: expected a size such as 24GiB, 500MB or bytes; got {text!r}."
            )
        size = float(match[1]) * unit
    if not 0 <= size < UNLIMITED:
        raise ConfigError(f"{what}: expected a size from 0 to 1 EiB, got {text!r}.")
    return int(size)


def parse_memory(value: Mapping[Any, Any] | str) -> dict[str, int]:
    """'cuda:0=24GiB,cpu=128GiB' or a mapping -> {"cuda:0": bytes, "cpu": bytes}, GPUs first."""
    if isinstance(value, str):
        pairs: list[tuple[Any, Any]] = []
        for part in value.split(","):
            name, equals, size = part.partition("=")
            if not equals:
                raise ConfigError(
                    f"memory: expected DEVICE=SIZE such as cuda:0=24GiB,cpu=128GiB; got {part!r}."
                )
            pairs.append((name, size))
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ConfigError(f"memory: expected text or a mapping of device to size, got {value!r}.")
    memory: dict[str, int] = {}
    for name, size in pairs:
        device = device_name(
            int(name.strip()) if isinstance(name, str) and name.strip().isdecimal() else name
        )
        if device is None:
            raise ConfigError(f"memory: expected a device such as cuda:0 or cpu, got {name!r}.")
        if device in memory:
            raise ConfigError(f"memory: {device} is given twice.")
        memory[device] = parse_size(size, f"memory of {device}")
    if not memory:
        raise ConfigError("memory: expected at least one device, got none.")
    return {device: memory[device] for device in sorted(memory, key=device_order)}


def parse_reserve(value: Any, devices: tuple[str, ...]) -> dict[str, int]:
    """`mb_resrv_per_gpu`, MiB per GPU: a number for all, a list in GPU order, or {ordinal: MiB}."""
    gpus = [device for device in devices if is_gpu(device)]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        if any("=" in part for part in parts):
            value = dict(part.partition("=")[::2] for part in parts)
        else:
            value = parts if len(parts) > 1 else parts[0]
    if isinstance(value, Mapping):
        reserve: dict[str, int] = {}
        for key, amount in value.items():
            number = int(key.strip()) if isinstance(key, str) and key.strip().isdecimal() else key
            device = device_name(number)
            if device not in gpus:
                raise ConfigError(
                    f"mb_resrv_per_gpu: {key!r} is none of the GPUs ({', '.join(gpus) or 'none'})."
                )
            reserve[device] = _mib(amount)
        return reserve
    if isinstance(value, list | tuple):
        if len(value) > len(gpus):
            raise ConfigError(f"mb_resrv_per_gpu: got {len(value)} numbers for {len(gpus)} GPUs.")
        return {device: _mib(amount) for device, amount in zip(gpus, value, strict=False)}
    return dict.fromkeys(gpus, _mib(value))


def _mib(amount: Any) -> int:
    text = str(amount).strip()
    if isinstance(amount, bool) or re.fullmatch(r"\d{1,9}", text) is None:
        raise ConfigError(f"mb_resrv_per_gpu: expected MiB as a whole number, got {amount!r}.")
    return int(text) * MiB


def default_reserve(capacity: int) -> int:
    """What is kept free on a GPU when nobody says: max(2 %, 512 MiB), as mistral.rs does."""
    return min(capacity, max(math.ceil(capacity * RESERVE_SHARE), RESERVE_LEAST))


def workspace_bytes(spec: ModelSpec, context: int, batch: int, top: bool) -> int:
    """Workspace of a device that computes some of the model; `top`: the head is there too."""
    tokens = batch * min(context, PREFILL_CHUNK)
    total = 8 * tokens * spec.hidden_size * 2
    widest = 0
    for layer in spec.layers:
        if layer.experts is not None:
            e = layer.experts
            widest = max(widest, e.top_k * (3 * e.intermediate_size + e.hidden_size))
    total += min(tokens, EXPERT_SLICE) * widest * 4
    if top:
        total += batch * spec.vocab_size * 4
    return total


def default_bandwidth(device: str) -> float:
    """Assumed read bandwidth in bytes/s: of a mid-range GPU, and of two-channel DDR5."""
    return BANDWIDTH["gpu"] if is_gpu(device) else BANDWIDTH["cpu"]
