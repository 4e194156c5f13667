# SPDX-License-Identifier: Apache-2.0
"""What every format tells the planner: the bytes that a [rows, cols] weight matrix takes, scales
included; and what variants of it there are.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A way to store weights. `matrix_bytes(rows, cols)` counts the weights and their scales.

    name         canonical: "int4" for int4 in groups of 128, "int4-g32", "int4-g128-asym" ...
    base         "int4": what the kernels are named after
    group_size   weights along cols that share a scale; 0: a whole row, or no scales at all
    asymmetric   each group has a zero as well as a scale
    A matrix is [out, in], as in torch.nn.Linear: groups of scales run along cols.
    Vectors (norms, biases) are never quantised: `vector_bytes` bytes an element.
    """

    name: str
    summary: str
    matrix_bytes: Callable[[int, int], int]
    vector_bytes: int = 2
    base: str = ""
    group_size: int = 0
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not self.base:
            object.__setattr__(self, "base", self.name)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
