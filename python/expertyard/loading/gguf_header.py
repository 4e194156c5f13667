# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata, and name, type, shape and place of every tensor, checked.

Layout (little-endian): "GGUF", u32 version, u64 tensors, u64 pairs; the pairs (string key, u32
type, value); for each tensor its name, u32 dimensions, u64 sizes (innermost first), u32 type, u64
offset; then, aligned, the data. Every count is held against the bytes that are left before anything
is allocated for it, and every tensor against the file's size. Long arrays (vocabularies) are
skipped.
"""

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LoadError

__all__ = ["GGML_BLOCKS", "GgufHeader", "GgufTensor", "read_gguf_header"]

# ggml's number of a type -> its name, weights a block, bytes a block
GGML_BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KEPT = 4096  # longest array whose elements are kept
_TEXT = 64 << 20  # bytes of the longest value: tokenizer.json is kept as one
# Elements of all arrays that are walked one by one, metadata entries, tensors: the largest
# vocabularies and their merges are a million. A sparse file "holds" any number of empty strings.
_WALKED = 1 << 24
_DIMENSIONS = 4  # of a tensor at most, as in ggml
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. shape is outermost first, as torch has it; begin counts from the file's start."""

    name: str
    file: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata holds scalars, strings, and arrays of up to 4096 numbers."""

    version: int
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises LoadError naming the file, the tensor and what is wrong."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise LoadError(f"{path}: not a GGUF file: {path.stat().st_size} bytes.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file.") from None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from None


class _Parser:
    """A position in the file, and what can be read there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)
        self.walked = 0

    def fail(self, what: str) -> NoReturn:
        raise LoadError(f"{self.path}: {what}. The file is cut off or corrupt; download it again.")

    def number(self, code: str) -> Any:
        begin, self.at = self.at, self.at + struct.calcsize(code)
        if self.at > self.size:
            self.fail(f"the header goes on past the end of the file ({self.size} bytes)")
        return struct.unpack_from(code, self.data, begin)[0]

    def count(self, what: str, least: int) -> int:
        """A count of things that take `least` bytes each, and so cannot be more than fit."""
        count: int = self.number("<Q")
        if count > (self.size - self.at) // least:
            self.fail(f"claims {count} {what}, more than fit into the file ({self.size} bytes)")
        return count

    def walk(self, what: str, least: int) -> int:
        """A count of things that are looked at one by one."""
        count = self.count(what, least)
        self.walked += count
        if self.walked > _WALKED:
            self.fail(f"claims {count} {what}, more than any model has")
        return count

    def string(self, what: str) -> str:
        length = self.count(f"bytes of {what}", 1)
        begin, self.at = self.at, self.at + length
        if length > (_TEXT if what == "a value" else 65535):
            self.fail(f"{what} of {length} bytes")
        try:
            return self.data[begin : self.at].decode(
                "utf-8", "strict" if what != "a value" else "replace"
            )
        except UnicodeDecodeError:
            self.fail(f"{what} is no UTF-8 text")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string("a value")
        if kind != _ARRAY or depth > 2:
            self.fail(f"a value of the unknown type {kind}")
        inner = self.number("<I")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            count = self.count("array elements", width)
            if count > _KEPT:
                self.at += count * width
                return None
            return [self.number(_SCALARS[inner]) for _ in range(count)]
        count = self.walk("array elements", 8)
        if inner == _STRING:
            for _ in range(count):
                self.at += self.count("bytes of text", 1)
            return None
        for _ in range(count):
            self.value(inner, depth + 1)
        return None

    def header(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise LoadError(f"{self.path}: not a GGUF file: it begins with {self.data[:4]!r}.")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise LoadError(
                f"{self.path}: GGUF version {version} is not read, only 2 and 3"
                + (" (is it big-endian?)." if version > 0xFFFF else ".")
            )
        tensors = self.walk("tensors", 24)
        pairs = self.walk("metadata entries", 13)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key")
            if key in metadata:
                self.fail(f"metadata {key!r} is there twice")
            metadata[key] = self.value(self.number("<I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            self.fail(f"{_ALIGNMENT} is {alignment!r}, no multiple of 8")
        data = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in found:
                self.fail(f"tensor {name!r} is there twice")
            if offset % alignment:
                self.fail(f"tensor {name!r}: begins at {offset}, no multiple of {alignment}")
            found[name] = self._tensor(name, shape, kind, data, offset)
        self._check_overlaps(found)
        return GgufHeader(version, metadata, found)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor's name")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _DIMENSIONS:
            self.fail(f"tensor {name!r}: has {dimensions} dimensions")
        sizes = [self.number("<Q") for _ in range(dimensions)]
        if 0 in sizes:
            self.fail(f"tensor {name!r}: has a size of 0")
        return name, tuple(reversed(sizes)), self.number("<I"), self.number("<Q")

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, data: int, offset: int
    ) -> GgufTensor:
        if kind not in GGML_BLOCKS:
            raise LoadError(f"{self.path}: tensor {name!r}: unknown ggml type {kind}.")
        type_name, weights, width = GGML_BLOCKS[kind]
        if shape[-1] % weights:
            self.fail(
                f"tensor {name!r}: {type_name} rows of {shape[-1]} are no multiple of {weights}"
            )
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements // weights * width
        if data + offset + nbytes > self.size:
            self.fail(
                f"tensor {name!r}: {type_name} {list(shape)} ends at byte "
                f"{data + offset + nbytes}, but the file has {self.size}"
            )
        return GgufTensor(name, self.path, type_name, shape, data + offset, nbytes)

    def _check_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        end = 0
        for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
            if tensor.begin < end:
                self.fail(f"tensor {tensor.name!r} overlaps the one before it")
            end = tensor.begin + tensor.nbytes
