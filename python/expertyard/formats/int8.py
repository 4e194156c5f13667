# SPDX-License-Identifier: Apache-2.0
"""int8 by rows: 1 byte a weight, one float32 scale a row."""

from expertyard.formats.base import Format

FORMAT = Format("int8", "int8, a float32 scale a row", lambda rows, cols: rows * cols + 4 * rows)
