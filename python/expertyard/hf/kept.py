# SPDX-License-Identifier: Apache-2.0
"""Quantised layers that are no experts: which of them keep the codes that their checkpoint has.

transformers' own quantisers are no way to that on most machines (docs/checkpoints.md has the list):
they make such layers plain while loading, or at the first token, or need a library of their own. So
a linear layer becomes a PackedLinear in the format that experts of such a source get; what cannot
is made plain. Both that and what a format does not hold exactly are said.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError, LoadError
from ..formats import Format, get_format
from ..linear import PackedLinear, pack_matrix
from ..loading import DTYPES, Checkpoint
from ..loading.convert import in_format
from ..loading.packed_folder import PackedFolder
from ..loading.parallel import for_each
from ..loading.progress import metered
from ..quantize import QuantizedMatrix, quantize
from .layers import layer_number
from .skeleton import Opened

__all__ = [
    "NOTHING_KEPT",
    "Kept",
    "check_mapped",
    "choose_kept",
    "fill_kept",
    "fill_mapped",
    "make_plain",
    "packed_matrix",
    "put_empty",
    "saved_bytes",
    "shapes_of",
]

_THREADS = 4


@dataclass(frozen=True)
class Kept:
    """layers: module -> key of its weight. plain: key of a quantised weight -> why it is not.
    losses: what `layers` do not keep exactly."""

    layers: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[str, ...] = ()


NOTHING_KEPT = Kept()


def choose_kept(opened: Opened, wanted: bool) -> Kept:
    """What becomes of every quantised weight that is no expert's; `wanted` or all made plain."""
    layers: dict[str, str] = {}
    plain: dict[str, str] = {}
    modules = dict(opened.model.named_modules())
    tied = {name.removesuffix(".weight") for name in _tied(opened.model)}
    in_float32 = _patterns(opened.model)
    for key in opened.dense:
        stored = opened.checkpoint.stored(key)
        if stored is None:
            continue
        name, _, leaf = opened.targets.get(key, "").rpartition(".")
        module = modules.get(name)
        why = ""
        if not wanted:
            why = 'dense="plain"'
        elif not name or leaf != "weight":
            why = "transformers makes its parameter of several tensors"
        elif type(module) is not nn.Linear:
            why = f"{type(module).__name__} is no linear layer"
        elif name in tied:
            why = "its weight is tied to another"
        elif in_float32 is not None and in_float32.search(name):
            why = "its family keeps it in float32"
        elif stored.format in DTYPES or len(stored.shape) != 2:
            why = f"it is no matrix in a format of ours ({stored.format})"
        elif tuple(module.weight.shape) != stored.shape:
            why = f"its shape is {list(stored.shape)}, the model's {list(module.weight.shape)}"
        if why:
            plain[key] = why
        else:
            layers[name] = key
    losses = {opened.checkpoint.stored(key).loss for key in layers.values()}  # type: ignore[union-attr]
    return Kept(layers, plain, tuple(sorted(losses - {""})))


def _tied(model: Any) -> set[str]:
    """Parameters that are others' too: a packed layer shares nothing."""
    found = getattr(model, "all_tied_weights_keys", None) or {}
    both = {*found, *(found.values() if isinstance(found, Mapping) else ())}
    return {str(name) for name in both}


def _patterns(model: Any) -> re.Pattern[str] | None:
    """What transformers keeps in float32 whatever the model's dtype."""
    names = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return re.compile("|".join(rf"(^|\.)({name})(\.|$)" for name in names)) if names else None


def put_empty(model: Any, names: Iterable[str]) -> None:
    """Puts layers without weights where transformers would otherwise want some."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        empty = PackedLinear(linear.in_features, linear.out_features, linear.bias)
        model.get_submodule(parent)._modules[leaf] = empty


def fill_kept(model: Any, kept: Kept, checkpoint: Checkpoint) -> None:
    """Packs every kept layer from the files. Raises LoadError, naming file and tensor."""

    def fill(name: str) -> None:
        key, layer = kept.layers[name], model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        blob, format, scale_type = packed_matrix(checkpoint, key)
        layer.put_packed(blob, format, scale_type)
        meter.advance(checkpoint.nbytes(key))

    total = sum(checkpoint.nbytes(key) for key in kept.layers.values())
    with metered(total, "Packing quantised layers") as meter:
        for_each(kept.layers, fill, _THREADS)


def packed_matrix(checkpoint: Checkpoint, key: str) -> tuple[Tensor, Format, str]:
    """A kept layer's weight as pack_matrix() makes it. Raises LoadError, naming file and tensor."""
    matrix, stored = checkpoint.matrix(key), checkpoint.stored(key)
    assert stored is not None
    format = get_format(stored.format)
    try:
        if not isinstance(matrix, QuantizedMatrix):  # a layout that no format of ours has
            matrix = quantize(matrix, format)
        blob, scale_type = pack_matrix(in_format(matrix, format))
    except KernelError as error:
        raise LoadError(f"{checkpoint.where(key)}: {error}") from None
    return blob, format, scale_type


def check_mapped(model: Any, packed: PackedFolder) -> None:
    """LoadError unless the model has every layer that the folder has packed."""
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, int] | None] = {}
    for name in packed.matrices:
        module: Any = modules.get(name)
        linear = type(module) is nn.Linear
        shapes[name] = (module.out_features, module.in_features) if linear else None
    packed.check_matrices(shapes)


def fill_mapped(model: Any, packed: PackedFolder) -> None:
    """Gives every layer its blob in the mapped files."""
    for name, matrix in packed.matrices.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        layer.put_packed(packed.matrix(name), get_format(matrix.format), matrix.scale_type)


def make_plain(model: Any, names: Iterable[str], dtype: torch.dtype) -> None:
    """Puts linear layers with plain weights where packed ones are."""
    for name in names:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        with torch.device("meta"):
            plain = nn.Linear(packed.in_features, packed.out_features, bias=False)
        plain.weight = nn.Parameter(packed.dequantize(dtype), requires_grad=False)
        plain.register_parameter("bias", packed.bias)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = plain


def shapes_of(kept: Kept, checkpoint: Checkpoint) -> Iterator[tuple[str, str, int, int]]:
    """Of every kept layer name, format, rows and columns."""
    for name, key in kept.layers.items():
        stored = checkpoint.stored(key)
        assert stored is not None
        rows, columns = stored.shape
        yield name, stored.format, rows, columns


def saved_bytes(
    shapes: Iterable[tuple[str, str, int, int]], itemsize: int
) -> dict[int, tuple[str, int]]:
    """layer -> (format, bytes that its kept layers take less than plain ones would).

    shapes  as shapes_of() gives them
    """
    found: dict[int, tuple[str, int]] = {}
    for name, stored, rows, columns in shapes:
        try:
            number = layer_number(name)
        except KernelError:  # the head: outside of layers
            continue
        saved = rows * columns * itemsize - get_format(stored).matrix_bytes(rows, columns)
        format, before = found.get(number, (stored, 0))
        found[number] = (format, before + saved)
    return found
