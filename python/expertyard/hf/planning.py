# SPDX-License-Identifier: Apache-2.0
"""Makes the plan for a model at hand and says where each of its experts modules goes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..devices import machine_memory, unusable_devices
from ..dispatch import Placement, check_devices, place_experts, split_rank
from ..errors import LoadError
from ..formats import format_names, get_format, variant_names
from ..loading import DTYPES, ExpertsLayout
from ..memory import UNLIMITED
from ..plan import Plan, make_plan
from ..spec import ModelSpec
from ..spec.model import LayerSpec, Stored, shapes_bytes
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
    spec = _spec(model_config, folder)
    if saved is not None:
        spec = _with_saved(spec, format_of(dtype), saved)
    own = native if native and "format" not in config.given else {}
    widest = max(own.values(), key=_bytes, default=None)
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
    numbers = {name: layer_number(name) for name in layouts}
    placements = {
        name: _with_own(placement, own.get(name), widest)
        for name, placement in place_experts(plan, numbers, runnable_formats()).items()
    }
    plan = _with_formats(plan, {numbers[name]: own[name] for name in own}, widest)
    dense = {layer: format for layer, (format, _) in (saved or {}).items()}
    plan = replace(
        plan,
        layers=tuple(
            replace(layer, dense_format=dense.get(layer.layer, layer.dense_format))
            for layer in plan.layers
        ),
    )
    promises = tuple(
        Promised(name, numbers[name], layout, placements[name]) for name, layout in layouts.items()
    )
    return plan, promises


def runnable_formats() -> tuple[str, ...]:
    """Names of every format, with its variants, that experts can have."""
    return tuple(name for base in format_names() for name in (base, *variant_names(base)))


def _bytes(format: str) -> int:
    return get_format(format).matrix_bytes(1024, 1024)


def _with_own(placement: Placement, own: str | None, widest: str | None) -> Placement:
    """The placement with canonical names of formats, and what a module has of its own."""
    parts = tuple(
        replace(part, format=own if own and part.format == widest else get_format(part.format).name)
        for part in placement.parts
    )
    return replace(placement, parts=parts)


def _with_formats(plan: Plan, own: Mapping[int, str], widest: str | None) -> Plan:
    """The plan as it will be obeyed: layers of a mixed checkpoint keep formats of their own."""
    layers = tuple(
        replace(
            layer,
            experts=tuple(
                replace(group, format=own[layer.layer]) if group.format == widest else group
                for group in layer.experts
            ),
        )
        if layer.experts is not None and layer.layer in own
        else layer
        for layer in plan.layers
    )
    return replace(plan, layers=layers)


def _with_saved(
    spec: ModelSpec, dense_format: str, saved: Mapping[int, tuple[str, int]]
) -> ModelSpec:
    """The spec whose layers take what they will take once loaded, whatever the files have."""

    def loaded(layer: LayerSpec) -> LayerSpec:
        _, less = saved.get(layer.layer, ("", 0))
        plain = shapes_bytes(layer.dense, dense_format)
        return replace(layer, stored_dense=Stored(dense_format, plain - less))

    return replace(spec, layers=tuple(map(loaded, spec.layers)))


def _spec(model_config: Mapping[str, Any], folder: Path | None) -> ModelSpec:
    if folder is not None:  # exact bytes, where names and layouts are those that specs know
        try:
            return ModelSpec.from_folder(folder)
        except LoadError:  # tensors whose names only transformers' tables know: sizes by the config
            pass
    return ModelSpec.from_config(dict(model_config))
