# SPDX-License-Identifier: Apache-2.0
"""Writes a safetensors file in place: its space is reserved, mapped, filled by whoever has the
data, and only then given its name. Tensors begin at multiples of 64 bytes.

The space is reserved on the disk first, because a full disk under a mapped file kills the process.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoadError

__all__ = ["ALIGNMENT", "new_file"]

ALIGNMENT = 64
_NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@contextmanager
def new_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of a new file, to be filled. At the end of the block it gets its name; if the
    block raises, nothing is left. Raises LoadError if there is no room.
    """
    header, begins, size = _layout(tensors)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        whole = torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8)
        yield {
            name: whole[begins[name] : begins[name] + _nbytes(dtype, shape)].view(dtype).view(shape)
            for name, (dtype, shape) in tensors.items()
        }
        del whole
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LoadError(f"{path}: cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, where each tensor begins, and the size of the file.

    safetensors wants no holes: tensors that are no multiple of 64 bytes come last.
    """
    order = sorted(tensors, key=lambda name: _nbytes(*tensors[name]) % ALIGNMENT != 0)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    offsets: dict[str, int] = {}
    for name in order:
        dtype, shape = tensors[name]
        end = at + _nbytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    begin = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: begin + offset for name, offset in offsets.items()}, begin + at
