# SPDX-License-Identifier: Apache-2.0
"""Loads the native module, in the right order: torch first, as `_C` binds to its libraries.

Importing this registers the operators of torch.ops.expertyard.
"""

import torch

from .errors import ExpertyardError

try:
    from . import _C
except ImportError as error:  # not built, or built against a torch that is not this one
    raise ExpertyardError(
        f"expertyard's native module does not load with torch {torch.__version__}: {error}. "
        "Build it in this environment: pip install --no-build-isolation ."
    ) from error

__all__ = ["_C"]
