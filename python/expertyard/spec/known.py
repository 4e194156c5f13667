# SPDX-License-Identifier: Apache-2.0
"""Published models by name, from known_models.json: planning needs no file of the model.

A name is found whatever its case, owner ("Qwen/..."), punctuation, or trailing edition words.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from expertyard.errors import SpecError
from expertyard.spec.model import ModelSpec

# words after a model's name that do not change its shape
_EDITIONS = (
    "instruct|chat|base|it|thinking|hf|fp8|bf16|int4|int8|awq|gptq|gguf|mxfp4|"
    r"v0\.1|v0\.3|\d{4}|\d{6}|lite-chat|zero|text"
)


@cache
def _load() -> dict[str, dict[str, Any]]:
    data = json.loads(Path(__file__).with_name("known_models.json").read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


@cache
def _names() -> dict[str, str]:
    """Normalised name or alias -> the name."""
    names: dict[str, str] = {}
    for name, entry in _load().items():
        for alias in (name, *entry.get("aliases", ())):
            names[_key(alias)] = name
    return names


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def known_models() -> tuple[str, ...]:
    """Names of every model that from_family knows."""
    return tuple(_load())


def spec_from_family(name: str) -> ModelSpec:
    """The spec of a published model. Raises SpecError with the nearest known names."""
    found = next((_names()[_key(n)] for n in _shorter(name) if _key(n) in _names()), None)
    if found is None:
        near = difflib.get_close_matches(_key(_shorter(name)[-1]), list(_names()), 3, 0.5)
        nearest = list(dict.fromkeys(_names()[key] for key in near)) or known_models()
        raise SpecError(
            f"{name!r} is no folder, no file and no known model. "
            f"{'Nearest' if near else 'Known'}: {', '.join(nearest)}."
        )
    return ModelSpec.from_config(_load()[found]["config"], found)


def _shorter(name: str) -> list[str]:
    """'deepseek-ai/DeepSeek-R1-0528' -> ['DeepSeek-R1-0528', 'DeepSeek-R1']."""
    names = [name.rstrip("/").rsplit("/", 1)[-1]]
    while True:
        shorter = re.sub(rf"[-_]({_EDITIONS})$", "", names[-1], flags=re.IGNORECASE)
        if shorter == names[-1]:
            return names
        names.append(shorter)
