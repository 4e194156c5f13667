# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors files: names, dtypes, shapes and offsets, checked; the weights are not
read.

Layout (safetensors): 8 bytes little-endian length n, n bytes of JSON, then the data. Every claim of
the header is checked against the file's size, because a cut-off download looks fine until then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from expertyard.errors import LoadError
from expertyard.spec.model import Shape, count

INDEX = "model.safetensors.index.json"  # says which file has which tensor
MANIFEST = "expertyard.json"  # makes a folder one that `expertyard pack` has written
MAX_HEADER = 100 << 20  # safetensors' own limit
MAX_DIMENSIONS = 64  # torch's
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it lies and what it is. `begin` counts from the file's
    start.
    """

    name: str
    file: Path
    dtype: str
    shape: Shape
    begin: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file. Raises LoadError naming the file, the tensor and what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise LoadError(
                    f"{path}: not a safetensors file: {size} bytes, expected at least 8."
                )
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER, size - 8):
                raise LoadError(
                    f"{path}: the header claims {length} bytes, but the file has {size}. It is cut "
                    "off or no safetensors file; download it again."
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file.") from None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twice)
    except _TwiceError as error:
        raise LoadError(f"{path}: the header names {error} twice; the file is corrupt.") from None
    except (ValueError, RecursionError):
        raise LoadError(f"{path}: the header is not JSON; the file is corrupt.") from None
    if not isinstance(header, dict):
        raise LoadError(f"{path}: the header is no JSON object; the file is corrupt.")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {
        name: _tensor(path, name, entry, data, size - data) for name, entry in header.items()
    }
    _check_cover(path, tensors, data, size)
    return tensors


class _TwiceError(ValueError):
    """A key that a JSON object has twice."""


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for at, key in enumerate(keys) if key in keys[:at])))
    return found


def _tensor(path: Path, name: str, entry: Any, data: int, available: int) -> TensorInfo:
    def wrong(what: str) -> LoadError:
        return LoadError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict):
        raise wrong("the header's entry is no JSON object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"unknown dtype {dtype!r:.80}.")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= 1 << 63:
        raise wrong(f"shape: expected a list of whole numbers, got {shape!s:.200}.")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets: expected [begin, end], got {offsets!s:.200}.")
    begin, end = offsets
    expected = (count(tuple(shape)) * DTYPE_BITS[dtype] + 7) // 8
    if end - begin != expected:
        raise wrong(f"{dtype} {shape} takes {expected} bytes, but the header gives {end - begin}.")
    if end > available:
        raise wrong(
            f"ends at byte {end} of the data, but the file has {available}. The file is cut off; "
            "download it again."
        )
    return TensorInfo(name, path, dtype, tuple(shape), data + begin, end - begin)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data: int, size: int) -> None:
    """Tensors lie one after another without holes and overlaps, and fill the file."""
    at = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != at:
            kind = (
                "overlaps the tensor before it" if tensor.begin < at else "leaves a hole before it"
            )
            raise LoadError(f"{path}: tensor {tensor.name!r} {kind}; the header is corrupt.")
        at += tensor.nbytes
    if at != size:
        raise LoadError(
            f"{path}: {size - at} bytes after the last tensor; the file or its header is corrupt."
        )


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of a whole checkpoint: by index.json where there, else of every safetensors file.

    Empty when the folder has no safetensors files. Raises LoadError for files that the index names
    and that are not there, and for tensors that are not where it says.
    """
    index = folder / INDEX
    if index.is_file():
        return _read_indexed(folder, index)
    tensors: dict[str, TensorInfo] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise LoadError(f"{path}: tensor {name!r} is in {tensors[name].file.name} too.")
            tensors[name] = tensor
    return tensors


def _read_indexed(folder: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=_no_twice)["weight_map"]
        files = sorted(set(weight_map.values()))
    except OSError as error:
        raise LoadError(f"{index}: cannot be read ({error.strerror}).") from None
    except _TwiceError as error:
        raise LoadError(
            f"{index}: names {error} twice; it is damaged. Download it again."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LoadError(f"{index}: expected JSON with a weight_map of tensor to file.") from None
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise LoadError(f"{index}: weight_map: expected file names, got {file!r}.")
        if not (folder / file).is_file():
            missing = [name for name, where in weight_map.items() if where == file]
            raise LoadError(
                f"{folder / file}: no such file, but {index.name} puts {len(missing)} tensors "
                f"there "
                f"({missing[0]} ...). Download it."
            )
        headers[file] = read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise LoadError(
                f"{folder / file}: tensor {name!r} is not there, but {index.name} says so."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}
