# SPDX-License-Identifier: Apache-2.0
"""A layer's experts from a checkpoint into a PackedExperts, on their device and in their format.

Plain numbers that lie as a kernel reads them stay where they are: the packed experts ARE the mapped
file, no byte is copied, and pages are read from disk when a token first needs them. Everything else
is converted expert by expert, on several threads, into the memory where it stays: the peak is the
result plus a few experts on their way.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, LoadError
from ..formats import get_format
from ..packing import ExpertPacker, scale_type_of
from ..quantize import QuantizedMatrix
from ..weights import Blobs, PackedExperts
from .checkpoint import Checkpoint, in_float32
from .convert import SCRATCH, common_scales, in_format
from .expert import keys_of, read_expert
from .layer import DTYPES, Flat, LayerSource, PerExpert, Rows, Stacked, Whole
from .parallel import for_each

__all__ = ["assemble", "check", "native_format", "num_threads"]

_SLACK = 150 << 20  # bytes that packing may take beside the result and one expert in float32


def check(checkpoint: Checkpoint, source: LayerSource) -> None:
    """LoadError, naming file and tensor, if a shape or dtype is not what the model has.

    Reads headers only, so a whole checkpoint is checked before the first weight is loaded.
    """
    layout = source.layout
    by_rows = replace(layout, transposed=False)
    for name in layout.parameters:
        where, shape = source.parameters[name], layout.shape(name)
        if isinstance(where, Whole):
            quantised = checkpoint.stored(where.key) is not None
            _expect(checkpoint, where.key, by_rows.shape(name) if quantised else shape)
        elif isinstance(where, Flat):
            for key in where.keys:
                _expect(checkpoint, key, shape)
                if checkpoint.stored(key) is not None:
                    raise LoadError(
                        f"{checkpoint.where(key)}: is quantised, and this family keeps all experts "
                        "in one matrix, which needs plain numbers. Load its bfloat16 version."
                    )
        elif isinstance(where, PerExpert):
            row = (shape[1] // len(where.parts), *shape[2:])
            for keys in where.parts:
                for key in keys:
                    _expect(checkpoint, key, row)
        elif isinstance(where, Stacked):
            rows = by_rows.shape(name)
            part = (rows[0], rows[1] // len(where.keys), *rows[2:])
            for key in where.keys:
                _expect(checkpoint, key, part)
        else:
            for key in where.keys:
                if checkpoint.stored(key) is not None:
                    raise LoadError(
                        f"{checkpoint.where(key)}: is quantised, and this family's experts are "
                        "converted in a way that needs plain numbers. Load its bfloat16 version."
                    )
                if not where.decodes:
                    checkpoint.format(key)


def _expect(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> None:
    checkpoint.format(key)
    got = checkpoint.shape(key)
    if got != shape:
        raise LoadError(
            f"{checkpoint.where(key)}: expected shape {list(shape)}, got {list(got)}. The file "
            "does not belong to this config.json."
        )


def native_format(checkpoint: Checkpoint, source: LayerSource) -> tuple[str, str]:
    """The format that keeps the layer's experts as they are, and what is lost all the same.

    Weights in several formats get one that holds them all: plain numbers if one of them is plain
    (the first one's), else int8 in groups of 32.
    """
    keys = [key for key in keys_of(source) if not key.endswith("bias")]
    formats = {checkpoint.format(key): key for key in reversed(keys)}
    losses = {stored.loss for key in keys if (stored := checkpoint.stored(key)) and stored.loss}
    if len(formats) == 1:
        return next(iter(formats)), "; ".join(sorted(losses))
    kinds = [get_format(name) for name in formats]
    if {kind.base for kind in kinds} == {"int4"} and len({k.group_size for k in kinds}) == 1:
        with_zeros = next(kind.name for kind in kinds if kind.asymmetric)
        return with_zeros, "; ".join(sorted(losses))  # the others get zeros of 8
    plain = [name for name in ("fp32", "bf16", "fp16") if name in formats]
    if plain:
        return plain[0], ""
    mixed = f"a layer's {', '.join(sorted(formats))} weights get one format"
    return get_format("int8-g32").name, "; ".join([*sorted(losses), mixed])


def num_threads(source: LayerSource) -> int:
    """Threads that pack at once: the cores, as far as their experts in flight fit into 150 MB and
    one expert in float32.
    """
    layout = source.layout
    weights = (3 if layout.has_gate else 2) * layout.hidden_size * layout.intermediate_size
    fitting = (4 * weights + _SLACK) // (weights + SCRATCH)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(int(cores or 1), fitting))


def assemble(
    checkpoint: Checkpoint,
    source: LayerSource,
    *,
    format: str,
    device: str,
    search: bool = False,
    mode: str = "exact",
    experts: Collection[int] | None = None,
    arena: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> PackedExperts:
    """The packed experts of one layer.

    format   of the result; the files may hold another
    device   "cpu" or "cuda:N"
    search   where weights are quantised: look for the scales with the least squared error
    mode     how CPU kernels compute with quantised weights: "exact" or "fast"
    experts  those that are wanted; the others are "not here". None: all
    arena    memory to pack into, where the format is a packed one
    advance  called with the bytes of the files that have been read
    Raises LoadError as check() does.
    """
    check(checkpoint, source)
    wanted = _wanted(source, experts)
    base = get_format(format).base
    if base in DTYPES:
        packed = _plain(checkpoint, source, base, torch.device(device), wanted)
        if advance is not None:
            advance(layer_bytes(checkpoint, source) * len(wanted) // source.layout.num_experts)
        return packed
    return _packed(
        checkpoint, source, format, device, search, mode, wanted, arena, advance or (lambda n: None)
    )


def layer_bytes(checkpoint: Checkpoint, source: LayerSource) -> int:
    """Bytes of the files that hold the layer's experts."""
    return sum(checkpoint.nbytes(key) for key in keys_of(source))


def _wanted(source: LayerSource, experts: Collection[int] | None) -> list[int]:
    number = source.layout.num_experts
    if experts is None:
        return list(range(number))
    strange = sorted(set(experts) - set(range(number)))
    if strange or not experts:
        raise LoadError(
            f"{source.name}: expected some of experts 0 to {number - 1}, got {sorted(experts)}."
        )
    return sorted(set(experts))


def _activation(source: LayerSource) -> dict[str, Any]:
    layout = source.layout
    return {"activation": layout.activation, "alpha": layout.alpha, "limit": layout.limit}


def _packed(
    checkpoint: Checkpoint,
    source: LayerSource,
    format: str,
    device: str,
    search: bool,
    mode: str,
    wanted: list[int],
    arena: Tensor | None,
    advance: Callable[[int], None],
) -> PackedExperts:
    layout, target = source.layout, get_format(format)
    each = layer_bytes(checkpoint, source) // layout.num_experts
    first = read_expert(checkpoint, source, wanted[0])
    scale_dtype = common_scales(first.matrices, target)
    packer = ExpertPacker(
        len(wanted),
        layout.hidden_size,
        layout.intermediate_size,
        format,
        device=device,
        scale_dtype=scale_dtype,
        has_bias=layout.has_bias,
        mode=mode,
        arena=arena,
        search=search,
        **_activation(source),
    )

    biases: dict[tuple[str, int], Tensor | None] = {}

    def pack(place: int) -> None:
        expert = read_expert(checkpoint, source, wanted[place])
        own = {name: getattr(expert, name) for name in ("gate_bias", "up_bias", "down_bias")}
        biases.update({(name, wanted[place]): bias for name, bias in own.items()})
        try:
            *first, up, down = [
                in_format(matrix, target, search, scale_dtype)
                if isinstance(matrix, QuantizedMatrix)
                else matrix  # the packer quantises plain numbers
                for matrix in expert.matrices
            ]
            packer.put(place, first[0] if first else None, up, down, **own)
        except KernelError as error:  # weights that are not finite, scales of another dtype
            raise LoadError(
                f"{_where(checkpoint, source)}, expert {wanted[place]}: {error}"
            ) from None
        advance(each)

    for_each(range(len(wanted)), pack, num_threads(source))
    if len(wanted) == layout.num_experts:
        return packer.finish()
    places: dict[int, int] = {number: place for place, number in enumerate(wanted)}
    blobs = [packer.blobs(places[e]) if e in places else None for e in range(layout.num_experts)]
    return PackedExperts.from_blobs(
        Blobs(
            target,
            scale_type_of(target, scale_dtype),
            layout.hidden_size,
            layout.intermediate_size,
            [None if blob is None else blob[0] for blob in blobs],
            [None if blob is None else blob[1] for blob in blobs],
        ),
        gate_bias=[biases.get(("gate_bias", e)) for e in range(layout.num_experts)],
        up_bias=[biases.get(("up_bias", e)) for e in range(layout.num_experts)],
        down_bias=[biases.get(("down_bias", e)) for e in range(layout.num_experts)],
        mode=mode,
        **_activation(source),
    )


def _where(checkpoint: Checkpoint, source: LayerSource) -> str:
    return f"{checkpoint.where(keys_of(source)[0])} and the others of {source.name}"


def _plain(
    checkpoint: Checkpoint,
    source: LayerSource,
    format: str,
    device: torch.device,
    wanted: list[int],
) -> PackedExperts:
    """bf16, fp16 or fp32: each expert's own rows of the files, or of one buffer a parameter."""
    layout, dtype = source.layout, DTYPES[format]
    in_place = device.type == "cpu" and _in_place(checkpoint, source, dtype, wanted[0])
    columns: dict[str, list[Tensor | None]] = {
        name: [None] * layout.num_experts
        for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    }
    if in_place:
        for number in wanted:
            expert = read_expert(checkpoint, source, number)
            for name, column in columns.items():
                column[number] = getattr(expert, name)
    else:
        _fill(checkpoint, source, dtype, device, wanted, columns)
    biases: dict[str, Any] = {}
    if layout.has_bias:
        biases = {name: columns[name] for name in columns if name.endswith("_bias")}
    gate = columns["gate"] if layout.has_gate else None
    return PackedExperts.from_experts(
        gate, columns["up"], columns["down"], **biases, **_activation(source)
    )


def _fill(
    checkpoint: Checkpoint,
    source: LayerSource,
    dtype: torch.dtype,
    device: torch.device,
    wanted: list[int],
    columns: dict[str, list[Tensor | None]],
) -> None:
    layout = source.layout
    rows, inner = layout.intermediate_size, layout.hidden_size
    names = ("gate", "up") if layout.has_gate else ("up",)
    w13 = torch.empty((len(wanted), len(names), rows, inner), dtype=dtype, device=device)
    w2 = torch.empty((len(wanted), inner, rows), dtype=dtype, device=device)

    def fill(place: int) -> None:
        expert = read_expert(checkpoint, source, wanted[place])
        for name, target in zip((*names, "down"), (*w13[place], w2[place]), strict=True):
            matrix = getattr(expert, name)
            target.copy_(matrix if isinstance(matrix, Tensor) else in_float32(matrix))
            columns[name][wanted[place]] = target
            bias = getattr(expert, f"{name}_bias")
            columns[f"{name}_bias"][wanted[place]] = None if bias is None else bias.to(device)

    for_each(range(len(wanted)), fill, num_threads(source))


def _in_place(checkpoint: Checkpoint, source: LayerSource, dtype: torch.dtype, number: int) -> bool:
    """Whether a kernel can read all of the layer's matrices where they lie in the files."""
    layout = source.layout
    for name in ("gate_up_proj", "down_proj"):
        where = source.parameters[name]
        if isinstance(where, Rows | Flat) or layout.transposed:
            return False
        if isinstance(where, PerExpert) and layout.interleaved and len(where.parts) > 1:
            return False
    keys = [key for key in keys_of(source) if not key.endswith("bias")]
    if any(checkpoint.stored(key) is not None for key in keys):
        return False
    tensors = [checkpoint.raw(key) for key in keys]
    return all(_usable(tensor, dtype) for tensor in tensors)


def _usable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read the tensor where it lies."""
    aligned = tensor.data_ptr() % tensor.element_size() == 0  # old writers did not pad the header
    return tensor.dtype == dtype and aligned
