# SPDX-License-Identifier: Apache-2.0
"""From checkpoint files to packed experts, in place where possible, else one expert at a time."""

from .assemble import assemble, check
from .checkpoint import Checkpoint
from .layer import DTYPES, ExpertsLayout, LayerSource, PerExpert, Rows, Whole
from .progress import tracked

__all__ = [
    "DTYPES",
    "Checkpoint",
    "ExpertsLayout",
    "LayerSource",
    "PerExpert",
    "Rows",
    "Whole",
    "assemble",
    "check",
    "tracked",
]
