# SPDX-License-Identifier: Apache-2.0
"""A folder that `expertyard pack` has written: experts as kernels read them, mapped and used.

    config.json, tokenizer ...                       as in the source; quantization_config is ours
    model.safetensors.index.json, dense-*.safetensors   everything but the experts
    experts-00003.safetensors                        one file a layer of experts: <module>.blobs
                                                     U8 [num_experts, w13 bytes + w2 bytes], laid
                                                     out by csrc/blocks.h, and biases in float32
    kept-00000.safetensors                           other quantised layers: <module>.packed U8, a
                                                     matrix laid out like an expert's w2
    expertyard.json                                  what is in each file, its size and its SHA-256

Nothing here depends on a plan: any layer may go to any device. expertyard.json is written last, so
a folder that has it is whole. Opening compares sizes and headers; verify() reads every byte.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExpertyardError, KernelError, LoadError, PlanError
from ..formats import get_format
from ..packing import packed_bytes, scale_type_of
from ..spec.headers import MANIFEST
from ..weights import Blobs, PackedExperts
from .checkpoint import Checkpoint
from .layer import ExpertsLayout
from .writer import ALIGNMENT

__all__ = [
    "MANIFEST",
    "Manifest",
    "PackedFile",
    "PackedFolder",
    "PackedLayer",
    "PackedMatrix",
    "file_hash",
    "is_packed",
    "read_manifest",
    "write_manifest",
]

VERSION = 2
READABLE = (1, 2)  # 1: without `matrices`
_BIASES = ("gate_bias", "up_bias", "down_bias")
_SCALES = {
    "none": None,
    "e8m0": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class PackedLayer:
    """One layer of experts. scale_type: as in weights.Blobs."""

    file: str
    format: str
    scale_type: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float
    limit: float
    has_bias: bool

    @classmethod
    def of(cls, file: str, packed: PackedExperts, has_bias: bool) -> "PackedLayer":
        return cls(
            file=file,
            format=packed.format,
            scale_type=packed.scale_type,
            num_experts=packed.num_experts,
            hidden_size=packed.hidden_size,
            intermediate_size=packed.intermediate_size,
            activation=packed.activation,
            alpha=packed.alpha,
            limit=packed.limit,
            has_bias=has_bias,
        )

    def blob_bytes(self) -> tuple[int, int]:
        """Of an expert's w13 and w2."""
        scales = _scale_dtype(self.format, self.scale_type)
        return packed_bytes(
            self.format, self.hidden_size, self.intermediate_size, scales, self.activation
        )


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised linear layer that is no expert: [rows, columns] = [out, in] features."""

    file: str
    format: str
    scale_type: str
    rows: int
    columns: int

    def blob_bytes(self) -> int:
        scales = _scale_dtype(self.format, self.scale_type)
        return packed_bytes(self.format, self.rows, self.columns, scales)[1]


@dataclass(frozen=True)
class PackedFile:
    """Size and content hash of one file."""

    bytes: int
    sha256: str


def _scale_dtype(format: str, scale_type: str) -> torch.dtype | None:
    """KernelError or KeyError where a format has no such scales."""
    dtype = _SCALES[scale_type]
    if scale_type_of(get_format(format), dtype) != scale_type:
        raise KernelError(f"scale_type: format {format!r} with {scale_type!r}")
    return dtype


def is_packed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def file_hash(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """layers and matrices by module, files by name; rest: what else the file says."""

    layers: Mapping[str, PackedLayer]
    matrices: Mapping[str, PackedMatrix]
    files: Mapping[str, PackedFile]
    rest: Mapping[str, Any]


def read_manifest(path: Path) -> Manifest:
    """LoadError if it is not such a file."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] not in READABLE:
            raise LoadError(
                f"{path}: version {manifest['version']!r}, expected {VERSION}. It was written by "
                "another version of Expertyard; pack the model again."
            )
        layers = {name: PackedLayer(**layer) for name, layer in manifest["layers"].items()}
        matrices = {
            name: PackedMatrix(**matrix) for name, matrix in manifest.get("matrices", {}).items()
        }
        files = {name: PackedFile(**file) for name, file in manifest["files"].items()}
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LoadError(f"{path}: is damaged; pack the model again.") from None
    of_layers = (layer.file for layer in layers.values())
    of_matrices = (matrix.file for matrix in matrices.values())
    for name in [*files, *of_layers, *of_matrices]:
        if not isinstance(name, str) or Path(name).name != name:
            raise LoadError(f"{path}: expected names of files in this folder, got {name!r}.")
    known = ("version", "layers", "matrices", "files")
    rest = {key: value for key, value in manifest.items() if key not in known}
    return Manifest(layers, matrices, files, rest)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Under a temporary name, then renamed: the file is whole or not there."""
    content = {
        "version": VERSION,
        **manifest.rest,
        "layers": {name: asdict(layer) for name, layer in manifest.layers.items()},
        "matrices": {name: asdict(matrix) for name, matrix in manifest.matrices.items()},
        "files": {name: asdict(file) for name, file in manifest.files.items()},
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


class PackedFolder:
    """Raises LoadError, naming the file, if something is missing, of another size or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder / MANIFEST)
        self.layers, self.matrices = manifest.layers, manifest.matrices
        self.files, self.rest = manifest.files, manifest.rest
        for name, file in self.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != file.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes, expected {file.bytes}"
                raise LoadError(f"{path}: {found}. Pack or copy the model again.")
        if not self.layers:
            raise LoadError(f"{folder / MANIFEST}: names no layers; it is damaged.")
        for name in (*self.layers, *self.matrices):
            self._check_sizes(name)
        files = {layer.file for layer in self.layers.values()}
        names = sorted(files | {matrix.file for matrix in self.matrices.values()})
        if missing := [name for name in names if name not in self.files]:
            raise LoadError(f"{folder / MANIFEST}: says nothing about {missing[0]}; it is damaged.")
        self._checkpoint = Checkpoint([folder / name for name in names])

    @property
    def format(self) -> str:
        """The widest of the layers' formats."""
        return max(
            (layer.format for layer in self.layers.values()),
            key=lambda name: get_format(name).matrix_bytes(1024, 1024),
        )

    def formats(self, layouts: Mapping[str, ExpertsLayout]) -> dict[str, str]:
        return {name: self.layers[name].format for name in layouts}

    def check(self, layouts: Mapping[str, ExpertsLayout]) -> None:
        """LoadError unless the folder has just these experts; headers only."""
        where = self.folder / MANIFEST
        if self.layers.keys() != layouts.keys():
            odd = sorted(self.layers.keys() ^ layouts.keys())
            raise LoadError(
                f"{where}: config.json and this file do not name the same experts: {odd[0]}. The "
                "folder was changed after packing; pack the model again."
            )
        for name, layout in layouts.items():
            layer = self.layers[name]
            for what in (
                "num_experts", "hidden_size", "intermediate_size", "activation", "alpha", "limit",
                "has_bias",
            ):  # fmt: skip
                got, expected = getattr(layer, what), getattr(layout, what)
                if got != expected:
                    raise LoadError(
                        f"{where}: {name}: {what}: config.json says {expected!r}, the packed "
                        f"experts have {got!r}. Pack the model again."
                    )
            self._expect(f"{name}.blobs", "U8", (layer.num_experts, sum(layer.blob_bytes())))
            inner, outer = layer.intermediate_size, layer.hidden_size
            for bias, size in zip(_BIASES, (inner, inner, outer), strict=True):
                if layer.has_bias:
                    self._expect(f"{name}.{bias}", "F32", (layer.num_experts, size))

    def check_formats(self, formats: Mapping[str, str | None]) -> None:
        """PlanError if a plan wants experts in another format than they are packed in."""
        for name, wanted in formats.items():
            have = self.layers[name].format
            if wanted is not None and get_format(wanted).name != have:
                raise PlanError(
                    f"{name}: the plan wants its experts in {wanted!r}, but {self.folder} has them "
                    f"packed in {have!r}. Leave `format` out, or pack the model again."
                )

    def check_matrices(self, shapes: Mapping[str, tuple[int, int] | None]) -> None:
        """LoadError unless `shapes`, of the model's linear layers, are those of the matrices.

        shapes  of every module that `matrices` names: [out_features, in_features], or None where
                the model has no linear layer
        """
        for name, matrix in self.matrices.items():
            got, expected = (matrix.rows, matrix.columns), shapes[name]
            if got != expected:
                wanted = "no linear layer" if expected is None else str(list(expected))
                raise LoadError(
                    f"{self.folder / MANIFEST}: {name}: config.json's model has {wanted} there, "
                    f"the packed layer is {list(got)}. Pack the model again."
                )
            self._expect(f"{name}.packed", "U8", (matrix.blob_bytes(),))

    def matrix_shapes(self) -> list[tuple[str, str, int, int]]:
        """Of every layer that is no expert name, format, rows and columns."""
        return [(name, m.format, m.rows, m.columns) for name, m in self.matrices.items()]

    def matrix(self, name: str) -> Tensor:
        """The blob of a layer that is no expert: the mapped file itself."""
        return self._aligned(f"{name}.packed")

    def _check_sizes(self, name: str) -> None:
        try:
            (self.layers.get(name) or self.matrices[name]).blob_bytes()
        except (ExpertyardError, KeyError, ValueError, TypeError) as error:
            what = str(error).partition("\n")[0]  # pybind11 goes on with signatures
            raise LoadError(f"{self.folder / MANIFEST}: {name}: {what}") from None

    def _expect(self, key: str, kind: str, shape: tuple[int, ...]) -> None:
        where = self.folder / MANIFEST
        if not self._checkpoint.has(key):
            raise LoadError(f"{where}: tensor {key!r} is not in the files. Pack the model again.")
        got = (self._checkpoint.kind(key), self._checkpoint.shape(key))
        if got != (kind, shape):
            raise LoadError(
                f"{self._checkpoint.where(key)}: expected {kind} {list(shape)}, got {got[0]} "
                f"{list(got[1])}. Pack the model again."
            )

    def experts(
        self, name: str, layout: ExpertsLayout, device: str, *, mode: str = "exact"
    ) -> PackedExperts:
        """A layer's experts: on the CPU the mapped file itself, on a GPU one copy of it."""
        layer = self.layers[name]
        w13, _ = layer.blob_bytes()
        blobs = self._aligned(f"{name}.blobs")
        rows = list(blobs.to(torch.device(device)))
        biases: dict[str, Any] = {}
        if layer.has_bias:
            biases = {
                bias: list(self._checkpoint.raw(f"{name}.{bias}").to(torch.device(device)))
                for bias in _BIASES
            }
        return PackedExperts.from_blobs(
            Blobs(
                get_format(layer.format),
                layer.scale_type,
                layer.hidden_size,
                layer.intermediate_size,
                [row[:w13] for row in rows],
                [row[w13:] for row in rows],
            ),
            **biases,
            activation=layout.activation,
            alpha=layout.alpha,
            limit=layout.limit,
            mode=mode,
        )

    def _aligned(self, key: str) -> Tensor:
        blobs = self._checkpoint.raw(key)
        if blobs.data_ptr() % ALIGNMENT:
            raise LoadError(
                f"{self._checkpoint.where(key)}: expected to begin at a multiple of {ALIGNMENT} "
                "bytes. The file was written anew by something else; pack the model again."
            )
        return blobs

    def verify(self, advance: Callable[[int], None] | None = None) -> None:
        """Reads every byte; LoadError names the first file whose content is not what was packed."""
        for name, file in self.files.items():
            if file_hash(self.folder / name, advance) != file.sha256:
                raise LoadError(
                    f"{self.folder / name}: its content is not what was packed (SHA-256 differs). "
                    "The disk or a copy damaged it; pack or copy the model again."
                )
