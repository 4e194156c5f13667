# SPDX-License-Identifier: Apache-2.0
"""int8: 1 byte a weight; one float32 scale a row, or one 16-bit scale a group along the input."""

from expertyard.formats.base import Format, ceil_div


def _grouped(group: int) -> Format:
    def matrix_bytes(rows: int, cols: int) -> int:
        return rows * cols + 2 * rows * ceil_div(cols, group)

    summary = f"int8, groups of {group}, 16-bit scales"
    return Format(f"int8-g{group}", summary, matrix_bytes, base="int8", group_size=group)


FORMAT = Format("int8", "int8, a float32 scale a row", lambda rows, cols: rows * cols + 4 * rows)
VARIANTS = {f"g{group}": _grouped(group) for group in (32, 64, 128)}
