# SPDX-License-Identifier: Apache-2.0
"""`experts_implementation="expertyard"`, known to transformers as soon as Expertyard is imported.

transformers keeps two tables of experts functions, one for ordinary weights and one for fp8
checkpoints. If transformers is loaded already, the entries are made at once; if not, a finder waits
on sys.meta_path for exactly those two modules and makes the entries when they have run. Nothing is
imported here that the user has not asked for: no torch, no transformers, no native library.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["IMPLEMENTATION", "register"]

IMPLEMENTATION = "expertyard"


def _experts_forward(
    self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, **kwargs: Any
) -> Any:
    from expertyard.hf.interface import experts_forward

    return experts_forward(self, hidden_states, top_k_index, top_k_weights, **kwargs)


def _fp8_experts_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    from expertyard.errors import KernelError

    raise KernelError(
        f'experts_implementation="{IMPLEMENTATION}": {type(self).__name__} holds fp8 weights, and '
        "this version of Expertyard has no fp8 kernel. Choose another experts_implementation for "
        "this checkpoint, or load its bfloat16 version."
    )


# module of transformers -> (class that holds the table, our function)
_TABLES: dict[str, tuple[str, Any]] = {
    "transformers.integrations.moe": ("ExpertsInterface", _experts_forward),
    "transformers.integrations.finegrained_fp8": ("FP8ExpertsInterface", _fp8_experts_forward),
}


def _enter(module: ModuleType) -> None:
    table, function = _TABLES[module.__name__]
    interface = getattr(module, table, None)
    if interface is not None:  # transformers before 5.0 has no such table
        interface.register(IMPLEMENTATION, function)


class _ThenEnter(Loader):
    """Runs a module with its own loader, then makes our entry in its table."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _enter(module)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._waiting = set(_TABLES)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)  # so that the search below passes us by
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenEnter(spec.loader)
        return spec


def register() -> None:
    """Makes `experts_implementation="expertyard"` known, now or when transformers is imported."""
    finder_needed = False
    for name in _TABLES:
        module = sys.modules.get(name)
        if module is not None:
            _enter(module)
        else:
            finder_needed = True
    if finder_needed and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
