# SPDX-License-Identifier: Apache-2.0
"""MXFP4 (OCP microscaling, gpt-oss' own): e2m1 in groups of 32 with one e8m0 byte: 17 bytes for 32
weights.
"""

from expertyard.formats.base import Format, ceil_div

GROUP = 32
GROUP_BYTES = 17  # 16 bytes of nibbles and the exponent

FORMAT = Format(
    "mxfp4",
    "float4 e2m1, groups of 32, e8m0 scales",
    lambda rows, cols: rows * ceil_div(cols, GROUP) * GROUP_BYTES,
    group_size=GROUP,
)
