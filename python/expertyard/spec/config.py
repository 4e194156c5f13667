# SPDX-License-Identifier: Apache-2.0
"""A ModelSpec from a config.json. The shapes come from the module tree, so that names and bytes
agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertyard.errors import SpecError
from expertyard.spec.arch import Arch, read_arch
from expertyard.spec.families import GENERIC
from expertyard.spec.model import LayerSpec, ModelSpec, Shape
from expertyard.spec.tree import build_tree

MAX_CONFIG_BYTES = 64 << 20


def spec_from_config(config: Mapping[str, Any] | str | Path, name: str | None = None) -> ModelSpec:
    """ModelSpec of a config dict, a config.json, or the folder that has one."""
    if isinstance(config, Mapping):
        where = name or "config"
        values = config
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        values = load_config(path)
        where = str(path)
        name = name or path.resolve().parent.name
    arch = read_arch(values, where)
    return spec_from_arch(arch, name or str(values.get("_name_or_path") or arch.model_type))


def load_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises SpecError for everything that is none."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SpecError(f"{path}: expected a config.json of some kilobytes, got a huge file.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file.") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}).") from None
    except json.JSONDecodeError as error:
        raise SpecError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise SpecError(f"{path}: not a JSON text file.") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected a JSON object, got a {type(values).__name__}.")
    return values


def spec_from_arch(arch: Arch, name: str) -> ModelSpec:
    """The spec of those numbers, shapes collected from the tree."""
    dense: list[list[Shape]] = [[] for _ in range(arch.num_layers)]
    outside: dict[str, tuple[Shape, ...]] = {}
    for module in build_tree(arch):
        if module.layer is not None:
            dense[module.layer].extend(module.shapes)
        elif module.shapes:
            outside[module.part] = outside.get(module.part, ()) + module.shapes
    layers = tuple(
        LayerSpec(
            layer=layer,
            dense=tuple(dense[layer]),
            experts=arch.experts if arch.is_moe[layer] else None,
            kv_elements=arch.layer_state(layer)[0],
            window=arch.layer_state(layer)[1],
        )
        for layer in range(arch.num_layers)
    )
    return ModelSpec(
        name=name,
        model_type=arch.model_type,
        architecture=arch.architecture,
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        num_heads=arch.num_heads,
        layers=layers,
        embedding=outside.get("embedding", ()),
        head=outside.get("head", ()),
        norm=outside.get("norm", ()),
        vision=outside.get("vision", ()),
        tie_word_embeddings=arch.tie_word_embeddings,
        known_family=arch.family is not GENERIC,
        arch=arch,
    )
