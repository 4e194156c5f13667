# SPDX-License-Identifier: Apache-2.0
"""Makes the plan for a model at hand and says where each of its experts modules goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..devices import machine_memory, unusable_devices
from ..dispatch import check_devices, place_experts, split_rank
from ..errors import LoadError
from ..loading import DTYPES, ExpertsLayout
from ..memory import UNLIMITED
from ..plan import Plan, make_plan
from ..spec import ModelSpec
from .config import ExpertsConfig
from .layers import layer_number
from .state import Promised

__all__ = ["format_of", "make_promises"]


def format_of(dtype: torch.dtype) -> str:
    """The format that keeps a model's dtype; bf16 for a dtype that no expert can have."""
    return next((name for name, known in DTYPES.items() if known == dtype), "bf16")


def make_promises(
    config: ExpertsConfig,
    model_config: Mapping[str, Any],
    layouts: Mapping[str, ExpertsLayout],
    dtype: torch.dtype,
    folder: Path | None = None,
) -> tuple[Plan, tuple[Promised, ...]]:
    """The plan, and for every experts module its device and format.

    model_config  what config.json holds
    folder        the checkpoint's, whose headers give exact bytes; already checked by the caller
    Raises PlanError, RuleError, SpecError or DeviceError if the request cannot be obeyed here.
    """
    spec = _spec(model_config, folder)
    request, memory = config.for_dtype(format_of(dtype)), machine_memory()
    # First as if every device that the request names were here, so that a missing one is told apart
    # from one that is too small.
    plan = make_plan(spec, request, None).check()
    check_devices(plan, memory.keys(), unusable_devices())
    if request.memory is None:
        elsewhere = {
            name: UNLIMITED - 1 for name in plan.devices if split_rank(name)[0] is not None
        }
        plan = make_plan(spec, request, {**memory, **elsewhere}).check()
    numbers = {name: layer_number(name) for name in layouts}
    placements = place_experts(plan, numbers, DTYPES)
    promises = tuple(
        Promised(name, numbers[name], layout, placements[name]) for name, layout in layouts.items()
    )
    return plan, promises


def _spec(model_config: Mapping[str, Any], folder: Path | None) -> ModelSpec:
    if folder is not None:
        try:
            return ModelSpec.from_folder(folder)
        except LoadError:  # tensors whose names only transformers' tables know: sizes by the config
            pass
    return ModelSpec.from_config(dict(model_config))
