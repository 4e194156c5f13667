# SPDX-License-Identifier: Apache-2.0
"""bfloat16, the format that checkpoints come in: 2 bytes a weight."""

from expertyard.formats.base import Format

FORMAT = Format("bf16", "bfloat16, unquantised", lambda rows, cols: 2 * rows * cols)
