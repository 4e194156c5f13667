# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint, opened in place: a tensor is a view of the mapped file.

Not a loader: nothing is read until someone touches a tensor's memory. What it adds to safetensors
is that every failure names the file and the tensor.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoadError

__all__ = ["Checkpoint"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_LIMIT = 100_000_000  # bytes; the limit that the safetensors library itself sets


class Checkpoint:
    """One or more safetensors files; a key in two of them is taken from the later one.

    Raises LoadError, naming the file, if a file is missing, truncated or no safetensors file.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._readers: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                raise LoadError(
                    f"{path}: expected a .safetensors file. Expertyard reads experts from "
                    "safetensors only; save the model with save_pretrained() once to convert it."
                )
            try:
                reader = safe_open(str(path), framework="pt")
                keys = list(reader.keys())
            except FileNotFoundError:
                raise LoadError(f"{path}: no such file.") from None
            except (SafetensorError, OSError) as error:
                raise LoadError(_diagnosis(path, error)) from error
            for key in keys:
                self._readers[key] = reader
                self._paths[key] = path

    @property
    def keys(self) -> list[str]:
        return list(self._readers)

    def where(self, key: str) -> str:
        """The words that name a tensor in an error: its file and its key."""
        return f"{self._paths[key]}: tensor {key!r}"

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._readers[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The tensor's dtype; LoadError if it is none of float32, float16 and bfloat16."""
        name = self._readers[key].get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise LoadError(
                f"{self.where(key)}: expected float32, float16 or bfloat16 expert weights, got "
                f"{name}. Quantised checkpoints are not read yet."
            )
        return _DTYPES[name]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor where it lies in the mapped file, which stays mapped as long as it lives."""
        tensor: torch.Tensor = self._readers[key].get_tensor(key)
        return tensor


def _diagnosis(path: Path, error: Exception) -> str:
    """What is wrong with a file that the safetensors library will not open."""
    again = "Download or copy it again."
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return f"{path}: truncated: {size} bytes is too short for a safetensors file. {again}"
        (length,) = struct.unpack("<Q", start)
        if length > _HEADER_LIMIT or start.startswith(b"version "):
            pointer = start.startswith(b"version ")  # the first line of a Git LFS pointer
            what = "a Git LFS pointer, not the file itself" if pointer else "not a safetensors file"
            return f"{path}: {what}. {again}"
        text = file.read(length)
    if len(text) < length:
        return (
            f"{path}: truncated inside its header: expected {length + 8} bytes, got {size}. {again}"
        )
    try:
        header: dict[str, Any] = json.loads(text)
        ends = {k: int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: corrupt: its header is not the JSON of a safetensors file. {again}"
    expected = 8 + length + max(ends.values(), default=0)
    if size < expected:
        cut = min((end, key) for key, end in ends.items() if 8 + length + end > size)[1]
        return (
            f"{path}: truncated: expected {expected} bytes, got {size}; the first tensor cut off "
            f"is {cut!r}. {again}"
        )
    return f"{path}: corrupt: {error}. {again}"
