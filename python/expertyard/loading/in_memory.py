# SPDX-License-Identifier: Apache-2.0
"""Parameters of a model in memory with the face of a Checkpoint, so that they pack the same way."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import LoadError
from .checkpoint import Checkpoint
from .layer import DTYPES

__all__ = ["InMemory"]

_FORMATS = {dtype: name for name, dtype in DTYPES.items()}


class InMemory(Checkpoint):
    """Tensors by name, as they are."""

    def __init__(self, tensors: Mapping[str, Tensor], owner: str) -> None:
        super().__init__([])
        self._parameters, self._owner = tensors, owner

    @property
    def keys(self) -> list[str]:
        return list(self._parameters)

    @property
    def files(self) -> list[Path]:
        return []

    def has(self, key: str) -> bool:
        return key in self._parameters

    def where(self, key: str) -> str:
        return f"{self._owner}.{key}"

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._parameters[key].shape)

    def kind(self, key: str) -> str:
        return str(self._parameters[key].dtype).removeprefix("torch.")

    def nbytes(self, key: str) -> int:
        return self._parameters[key].nbytes

    def format(self, key: str) -> str:
        dtype = self._parameters[key].dtype
        if dtype not in _FORMATS:
            raise LoadError(f"{self.where(key)}: expected bf16, fp16 or fp32, got {dtype}.")
        return _FORMATS[dtype]

    def raw(self, key: str) -> Tensor:
        return self._parameters[key]
