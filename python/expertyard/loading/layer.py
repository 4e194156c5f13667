# SPDX-License-Identifier: Apache-2.0
"""What one layer's experts look like, and where in a checkpoint they lie. No tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..reference import has_gate

__all__ = [
    "DTYPES",
    "ExpertsLayout",
    "Flat",
    "LayerSource",
    "PerExpert",
    "Rows",
    "Source",
    "Stacked",
    "Whole",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExpertsLayout:
    """Shapes and arithmetic of one layer's experts, as the model's parameters have them.

    gate_up_proj [E, 2I, H] and down_proj [E, H, I]; transposed: [E, H, 2I] and [E, I, H]. Without a
    gate gate_up_proj is [E, I, H], up alone.
    interleaved: the rows of gate_up_proj are gate0, up0, gate1, up1 ... (else gates, then ups).
    spare: rows of gate_up_proj behind the experts' that nobody computes with (LongCat-Flash).
    flat: three matrices [E * I, H]: gate, up, and down turned round (DBRX).
    names: our parameters and what the model calls them, where that is something else.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float = 1.702
    limit: float = 7.0
    interleaved: bool = False
    transposed: bool = False
    has_bias: bool = False
    spare: int = 0
    flat: bool = False
    names: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def has_gate(self) -> bool:
        return has_gate(self.activation)

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """What the model calls one of our parameters: one name, or gate's and up's."""
        return dict(self.names).get(parameter, (parameter,))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Ours, whatever the model calls them."""
        weights = ("gate_up_proj", "down_proj")
        return (*weights, "gate_up_proj_bias", "down_proj_bias") if self.has_bias else weights

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of one of our parameters."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        rows = 2 * i if self.has_gate else i
        if self.flat and not parameter.endswith("_bias"):
            return (e * i, h)
        if parameter == "gate_up_proj":
            return (e, h, rows) if self.transposed else (e, rows, h)
        if parameter == "down_proj":
            return (e, i, h) if self.transposed else (e, h, i)
        return (e, rows) if parameter == "gate_up_proj_bias" else (e, h)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the experts module, by the model's name."""
        return {name: self.shape(ours) for ours in self.parameters for name in self.names_of(ours)}


@dataclass(frozen=True)
class Whole:
    """One tensor with the parameter's own shape."""

    key: str


@dataclass(frozen=True)
class PerExpert:
    """One tensor an expert and part; an expert's row of the parameter is its parts, stacked."""

    parts: tuple[tuple[str, ...], ...]  # parts[p][e] is a key; two for gate and up, else one


@dataclass(frozen=True)
class Stacked:
    """One tensor [num_experts, out, in] a part, as GGUF has them: gate and up, or down alone."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Flat:
    """One tensor [num_experts * intermediate_size, hidden_size] a part (ExpertsLayout.flat)."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Anything else: row(e) reads and converts what expert e's row of the parameter needs.

    decodes  whether row() makes plain numbers of quantised ones
    """

    keys: tuple[str, ...]
    row: Callable[[int], torch.Tensor]
    decodes: bool = False


Source: TypeAlias = Whole | PerExpert | Stacked | Flat | Rows


@dataclass(frozen=True)
class LayerSource:
    """Where the parameters of one experts module lie: our name of a parameter -> source.

    same_as  name of the module whose experts these are, where two modules share them; "": its own
    """

    name: str
    layout: ExpertsLayout
    parameters: dict[str, Source]
    same_as: str = ""
