# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint, opened in place: a tensor is a view of the mapped file.

Not a loader: nothing is read until someone touches a tensor's memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import LoadError
from ..spec.headers import TensorInfo, read_header

__all__ = ["Checkpoint"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """One or more safetensors files; a key in two of them is taken from the later one.

    Raises LoadError, naming file and tensor, if a file is missing, truncated or corrupt.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        self._readers: dict[Path, Any] = {}
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                raise LoadError(
                    f"{path}: expected a .safetensors file. Expertyard reads experts from "
                    "safetensors only; save the model with save_pretrained() once to convert it."
                )
            self._tensors |= read_header(path)

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def file(self, key: str) -> Path:
        """The file that a tensor is in."""
        return self._tensors[key].file

    def where(self, key: str) -> str:
        """The words that name a tensor in an error: its file and its key."""
        return f"{self.file(key)}: tensor {key!r}"

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The tensor's dtype; LoadError if it is none of float32, float16 and bfloat16."""
        name = self._tensors[key].dtype
        if name not in _DTYPES:
            raise LoadError(
                f"{self.where(key)}: expected float32, float16 or bfloat16 expert weights, got "
                f"{name}. Quantised checkpoints are not read yet."
            )
        return _DTYPES[name]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor where it lies in the mapped file, which stays mapped as long as it lives."""
        path = self.file(key)
        if path not in self._readers:
            self._readers[path] = safe_open(str(path), framework="pt")
        tensor: torch.Tensor = self._readers[path].get_tensor(key)
        return tensor
