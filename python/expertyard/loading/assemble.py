# SPDX-License-Identifier: Apache-2.0
"""A layer's experts from a checkpoint into a PackedExperts, on their device and in their format.

Where format and layout already are what a kernel reads, the packed experts ARE the mapped file: no
byte is copied, and pages are read from disk when a token first needs them. Otherwise each expert is
converted on its own into one buffer per parameter, so that the peak is the result plus one expert.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError
from ..reference import split_gate_up
from ..weights import PackedExperts
from .checkpoint import Checkpoint
from .layer import DTYPES, ExpertsLayout, LayerSource, PerExpert, Rows, Source, Whole

__all__ = ["assemble", "check"]


def check(checkpoint: Checkpoint, source: LayerSource) -> None:
    """LoadError, naming file and tensor, if a shape or dtype is not what the model has.

    Reads headers only, so a whole checkpoint is checked before the first weight is loaded.
    """
    for name, shape in source.layout.parameter_shapes().items():
        where = source.parameters[name]
        if isinstance(where, Whole):
            _expect(checkpoint, where.key, shape)
        elif isinstance(where, PerExpert):
            row = (shape[1] // len(where.parts), *shape[2:])
            for keys in where.parts:
                for key in keys:
                    _expect(checkpoint, key, row)
        else:
            for key in where.keys:
                checkpoint.dtype(key)


def _expect(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> None:
    checkpoint.dtype(key)
    got = checkpoint.shape(key)
    if got != shape:
        raise LoadError(
            f"{checkpoint.where(key)}: expected shape {list(shape)}, got {list(got)}. The file "
            "does not belong to this config.json."
        )


def assemble(
    checkpoint: Checkpoint, source: LayerSource, *, format: str, device: str
) -> PackedExperts:
    """The packed experts of one layer.

    format  "bf16" | "fp16" | "fp32": that of the result; the files may hold another
    device  "cpu" or "cuda:N"
    Raises LoadError as check() does.
    """
    check(checkpoint, source)
    layout = source.layout
    target = torch.device(device)
    gate_up = _matrix(checkpoint, source, "gate_up_proj", DTYPES[format], target)
    down = _matrix(checkpoint, source, "down_proj", DTYPES[format], target)
    gate_up_bias = down_bias = None
    if layout.has_bias:
        gate_up_bias = _stack(checkpoint, source, "gate_up_proj_bias", target)
        down_bias = _stack(checkpoint, source, "down_proj_bias", target)
    act: dict[str, Any] = {
        "activation": layout.activation,
        "alpha": layout.alpha,
        "limit": layout.limit,
    }
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return PackedExperts.from_tensors(
            gate_up,
            down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            interleaved=layout.interleaved,
            **act,
        )
    gate, up = _gate_and_up(gate_up, layout)
    biases: dict[str, Any] = {}
    if gate_up_bias is not None and down_bias is not None:
        gate_bias, up_bias = split_gate_up(gate_up_bias, layout.interleaved)
        biases = {
            "gate_bias": list(gate_bias),
            "up_bias": list(up_bias),
            "down_bias": list(down_bias),
        }
    downs = list(down) if isinstance(down, Tensor) else down[0]
    return PackedExperts.from_experts(gate, up, downs, **biases, **act)


def _gate_and_up(
    gate_up: Tensor | list[list[Tensor]], layout: ExpertsLayout
) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(gate_up, Tensor):
        return gate_up[0], gate_up[1]
    gate, up = split_gate_up(gate_up, layout.interleaved)
    return list(gate), list(up)


def _matrix(
    checkpoint: Checkpoint, source: LayerSource, name: str, dtype: torch.dtype, device: torch.device
) -> Tensor | list[list[Tensor]]:
    """One [E, out, in] tensor, or the experts' own tensors by part; contiguous in `in`."""
    where, layout = source.parameters[name], source.layout
    if device.type == "cpu" and not layout.transposed and not isinstance(where, Rows):
        if isinstance(where, Whole) and _usable(view := checkpoint.tensor(where.key), dtype):
            return view
        # Interleaved rows stay one tensor: the parts of such a row are not its gate and its up.
        if isinstance(where, PerExpert) and not layout.interleaved:
            parts = [[checkpoint.tensor(key) for key in keys] for keys in where.parts]
            if all(_usable(tensor, dtype) for tensors in parts for tensor in tensors):
                return parts
    shape = layout.parameter_shapes()[name]
    if layout.transposed:
        shape = (shape[0], shape[2], shape[1])
    out = torch.empty(shape, dtype=dtype, device=device)
    for expert in range(layout.num_experts):
        row = _row(checkpoint, where, expert)
        row = row.T if layout.transposed else row
        if row.shape != shape[1:]:
            raise LoadError(
                f"{source.name}.{name}: expected {list(shape[1:])} for expert {expert}, but the "
                f"checkpoint's tensors give {list(row.shape)}. The file does not belong to this "
                "config.json."
            )
        out[expert].copy_(row)
    return out


def _stack(checkpoint: Checkpoint, source: LayerSource, name: str, device: torch.device) -> Tensor:
    """A bias [E, out] in the file's dtype: small, so it is always copied."""
    experts = range(source.layout.num_experts)
    return torch.stack([_row(checkpoint, source.parameters[name], e) for e in experts]).to(device)


def _row(checkpoint: Checkpoint, where: Source, expert: int) -> Tensor:
    if isinstance(where, Whole):
        return checkpoint.tensor(where.key)[expert]
    if isinstance(where, PerExpert):
        return torch.cat([checkpoint.tensor(keys[expert]) for keys in where.parts])
    return where.row(expert)


def _usable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read the tensor where it lies."""
    aligned = tensor.data_ptr() % tensor.element_size() == 0  # old writers did not pad the header
    return tensor.dtype == dtype and aligned
