# SPDX-License-Identifier: Apache-2.0
"""From checkpoint files to packed experts, in place where possible, else one expert at a time."""

from .assemble import assemble, check, layer_bytes, native_format
from .checkpoint import Checkpoint, Stored
from .gguf import GgufCheckpoint, gguf_files
from .layer import DTYPES, ExpertsLayout, LayerSource, PerExpert, Rows, Stacked, Whole
from .progress import Meter, metered
from .sources import read_quantised

__all__ = [
    "DTYPES",
    "Checkpoint",
    "ExpertsLayout",
    "GgufCheckpoint",
    "LayerSource",
    "Meter",
    "PerExpert",
    "Rows",
    "Stacked",
    "Stored",
    "Whole",
    "assemble",
    "check",
    "gguf_files",
    "layer_bytes",
    "metered",
    "native_format",
    "read_quantised",
]
