# SPDX-License-Identifier: Apache-2.0
"""One expert's matrices out of a checkpoint, whatever form they are kept in there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError, LoadError
from ..quantize import QuantizedMatrix
from ..reference import split_gate_up
from .checkpoint import Checkpoint, Matrix
from .layer import Flat, LayerSource, PerExpert, Rows, Source, Stacked, Whole

__all__ = ["Expert", "keys_of", "read_expert", "row_of"]


@dataclass(frozen=True)
class Expert:
    """gate and up are [intermediate_size, hidden_size], down [hidden_size, intermediate_size]; gate
    is None where the activation has none."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


def keys_of(source: LayerSource) -> list[str]:
    """The checkpoint's names of all weights of the layer's experts."""
    found: list[str] = []
    for where in source.parameters.values():
        if isinstance(where, Whole):
            found.append(where.key)
        elif isinstance(where, PerExpert):
            found.extend(key for keys in where.parts for key in keys)
        else:
            found.extend(where.keys)
    return found


def read_expert(checkpoint: Checkpoint, source: LayerSource, expert: int) -> Expert:
    """Views of the mapped file where it holds plain numbers, else new tensors.

    Raises LoadError, naming file and tensor, for values or shapes that make no sense.
    """
    layout = source.layout
    try:
        joined = _matrices(checkpoint, source, "gate_up_proj", expert)
        (down,) = _matrices(checkpoint, source, "down_proj", expert)
    except KernelError as error:  # codes and scales that do not go together
        keys = [key for where in source.parameters.values() for key in _keys(where, expert)]
        raise LoadError(
            f"{checkpoint.where(keys[0])} and its neighbours, expert {expert} of {source.name}: "
            f"{error}"
        ) from None
    gate: Matrix | None = None
    if not layout.has_gate:
        (up,) = joined
    else:
        gate, up = joined if len(joined) == 2 else _split(joined[0], layout.interleaved)
    for name, matrix in (("gate", gate), ("up", up), ("down", down)):
        if matrix is None:
            continue
        expected = (layout.intermediate_size, layout.hidden_size)
        expected = expected[::-1] if name == "down" else expected
        got = _shape(matrix)
        if got != expected:
            raise LoadError(
                f"{source.name}: expected {name}_proj {list(expected)} for expert {expert}, but "
                f"the checkpoint's tensors give {list(got)}. The file does not belong to this "
                "config.json."
            )
    if not layout.has_bias:
        return Expert(gate, up, down)
    bias = row_of(checkpoint, source.parameters["gate_up_proj_bias"], expert)
    gate_bias, up_bias = split_gate_up(bias[None], layout.interleaved)
    if isinstance(source.parameters["gate_up_proj_bias"], Stacked):
        gate_bias, up_bias = (half[None] for half in bias.chunk(2))
    down_bias = row_of(checkpoint, source.parameters["down_proj_bias"], expert)
    return Expert(gate, up, down, gate_bias[0], up_bias[0], down_bias)


def _matrices(
    checkpoint: Checkpoint, source: LayerSource, name: str, expert: int
) -> Sequence[Matrix]:
    """One matrix, or gate and up apart; [out, in] each."""
    where, layout = source.parameters[name], source.layout
    if isinstance(where, Stacked):
        return [checkpoint.matrix(key, expert) for key in where.keys]
    if isinstance(where, Flat):
        rows = slice(expert * layout.intermediate_size, (expert + 1) * layout.intermediate_size)
        plain = [checkpoint.tensor(key)[rows] for key in where.keys]
        return [matrix.T for matrix in plain] if name == "down_proj" else plain
    if isinstance(where, Whole) and checkpoint.stored(where.key) is not None:
        return [checkpoint.matrix(where.key, expert)]
    if isinstance(where, PerExpert):
        parts = [checkpoint.matrix(keys[expert]) for keys in where.parts]
        if not layout.interleaved and not layout.transposed:
            return parts
        numbers = [part for part in parts if isinstance(part, Tensor)]
        if len(numbers) < len(parts):
            raise LoadError(
                f"{checkpoint.where(where.parts[0][expert])}: is quantised, in a family whose "
                "experts are transposed or interleaved. Expertyard cannot tell its rows apart."
            )
        row = torch.cat(numbers)
    else:
        row = row_of(checkpoint, where, expert)
    return [row.T if layout.transposed else row]


def row_of(checkpoint: Checkpoint, where: Source, expert: int) -> Tensor:
    """The expert's row of a parameter that is kept in plain numbers."""
    if isinstance(where, Whole):
        return checkpoint.tensor(where.key)[expert]
    if isinstance(where, PerExpert):
        return torch.cat([checkpoint.tensor(keys[expert]) for keys in where.parts])
    if isinstance(where, Stacked):
        return torch.cat([checkpoint.tensor(key)[expert] for key in where.keys])
    assert isinstance(where, Rows)
    return where.row(expert)


def _keys(where: Source, expert: int) -> list[str]:
    if isinstance(where, PerExpert):
        return [keys[expert] for keys in where.parts]
    return [where.key] if isinstance(where, Whole) else list(where.keys)


def _split(matrix: Matrix, interleaved: bool) -> tuple[Matrix, Matrix]:
    half = _shape(matrix)[0] // 2
    gate = slice(0, None, 2) if interleaved else slice(0, half)
    up = slice(1, None, 2) if interleaved else slice(half, None)
    return _rows(matrix, gate), _rows(matrix, up)


def _rows(matrix: Matrix, rows: slice) -> Matrix:
    if not isinstance(matrix, QuantizedMatrix):
        return matrix[rows]
    zeros = None if matrix.zeros is None else matrix.zeros[rows]
    return QuantizedMatrix(matrix.format, matrix.codes[rows], matrix.scales[rows], zeros)


def _shape(matrix: Matrix) -> tuple[int, ...]:
    return tuple(matrix.codes.shape if isinstance(matrix, QuantizedMatrix) else matrix.shape)
