# SPDX-License-Identifier: Apache-2.0
"""What one layer's experts look like, and where in a checkpoint they lie. No tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = [
    "DTYPES",
    "ExpertsLayout",
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

    gate_up_proj [E, 2I, H] and down_proj [E, H, I]; transposed: [E, H, 2I] and [E, I, H].
    interleaved: the rows of gate_up_proj are gate0, up0, gate1, up1 ... (else gates, then ups).
    spare: rows of gate_up_proj behind the experts' that nobody computes with (LongCat-Flash).
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

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the experts module, by name."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up_proj": (e, h, 2 * i) if self.transposed else (e, 2 * i, h),
            "down_proj": (e, i, h) if self.transposed else (e, h, i),
        }
        if self.has_bias:
            shapes |= {"gate_up_proj_bias": (e, 2 * i), "down_proj_bias": (e, h)}
        return shapes


@dataclass(frozen=True)
class Whole:
    """One tensor with the parameter's own shape."""

    key: str


@dataclass(frozen=True)
class PerExpert:
    """One tensor an expert and part; an expert's row of the parameter is its parts, stacked."""

    parts: tuple[tuple[str, ...], ...]  # parts[p][e] is a key; gate_up_proj has two, others one


@dataclass(frozen=True)
class Stacked:
    """One tensor [num_experts, out, in] a part, as GGUF has them: gate and up, or down alone."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Anything else: row(e) reads and converts what expert e's row of the parameter needs."""

    keys: tuple[str, ...]
    row: Callable[[int], torch.Tensor]


Source: TypeAlias = Whole | PerExpert | Stacked | Rows


@dataclass(frozen=True)
class LayerSource:
    """Where the parameters of one experts module lie: parameter name -> source."""

    name: str
    layout: ExpertsLayout
    parameters: dict[str, Source]
