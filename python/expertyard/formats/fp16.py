# SPDX-License-Identifier: Apache-2.0
"""float16: 2 bytes a weight."""

from expertyard.formats.base import Format

FORMAT = Format("fp16", "float16, unquantised", lambda rows, cols: 2 * rows * cols)
