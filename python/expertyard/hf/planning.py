# SPDX-License-Identifier: Apache-2.0
"""Makes the plan for a model at hand and says where each of its experts modules goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..devices import machine_memory, unusable_devices
from ..dispatch import check_devices, place_experts
from ..loading import DTYPES, ExpertsLayout
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
    spec_from: Path | Mapping[str, Any],
    layouts: Mapping[str, ExpertsLayout],
    dtype: torch.dtype,
) -> tuple[Plan, tuple[Promised, ...]]:
    """The plan, and for every experts module its device and format.

    spec_from  the checkpoint's folder (exact bytes from its headers) or a config.json as a mapping
    Raises PlanError, RuleError, SpecError or DeviceError if the request cannot be obeyed here.
    """
    folder = isinstance(spec_from, Path)
    spec = ModelSpec.from_folder(spec_from) if folder else ModelSpec.from_config(dict(spec_from))
    request, memory = config.for_dtype(format_of(dtype)), machine_memory()
    # First as if every device that the request names were here, so that a missing one is told apart
    # from one that is too small.
    plan = make_plan(spec, request, None).check()
    check_devices(plan, memory.keys(), unusable_devices())
    if request.memory is None:
        plan = make_plan(spec, request, memory).check()
    numbers = {name: layer_number(name) for name in layouts}
    placements = place_experts(plan, numbers, DTYPES)
    promises = tuple(
        Promised(name, numbers[name], layout, placements[name].device, placements[name].format)
        for name, layout in layouts.items()
    )
    return plan, promises
