# SPDX-License-Identifier: Apache-2.0
"""Expertyard: mixture-of-experts models bigger than your GPU.

Importing this package imports neither torch nor transformers; each name below loads what it needs
when it is first used, so that planning stays instant on a machine that has neither.
"""

from importlib import import_module
from typing import Any

from .registration import register as _register

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "ExpertyardError": "errors",
    "ModelSpec": "spec",
    "Request": "plan",
    "Plan": "plan",
    "make_plan": "plan",
    "PackedExperts": "weights",
    "moe_experts": "ops",
    "ExpertsConfig": "hf",
    "attach": "hf",
    "detach": "hf",
    "from_pretrained": "hf",
    "verify": "hf",
    "move": "hf",
    "recording": "hf",
    "set_policy": "hf",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'expertyard' has no attribute {name!r}")
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


_register()  # experts_implementation="expertyard" exists from here on; imports nothing
