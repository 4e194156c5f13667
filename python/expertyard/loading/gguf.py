# SPDX-License-Identifier: Apache-2.0
"""A GGUF file, or the files that one model is split into, with the face of a Checkpoint.

Tensors have llama.cpp's names here (blk.3.ffn_gate_exps.weight); who maps them to a model's
parameters is not this file's business. Rows are outputs, as everywhere.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import KernelError, LoadError
from .checkpoint import Checkpoint, Matrix, Stored, in_float32
from .gguf_header import GGML_BLOCKS, GgufHeader, GgufTensor, read_gguf_header
from .sources.ggml import GGML_READERS

__all__ = ["GgufCheckpoint", "gguf_files"]

_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
_BLOCKS = {name: (weights, width) for name, weights, width in GGML_BLOCKS.values()}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def gguf_files(path: Path) -> list[Path]:
    """The file, or all files of the split that it belongs to. LoadError if one is missing."""
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{n + 1:05d}-of-{count:05d}.gguf") for n in range(count)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise LoadError(
            f"{missing[0]}: no such file, but {path.name} is one of {count} parts. Download it."
        )
    return files


class GgufCheckpoint(Checkpoint):
    """Raises LoadError, naming file and tensor, if a file is missing, truncated or corrupt.

    header  the first file's, which has the metadata
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        super().__init__([])
        self._gguf: dict[str, GgufTensor] = {}
        self._maps: dict[Path, Tensor] = {}
        headers: list[GgufHeader] = []
        for path in map(Path, files):
            header = read_gguf_header(path)
            headers.append(header)
            if twice := header.tensors.keys() & self._gguf.keys():
                name = min(twice)
                raise LoadError(f"{path}: tensor {name!r} is in {self._gguf[name].file.name} too.")
            self._gguf |= header.tensors
        if not headers or not self._gguf:
            raise LoadError(f"{', '.join(map(str, files)) or 'no file'}: has no tensors.")
        self.header = headers[0]
        self._stored = {
            name: self._describe(tensor, GGML_READERS[tensor.type].format)
            for name, tensor in self._gguf.items()
            if tensor.type in GGML_READERS and len(tensor.shape) in (2, 3)
        }

    def _describe(self, tensor: GgufTensor, format: str) -> Stored:
        reader = GGML_READERS[tensor.type]

        def read(expert: int | None) -> Matrix:
            blocks = self._blocks(tensor)
            try:
                return reader.read(blocks if expert is None else blocks[expert])
            except KernelError as error:
                raise LoadError(
                    f"{self.where(tensor.name)}: {error}. The file is corrupt, or the quantisation "
                    "that made it failed."
                ) from None

        return Stored(tensor.shape, format, (tensor.name,), read, reader.loss)

    @property
    def keys(self) -> list[str]:
        return list(self._gguf)

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(tensor.file for tensor in self._gguf.values()))

    def has(self, key: str) -> bool:
        return key in self._gguf

    def file(self, key: str) -> Path:
        return self._gguf[key].file

    def where(self, key: str) -> str:
        return f"{self._gguf[key].file}: tensor {key!r}"

    def shape(self, key: str) -> tuple[int, ...]:
        return self._gguf[key].shape

    def kind(self, key: str) -> str:
        return self._gguf[key].type

    def nbytes(self, key: str) -> int:
        return self._gguf[key].nbytes

    def raw(self, key: str) -> Tensor:
        """A tensor of numbers where it lies in the mapped file; LoadError for quantised ones."""
        tensor = self._gguf[key]
        if tensor.type not in _FLOATS:
            known = ", ".join([*_FLOATS, *GGML_READERS])
            raise LoadError(
                f"{self.where(key)}: {tensor.type} is not read, only {known}. Choose another "
                "quantisation of this model."
            )
        return self._octets(tensor).view(_FLOATS[tensor.type]).view(tensor.shape)

    def tensor(self, key: str) -> Tensor:
        stored = self._stored.get(key)
        if stored is None and self._gguf[key].type in GGML_READERS:  # of one dimension, or of four
            tensor = self._gguf[key]
            blocks = self._blocks(tensor).reshape(1, -1, _BLOCKS[tensor.type][1])
            matrix = GGML_READERS[tensor.type].read(blocks)
            return in_float32(matrix).view(tensor.shape)
        return super().tensor(key)

    def format(self, key: str) -> str:
        if key not in self._stored:
            self.raw(key)
        return super().format(key)

    def _blocks(self, tensor: GgufTensor) -> Tensor:
        weights, width = _BLOCKS[tensor.type]
        return self._octets(tensor).view(*tensor.shape[:-1], tensor.shape[-1] // weights, width)

    def _octets(self, tensor: GgufTensor) -> Tensor:
        if tensor.file not in self._maps:
            size = tensor.file.stat().st_size
            self._maps[tensor.file] = torch.from_file(
                str(tensor.file), shared=False, size=size, dtype=torch.uint8
            )
        return self._maps[tensor.file][tensor.begin : tensor.begin + tensor.nbytes]
