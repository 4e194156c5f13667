# SPDX-License-Identifier: Apache-2.0
"""What every format tells the planner: the bytes that a [rows, cols] weight matrix takes, scales
included.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A way to store weights. `matrix_bytes(rows, cols)` counts the weights and their scales.

    A matrix is [out, in], as in torch.nn.Linear: groups of scales run along cols.
    Vectors (norms, biases) are never quantised: `vector_bytes` bytes an element.
    """

    name: str
    summary: str
    matrix_bytes: Callable[[int, int], int]
    vector_bytes: int = 2


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
