# SPDX-License-Identifier: Apache-2.0
"""The TARGET of `expertyard plan`: a known name, a config.json, a folder, a GGUF file.

A name, a config and a folder of plain weights need no PyTorch and take no time. What is quantised
is opened as loading would open it, so that the plan has the formats that experts will keep.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expertyard.errors import KernelError, LoadError
from expertyard.spec import resolve_target
from expertyard.spec.headers import MANIFEST
from expertyard.spec.model import ModelSpec

if TYPE_CHECKING:
    from expertyard.hf.own import Own

__all__ = ["Target", "open_target"]

_PLAIN = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Target:
    """own: what it keeps of its own; None for a model without quantised weights on the disk."""

    spec: ModelSpec
    own: Own | None = None


def open_target(target: str) -> Target:
    """Raises SpecError, LoadError or KernelError."""
    path = Path(target)
    if path.suffix == ".gguf" and os.path.isfile(target):  # False for what can be no path at all
        return _opened(path)
    if os.path.isfile(path / MANIFEST):
        return _opened(path)
    spec = resolve_target(target)
    if not os.path.isdir(target) or not _is_quantised(path, spec):
        return Target(spec)
    try:
        return _opened(path)
    except (LoadError, KernelError) as error:
        print(
            f"{target}: planned by its files' headers, because it cannot be opened as it would be "
            f"loaded: {error}",
            file=sys.stderr,
        )
        return Target(spec)


def _opened(path: Path) -> Target:
    from expertyard.cli.run import import_hf, starting

    with starting():
        import_hf(verbose=False)
        from expertyard.hf.own import own_of
    return Target(*own_of(path))


def _is_quantised(folder: Path, spec: ModelSpec) -> bool:
    for layer in spec.layers:
        for stored in (layer.stored_dense, layer.stored_experts):
            if stored is not None and stored.format not in _PLAIN:
                return True
    if not any(layer.stored_dense or layer.stored_experts for layer in spec.layers):
        return False  # a folder without weights
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("quantization_config")) or (folder / "quantize_config.json").is_file()
