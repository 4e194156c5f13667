# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint, opened in place: a tensor is a view of the mapped file.

Not a loader: nothing is read until someone touches a tensor's memory. A quantised weight, which the
files keep in several tensors, appears under the one name that it has in the unquantised model, so
whoever looks for a weight does not see how it is stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open

from ..errors import LoadError
from ..quantize import Plain, QuantizedMatrix
from ..spec.headers import TensorInfo, read_header

__all__ = ["FLOATS", "Checkpoint", "Matrix", "Stored", "in_float32"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

_TORCH = {
    "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip

Matrix: TypeAlias = Plain | QuantizedMatrix


@dataclass(frozen=True)
class Stored:
    """A quantised weight: the tensors that it is kept in, and how to read it.

    shape   of the weight, [out, in] or [num_experts, out, in]: rows are outputs, always
    format  the canonical name of the native format that holds it best
    parts   the names of its tensors in the files
    read    its [out, in] matrix; takes the expert's number where the weight has experts
    loss    "" if `format` holds it exactly, else the words that say why not
    """

    shape: tuple[int, ...]
    format: str
    parts: tuple[str, ...]
    read: Callable[[int | None], Matrix]
    loss: str = ""


class Checkpoint:
    """One or more safetensors files.

    Raises LoadError, naming file and tensor, if a file is missing, truncated or corrupt, or if two
    files have a tensor of the same name.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        self._hidden: dict[str, TensorInfo] = {}  # parts of quantised weights
        self._stored: dict[str, Stored] = {}
        self._readers: dict[Path, Any] = {}
        self._maps: dict[Path, torch.Tensor] = {}
        for path in dict.fromkeys(map(Path, files)):
            if path.suffix != ".safetensors":
                raise LoadError(
                    f"{path}: expected a .safetensors file. Expertyard reads experts from "
                    "safetensors and GGUF only; save the model with save_pretrained() once to "
                    "convert it."
                )
            found = read_header(path)
            if twice := found.keys() & self._tensors.keys():
                name = min(twice)
                raise LoadError(
                    f"{path}: tensor {name!r} is in {self._tensors[name].file.name} too. Remove "
                    "the file that does not belong to this checkpoint."
                )
            self._tensors |= found

    @property
    def keys(self) -> list[str]:
        """Names of all weights; a quantised one has one name, whatever it is stored in."""
        return [*self._tensors, *(key for key in self._stored if key not in self._tensors)]

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(info.file for info in self._tensors.values()))

    def replace(self, stored: dict[str, Stored], ignored: Sequence[str] = ()) -> None:
        """Puts quantised weights in the place of their parts, and forgets `ignored` tensors."""
        self._stored |= stored
        for name in [*(part for weight in stored.values() for part in weight.parts), *ignored]:
            if name in self._tensors:
                self._hidden[name] = self._tensors.pop(name)

    def _info(self, key: str) -> TensorInfo:
        stored = self._stored.get(key)
        name = stored.parts[0] if stored is not None else key
        return self._tensors.get(name) or self._hidden[name]

    def has(self, key: str) -> bool:
        """Whether the files have a tensor of that name."""
        return key in self._tensors

    def file(self, key: str) -> Path:
        """The file that a tensor is in."""
        return self._info(key).file

    def where(self, key: str) -> str:
        """The words that name a tensor in an error: its file and its key."""
        return f"{self._info(key).file}: tensor {self._info(key).name!r}"

    def shape(self, key: str) -> tuple[int, ...]:
        stored = self._stored.get(key)
        return stored.shape if stored is not None else self._info(key).shape

    def stored(self, key: str) -> Stored | None:
        """How a quantised weight is kept; None for a plain tensor."""
        return self._stored.get(key)

    def kind(self, key: str) -> str:
        """The tensor's dtype as safetensors names it: "BF16", "I32", "F8_E4M3" ..."""
        return self._info(key).dtype

    def nbytes(self, key: str) -> int:
        """Bytes of the files that the weight takes."""
        stored = self._stored.get(key)
        parts = stored.parts if stored is not None else (key,)
        return sum(self._info(part).nbytes for part in parts)

    def format(self, key: str) -> str:
        """The native format of a weight; LoadError if it is stored as nothing that we know."""
        stored = self._stored.get(key)
        if stored is not None:
            return stored.format
        kind = self.kind(key)
        if kind not in _FORMATS:
            raise LoadError(
                f"{self.where(key)}: expected float32, float16 or bfloat16 expert weights, got "
                f"{kind}, and config.json has no quantization_config that explains it."
            )
        return _FORMATS[kind]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor where it lies in the mapped file, which stays mapped as long as it lives.

        A quantised weight is given in float32, in new memory.
        """
        stored = self._stored.get(key)
        if stored is not None:
            if len(stored.shape) == 2:
                return in_float32(stored.read(None))
            return torch.stack([in_float32(stored.read(e)) for e in range(stored.shape[0])])
        return self.raw(key)

    def raw(self, key: str) -> torch.Tensor:
        """One tensor of the files, as it is there."""
        info = self._tensors.get(key) or self._hidden[key]
        dtype = _TORCH.get(info.dtype)
        if dtype is None or info.begin % dtype.itemsize:
            if info.file not in self._readers:
                self._readers[info.file] = safe_open(str(info.file), framework="pt")
            tensor: torch.Tensor = self._readers[info.file].get_tensor(key)
            return tensor
        # safetensors' own way touches a page of every tensor, and a disk that reads ahead by
        # megabytes then reads them all
        if info.file not in self._maps:
            size = info.file.stat().st_size
            self._maps[info.file] = torch.from_file(
                str(info.file), shared=False, size=size, dtype=torch.uint8
            )
        octets = self._maps[info.file][info.begin : info.begin + info.nbytes]
        return octets.view(dtype).view(info.shape)

    def matrix(self, key: str, expert: int | None = None) -> Matrix:
        """A weight of two dimensions, or one expert's of three, in the best form there is."""
        stored = self._stored.get(key)
        if stored is not None:
            return stored.read(expert)
        tensor = self.raw(key)
        return tensor if expert is None else tensor[expert]


def in_float32(matrix: Matrix) -> torch.Tensor:
    """Its numbers, whatever form it has."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.dequantize(torch.float32)
    return matrix.float()
