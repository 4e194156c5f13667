# SPDX-License-Identifier: Apache-2.0
"""float8 e4m3: 1 byte a weight; one float32 scale a block of 128 x 128 (DeepSeek-V3's own), or
one a row.
"""

from expertyard.formats.base import Format, ceil_div

BLOCK = 128


def matrix_bytes(rows: int, cols: int) -> int:
    return rows * cols + 4 * ceil_div(rows, BLOCK) * ceil_div(cols, BLOCK)


FORMAT = Format(
    "fp8", "float8 e4m3, 128 x 128 blocks, float32 scales", matrix_bytes, group_size=BLOCK
)
VARIANTS = {
    "channel": Format(
        "fp8-channel",
        "float8 e4m3, a float32 scale a row",
        lambda rows, cols: rows * cols + 4 * rows,
        base="fp8",
    )
}
