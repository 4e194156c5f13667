# SPDX-License-Identifier: Apache-2.0
"""Device names: ours are "cpu" and "cuda:0"; other grammars' spellings become those here."""

from __future__ import annotations

import re

_NUMBERED = re.compile(r"(cuda|gpu|xpu|npu|mps|metal|rocm|hip|vulkan)[:\[]?(\d+)?\]?$")
_OURS = {"gpu": "cuda", "rocm": "cuda", "hip": "cuda", "metal": "mps"}
MAX_ORDINAL = 1023  # above it is a typing mistake, not a machine


def device_name(text: object) -> str | None:
    """'CUDA0', 'cuda[0]', 'cuda', 0 -> 'cuda:0'; 'CPU' -> 'cpu'. None when it names no device."""
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        return f"cuda:{text}" if 0 <= text <= MAX_ORDINAL else None
    if not isinstance(text, str):
        return None
    word = text.strip().lower()
    if word in ("cpu", "host"):
        return "cpu"
    match = _NUMBERED.match(word)
    if match is None or (word.count("[") != word.count("]")):
        return None
    ordinal = int(match[2] or 0)
    return f"{_OURS.get(match[1], match[1])}:{ordinal}" if ordinal <= MAX_ORDINAL else None


def is_gpu(device: str) -> bool:
    return device != "cpu"


def device_order(device: str) -> tuple[bool, str, int]:
    """Sort key: accelerators by kind and ordinal, the CPU last."""
    kind, _, ordinal = device.partition(":")
    return (device == "cpu", kind, int(ordinal or 0))
