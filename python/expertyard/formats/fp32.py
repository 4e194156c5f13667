# SPDX-License-Identifier: Apache-2.0
"""float32, as some small checkpoints have it: 4 bytes a weight."""

from expertyard.formats.base import Format

FORMAT = Format("fp32", "float32, unquantised", lambda rows, cols: 4 * rows * cols, vector_bytes=4)
