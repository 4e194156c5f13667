# SPDX-License-Identifier: Apache-2.0
"""Makes the plan for a model at hand and says where each of its experts modules goes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..devices import machine_memory, unusable_devices
from ..dispatch import Placement, check_devices, place_experts, split_rank
from ..formats import format_names, get_format, variant_names
from ..loading import DTYPES, ExpertsLayout
from ..memory import UNLIMITED
from ..plan import Plan, make_plan
from .config import ExpertsConfig
from .layers import layer_number
from .own import Own, spec_of
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
    native: Mapping[str, str] | None = None,
    saved: Mapping[int, tuple[str, int]] | None = None,
) -> tuple[Plan, tuple[Promised, ...]]:
    """The plan, and for every experts module its device and format.

    model_config  what config.json holds
    native        the format that each module's experts have in a quantised checkpoint; they keep it
                  unless the user names one. The plan counts the widest for all of them.
    saved         of a checkpoint with quantised layers that are no experts: layer -> the format
                  that they keep, and what that saves of the bytes of plain ones
    folder        the checkpoint's, whose headers give exact bytes; already checked by the caller
    Raises PlanError, RuleError, SpecError or DeviceError if the request cannot be obeyed here.
    """
    names = native if native and "format" not in config.given else {}
    numbers = {name: layer_number(name) for name in layouts}
    own = Own({numbers[name]: format for name, format in names.items()}, saved)
    spec, widest = own.in_spec(spec_of(model_config, folder), format_of(dtype)), own.widest
    request, memory = config.for_dtype(format_of(dtype), widest), machine_memory()
    # First as if every device that the request names were here, so that a missing one is told apart
    # from one that is too small.
    plan = make_plan(spec, request, None).check()
    check_devices(plan, memory.keys(), unusable_devices())
    if request.memory is None:
        elsewhere = {
            name: UNLIMITED - 1 for name in plan.devices if split_rank(name)[0] is not None
        }
        plan = make_plan(spec, request, {**memory, **elsewhere}).check()
    placements = {
        name: _with_own(placement, names.get(name), widest)
        for name, placement in place_experts(plan, numbers, runnable_formats()).items()
    }
    promises = tuple(
        Promised(name, numbers[name], layout, placements[name]) for name, layout in layouts.items()
    )
    return own.in_plan(plan), promises


def runnable_formats() -> tuple[str, ...]:
    """Names of every format, with its variants, that experts can have."""
    return tuple(name for base in format_names() for name in (base, *variant_names(base)))


def _with_own(placement: Placement, own: str | None, widest: str | None) -> Placement:
    """The placement with canonical names of formats, and what a module has of its own."""
    parts = tuple(
        replace(part, format=own if own and part.format == widest else get_format(part.format).name)
        for part in placement.parts
    )
    return replace(placement, parts=parts)
