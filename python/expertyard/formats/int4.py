# SPDX-License-Identifier: Apache-2.0
"""int4 in groups of 128 along the input: half a byte a weight, one bfloat16 scale a group. A last
group may be short.
"""

from expertyard.formats.base import Format, ceil_div

GROUP = 128


def matrix_bytes(rows: int, cols: int) -> int:
    return ceil_div(rows * cols, 2) + 2 * rows * ceil_div(cols, GROUP)


FORMAT = Format("int4", "int4, groups of 128, bfloat16 scales", matrix_bytes)
