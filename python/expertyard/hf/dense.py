# SPDX-License-Identifier: Apache-2.0
"""Everything of a model but its experts, as a state dict for transformers.

Plain tensors stay in the mapped files until transformers wants them; quantised ones are made plain
in the model's dtype, one after another.
"""

from typing import Any

import torch
from torch import Tensor

from .skeleton import Opened

__all__ = ["dense_state"]


def dense_state(opened: Opened, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by the names that transformers converts from."""
    checkpoint = opened.checkpoint
    state: dict[str, Any] = {}
    for key, name in opened.dense.items():
        tensor = checkpoint.tensor(key)
        state[name] = tensor.to(dtype) if checkpoint.stored(key) is not None else tensor
    return state
