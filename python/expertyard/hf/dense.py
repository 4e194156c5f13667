# SPDX-License-Identifier: Apache-2.0
"""Everything of a model but its experts, as a state dict for transformers.

Plain tensors stay in the mapped files until transformers wants them; quantised ones are made plain
in the model's dtype, one after another.
"""

import torch
from torch import Tensor

from .kept import Kept
from .skeleton import Opened

__all__ = ["dense_state", "dense_tensor"]


def dense_tensor(opened: Opened, key: str, dtype: torch.dtype) -> Tensor:
    """One weight: as the files have it, or in `dtype` if they have it quantised."""
    tensor = opened.checkpoint.tensor(key)
    return tensor.to(dtype) if opened.checkpoint.stored(key) is not None else tensor


def dense_state(opened: Opened, dtype: torch.dtype, kept: Kept) -> dict[str, Tensor]:
    """All but those that stay quantised, by the names that transformers converts from."""
    stay = set(kept.layers.values())
    return {
        name: dense_tensor(opened, key, dtype)
        for key, name in opened.dense.items()
        if key not in stay
    }
