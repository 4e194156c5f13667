# SPDX-License-Identifier: Apache-2.0
"""Device names: ours are "cpu" and "cuda:0"; other grammars' spellings become those here."""

from __future__ import annotations

import re

_NUMBERED = re.compile(r"(cuda|gpu|xpu|npu|mps|metal|rocm|hip|vulkan)[:\[]?(\d+)?\]?$")
_OURS = {"gpu": "cuda", "rocm": "cuda", "hip": "cuda", "metal": "mps"}
MAX_ORDINAL = 1023  # above it is a typing mistake, not a machine


def device_name(text: object) -> str | None:
    """'CUDA0', 'cuda[0]', 'cuda', 0 -> 'cuda:0'; 'CPU' -> 'cpu'; 'rank1/cuda' -> 'rank1/cuda:0'.

    None when it names no device.
    """
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        return f"cuda:{text}" if 0 <= text <= MAX_ORDINAL else None
    if not isinstance(text, str):
        return None
    word = text.strip().lower()
    rank, slash, local = word.partition("/")
    if slash:  # a device of another process: rank1/cpu, rank1/cuda:0
        known = device_name(local) if re.fullmatch(r"rank\d{1,4}", rank) else None
        return f"rank{int(rank[4:])}/{known}" if known else None
    if word in ("cpu", "host"):
        return "cpu"
    match = _NUMBERED.match(word)
    if match is None or (word.count("[") != word.count("]")):
        return None
    ordinal = int(match[2] or 0)
    return f"{_OURS.get(match[1], match[1])}:{ordinal}" if ordinal <= MAX_ORDINAL else None


def is_gpu(device: str) -> bool:
    """Whether it is a GPU of this process."""
    return device != "cpu" and not is_remote(device)


def is_remote(device: str) -> bool:
    """Whether it belongs to a process that the plan names: rank1/cpu, rank1/cuda:0."""
    return "/" in device


def local_kind(device: str) -> str:
    """'rank1/cuda:0' -> 'cuda'."""
    return device.rpartition("/")[2].partition(":")[0]


def device_order(device: str) -> tuple[bool, str, int]:
    """Sort key: accelerators by kind and ordinal, the CPU last."""
    kind, _, ordinal = device.partition(":")
    return (device == "cpu" or is_remote(device), kind, int(ordinal or 0))
