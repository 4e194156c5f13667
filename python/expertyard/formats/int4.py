# SPDX-License-Identifier: Apache-2.0
"""int4 in groups along the input: half a byte a weight, one 16-bit scale a group (and one 16-bit
zero, if asymmetric). A last group may be short.
"""

from expertyard.formats.base import Format, ceil_div

_DEFAULT = 128


def _variant(group: int, asymmetric: bool) -> Format:
    per_group = 4 if asymmetric else 2

    def matrix_bytes(rows: int, cols: int) -> int:
        return ceil_div(rows * cols, 2) + per_group * rows * ceil_div(cols, group)

    suffix = f"-g{group}" if group != _DEFAULT or asymmetric else ""
    return Format(
        "int4" + suffix + ("-asym" if asymmetric else ""),
        f"int4, groups of {group}, 16-bit scales" + (" and zeros" if asymmetric else ""),
        matrix_bytes,
        base="int4",
        group_size=group,
        asymmetric=asymmetric,
    )


FORMAT = _variant(_DEFAULT, False)
VARIANTS = {
    f"g{group}{suffix}": _variant(group, bool(suffix))
    for group in (32, 64, 128)
    for suffix in ("", "-asym")
}
